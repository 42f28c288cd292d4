"""Other programs that a benchmark compares with."""
