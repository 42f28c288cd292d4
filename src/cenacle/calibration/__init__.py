"""Commands that measure, and what they measured."""
