"""Measuring: our ranks, their ceilings, peers, and the schedules of the paper."""
