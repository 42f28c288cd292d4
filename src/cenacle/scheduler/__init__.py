"""Decides what every step does, and what to do when ranks fail; pure, without MLX or clocks."""
