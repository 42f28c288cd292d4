"""GGUF files: what is in them, and their block formats as MLX's; knows no models and no MLX."""
