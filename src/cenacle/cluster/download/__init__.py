"""Fetching the byte ranges that a node needs."""
