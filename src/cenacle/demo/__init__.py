"""The demo: a small trained model and its questions."""
