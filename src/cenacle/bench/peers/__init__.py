"""Other programs that the benchmark compares with."""
