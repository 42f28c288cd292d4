"""Speculative decoding: proposals from the text or a draft model, verified by the model."""
