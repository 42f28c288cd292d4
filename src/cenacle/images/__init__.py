"""Images of requests: where they come from, and what they show."""
