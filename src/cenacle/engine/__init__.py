"""The loop of a rank, and the steps that keep ranks together."""
