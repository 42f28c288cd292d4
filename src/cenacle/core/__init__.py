"""Plain data that every package shares. No MLX."""
