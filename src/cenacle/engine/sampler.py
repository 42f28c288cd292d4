"""From logits to a token: closures for mlx-lm's batched generation.

Owns: the sampler and logits processors of one request.
Does not know: other requests, the model.
Invariant: what a sampler returns is rank 0's choice on every rank, shared inside the graph, so
chips that round differently cannot drift apart; with a seed the choices depend on the seed and on
the position in the answer only, not on the number of ranks or on other requests.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.sample_utils import (
    LogitsProcessor,
    Sampler,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy_sampler,
    make_logits_processors,
)

from ..collective.base import Collective
from ..request import Sampling


class Samplers:
    """Makes the samplers of a group's requests.

    Args:
        collective: the ranks that must agree.
    """

    def __init__(self, collective: Collective) -> None:
        self._collective = collective
        # mlx-lm samples a batch at once if its rows have the same sampler: one object, kept.
        self._one_greedy: Sampler = self.greedy

    def greedy(self, logprobs: mx.array) -> mx.array:
        """The most probable tokens: [rows, vocabulary] -> [rows]."""
        return self._collective.share(greedy_sampler(logprobs))

    def make(self, sampling: Sampling, seed: int, answered: int = 0) -> Sampler:
        """A function from log-probabilities [rows, vocabulary] to token ids [rows].

        Args:
            sampling: the request's parameters.
            seed: what to draw with; the same on every rank.
            answered: how many tokens of the answer were drawn before, by another epoch's ranks.
        """
        if sampling.temperature == 0:
            return self._one_greedy
        key = mx.random.key(seed % 2**64)
        for _ in range(answered):
            key, _ = mx.random.split(key)
        mx.eval(key)

        def sample(logprobs: mx.array) -> mx.array:
            nonlocal key
            if 0 < sampling.top_p < 1:
                logprobs = apply_top_p(logprobs, sampling.top_p)
            if sampling.min_p:
                logprobs = apply_min_p(logprobs, sampling.min_p)
            if 0 < sampling.top_k < logprobs.shape[-1]:
                logprobs = apply_top_k(logprobs, sampling.top_k)
            key, now = mx.random.split(key)
            scaled = logprobs / sampling.temperature
            return self._collective.share(mx.random.categorical(scaled, key=now))

        return sample


def make_processors(sampling: Sampling) -> list[LogitsProcessor]:
    """mlx-lm's logits processors for the penalties and biases that are asked for."""
    return make_logits_processors(
        logit_bias=sampling.logit_bias or None,
        repetition_penalty=sampling.repetition_penalty
        if sampling.repetition_penalty != 1
        else None,
        presence_penalty=sampling.presence_penalty or None,
        frequency_penalty=sampling.frequency_penalty or None,
    )
