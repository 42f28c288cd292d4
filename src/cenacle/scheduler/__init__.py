"""What the ranks do next: pure state machines, no MLX, no clock."""
