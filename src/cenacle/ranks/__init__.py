"""The rank processes, seen from both sides."""
