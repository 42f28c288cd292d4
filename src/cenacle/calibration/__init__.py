"""Measuring this machine, and comparing predictions with measurements."""
