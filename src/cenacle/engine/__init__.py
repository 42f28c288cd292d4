"""One rank's inference: batches, KV caches, sampling, speculative decoding."""
