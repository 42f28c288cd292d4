"""From logits to a token: what mlx-lm's batched generation calls for each request.

Owns: `Choice`, the sampler; `Probe`, which keeps what log-probabilities are made of; the logits
processors; `Drawing`, all of them for one request.
Does not know: other requests, the model.
Invariant: what a sampler returns is rank 0's choice on every rank, shared inside the graph, so
chips that round differently cannot drift apart. With a seed the choices depend on the seed and on
the position in the answer only: not on the number of ranks, on other requests, on how many
positions are computed at once, or on whether the answer was begun by another group.
Next: `grammar.py`, which tokens may follow; `batches.py`, which calls all this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    LogitsProcessor,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy_sampler,
    make_logits_processors,
)

from ...collective.base import Collective
from ...core.request import Request, Sampling, TokenEvent
from ...errors import InputError
from .grammar import Matcher, Vocabulary

LEAST = -9999.0  # JSON has no infinity; OpenAI says this of what was as good as impossible


class Sampler:
    """The sampler of one request.

    Args:
        collective: the ranks that must agree.
        sampling: the request's parameters.
        seed: what to draw with; the same on every rank.
        position: of the next token in the answer. Calling the sampler moves it on.
    """

    def __init__(
        self, collective: Collective, sampling: Sampling, seed: int, position: int = 0
    ) -> None:
        self._collective, self._sampling, self._seed = collective, sampling, seed
        self.position = position

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [rows, vocabulary] -> token ids [rows], the same on every rank."""
        chosen = self._collective.broadcast_from(0, self.draw(logprobs, self.position))
        self.position += logprobs.shape[0]
        return chosen

    def draw(self, logprobs: mx.array, position: int) -> mx.array:
        """This rank's own choice: [rows, vocabulary] -> [rows].

        Args:
            position: of the first row; the others follow it.
        """
        sampling = self._sampling
        if sampling.temperature == 0:
            return greedy_sampler(logprobs)
        if 0 < sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p:
            logprobs = apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        scaled = logprobs / sampling.temperature
        rows = [
            mx.random.categorical(scaled[i : i + 1], key=self._key(position + i))
            for i in range(logprobs.shape[0])
        ]
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    def _key(self, position: int) -> mx.array:
        digest = blake2b(f"{self._seed} {position}".encode(), digest_size=8).digest()
        return mx.random.key(int.from_bytes(digest, "little"))


class LogprobRecorder:
    """Keeps a request's logits, before any penalty, bias or mask, until their token is given.

    Args:
        top: how many alternatives to report.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._kept: deque[mx.array] = deque()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:  # noqa: ARG002
        """As a logits processor: changes nothing."""
        row = logits.astype(mx.float32)
        mx.async_eval(row)  # else it would be computed behind the next token, and wait for it
        self._kept.append(row)
        return logits

    def take(self, token: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """The log-probability of the next token, and the most probable ids with theirs."""
        logits = np.asarray(self._kept.popleft())[0].astype(np.float64)
        best = logits.max()
        logprobs = np.maximum(logits - (best + np.log(np.exp(logits - best).sum())), LEAST)
        count = min(self._top, len(logprobs))
        first = np.argpartition(-logprobs, count - 1)[:count] if count else np.empty(0, int)
        order = first[np.lexsort((first, -logprobs[first]))]
        return float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in order)

    def drop(self) -> None:
        """Forget what was kept for tokens that will not be given."""
        self._kept.clear()


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


class GrammarProcessor:
    """A logits processor that leaves only what a grammar allows.

    Each mask needs the token before it, so with such a request the next token is not begun before
    the last is known.
    """

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Tokens so far [length], logits [1, vocabulary] -> logits, -inf where not allowed."""
        # Waits for the token that was drawn last.
        fresh = [int(t) for t in np.asarray(tokens[self._matcher.length :])]
        mx.async_eval(logits)  # the model runs while the mask is made
        known = self._matcher.allowed(fresh)
        allowed = np.zeros(logits.shape[-1], bool)
        width = min(len(known), len(allowed))  # embeddings are often wider than the tokenizer
        allowed[:width] = known[:width]
        return mx.where(mx.array(allowed), logits, -mx.inf)


@dataclass
class SamplingState:
    """All that decides one request's tokens.

    Args:
        choice: the sampler.
        processors: what logits go through before it, in this order.
        probe: one of them, if log-probabilities are asked for on this rank.
        matcher: what the grammar allows, if there is one.
    """

    choice: Sampler
    processors: list[LogitsProcessor] = field(default_factory=list)
    probe: LogprobRecorder | None = None
    matcher: Matcher | None = None

    def draw(self, tokens: mx.array | None, logits: mx.array, position: int) -> mx.array:
        """This rank's own choice at several positions at once: [rows, vocabulary] -> [rows].

        Args:
            tokens: all before the first row, then those that lead to the other rows; None will do
                if there are no processors.
            logits: as the model gives them.
            position: in the answer, of the first row.
        """
        if self.processors:
            assert tokens is not None
            first = tokens.shape[0] - logits.shape[0] + 1
            rows = []
            for i in range(logits.shape[0]):
                row = logits[i : i + 1]
                for processor in self.processors:
                    row = processor(tokens[: first + i], row)
                rows.append(row)
            logits = mx.concatenate(rows)
        return self.choice.draw(logits - mx.logsumexp(logits, axis=-1, keepdims=True), position)

    def possible(self, tokens: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft, from the first, the grammar allows behind `tokens`."""
        if self.matcher is None or not draft:
            return len(draft)
        unseen = tokens[self.matcher.length :]
        return max(self.matcher.possible([*unseen, *draft]) - len(unseen), 0)

    def forget(self, length: int | None = None) -> None:
        """What was drawn and has not been given will not be.

        Args:
            length: how many tokens of the text, of those that the grammar has seen, stay.
        """
        if self.probe is not None:
            self.probe.drop()
        if self.matcher is not None and length is not None:
            self.matcher.rewind(length)

    def event(self, request_id: str, token: int, finish: str | None) -> TokenEvent:
        """What is said of a token; to be called once for each, in order."""
        if self.matcher is not None and self.matcher.failed:
            finish = "error"
        if self.probe is None:
            return TokenEvent(request_id, token, finish)
        logprob, top = self.probe.take(token)
        return TokenEvent(request_id, token, finish, logprob, top)


class SamplingStates:
    """Makes what decides the tokens of a group's requests.

    Args:
        collective: the ranks that must agree.
        vocabulary: for grammars; None: the checkpoint has no tokenizer.
    """

    def __init__(self, collective: Collective, vocabulary: Vocabulary | None = None) -> None:
        self._collective, self._vocabulary = collective, vocabulary
        # mlx-lm samples a batch at once if its rows have the same sampler: one object, kept.
        self._greedy = Sampler(collective, Sampling(), 0)

    def make(self, request: Request) -> SamplingState:
        """For a request that has a seed.

        Raises:
            InputError: it has a grammar that cannot be followed.
        """
        sampling = request.sampling
        assert sampling.seed is not None, "the scheduler gives every request a seed"
        choice = self._greedy
        if sampling.temperature > 0:
            choice = Sampler(self._collective, sampling, sampling.seed, request.resumed_tokens)
        drawing = SamplingState(choice, make_processors(sampling))
        # Rank 0's are the ones that are told.
        if request.logprobs is not None and self._collective.rank == 0:
            drawing.probe = LogprobRecorder(request.logprobs)
            drawing.processors.insert(0, drawing.probe)
        if request.grammar is not None:
            if self._vocabulary is None:
                raise InputError("grammar: this checkpoint has no tokenizer", "grammar")
            before = len(request.tokens) - request.resumed_tokens
            drawing.matcher = self._vocabulary.matcher(request.grammar, before)
            drawing.processors.append(GrammarProcessor(drawing.matcher))
        return drawing
