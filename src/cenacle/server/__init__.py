"""The HTTP server: OpenAI's and Anthropic's APIs and a web page over a loaded model."""
