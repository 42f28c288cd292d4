"""From logits to tokens: samplers, logits processors and grammars."""
