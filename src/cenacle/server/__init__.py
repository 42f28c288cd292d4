"""The HTTP server: OpenAI's API over a loaded model."""
