"""Measuring a model's speed, the limits of the hardware, and peers."""
