"""From logits to a token: the samplers and logits processors of each request.

Owns: `Sampler`; `LogprobRecorder`, which keeps logits for log-probabilities; `GrammarProcessor`;
`StopTokenBlocker`; `SamplingState`, all of these for one request.
Does not know: other requests, the model.
Invariant: a sampler returns rank 0's token on every rank, sent inside the graph, so ranks that
round differently cannot diverge. With a seed, tokens depend only on the seed and the position in
the output: not on the number of ranks, other requests, how many positions are computed at once, or
a restart of the group.
Next: `grammar.py`; `engine/batch.py`, which hands samplers and processors to mlx-lm.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import LogitsProcessor, greedy_sampler, make_logits_processors

from ...collective.base import Collective
from ...core.request import Request, Sampling, TokenEvent
from ...errors import InputError
from .grammar import Matcher, Vocabulary

MIN_LOGPROB = -9999.0  # JSON has no infinity; OpenAI reports this for impossible tokens

# Smaller values are taken as these, which choose the same tokens: in 16 or 32 bits, a division by
# less overflows.
MIN_TEMPERATURE = 1e-5
MIN_TOP_P = 1e-6
MIN_REPETITION_PENALTY = 0.01


class Sampler:
    """The sampler of one request.

    Args:
        collective: the ranks that must agree.
        sampling: the request's parameters.
        seed: the same on every rank.
        position: of the next token in the output; calling the sampler advances it.
    """

    def __init__(
        self, collective: Collective, sampling: Sampling, seed: int, position: int = 0
    ) -> None:
        self._collective, self._sampling, self._seed = collective, sampling, seed
        self.position = position

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [rows, vocabulary] -> token ids [rows], the same on every rank."""
        tokens = self._collective.broadcast_from(0, self.sample(logprobs, self.position))
        self.position += logprobs.shape[0]
        return tokens

    def sample(self, logprobs: mx.array, position: int) -> mx.array:
        """This rank's own tokens: [rows, vocabulary] -> [rows].

        Args:
            position: of the first row; the others follow it.
        """
        sampling = self._sampling
        if sampling.temperature == 0:
            return greedy_sampler(logprobs)
        likely = mask_unlikely(logprobs, sampling).astype(mx.float32)
        scaled = likely / max(sampling.temperature, MIN_TEMPERATURE)
        rows = [
            mx.random.categorical(scaled[i : i + 1], key=self._random_key(position + i))
            for i in range(logprobs.shape[0])
        ]
        return rows[0] if len(rows) == 1 else mx.concatenate(rows)

    def _random_key(self, position: int) -> mx.array:
        digest = blake2b(f"{self._seed} {position}".encode(), digest_size=8).digest()
        return mx.random.key(int.from_bytes(digest, "little"))


def mask_unlikely(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """Log-probabilities [rows, vocabulary], -inf where top_p, min_p or top_k leave a token out.

    As mlx-lm's functions, but not compiled: those are compiled anew, for seconds on a CPU, for each
    value that a client makes up.
    """
    if 0 < sampling.top_p < 1:
        ascending = mx.sort(logprobs, axis=-1)
        mass = mx.exp(ascending.astype(mx.float32))
        better = mx.cumsum(mass, axis=-1, reverse=True, inclusive=False)
        total = better[..., :1] + mass[..., :1]
        dropped = (better >= max(sampling.top_p, MIN_TOP_P) * total).sum(axis=-1, keepdims=True)
        least = mx.take_along_axis(ascending, dropped, axis=-1)
        logprobs = mx.where(logprobs < least, -mx.inf, logprobs)
    if sampling.min_p:
        least = mx.max(logprobs, axis=-1, keepdims=True) + math.log(sampling.min_p)
        logprobs = mx.where(logprobs < least, -mx.inf, logprobs)
    if 0 < (count := sampling.top_k) < logprobs.shape[-1]:
        dropped = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[..., count:]
        never = mx.array(-mx.inf, logprobs.dtype)
        logprobs = mx.put_along_axis(logprobs, dropped, never, axis=-1)
    return logprobs


class LogprobRecorder:
    """A logits processor that keeps the logits, before penalties, biases and masks, of each token.

    Args:
        top: number of alternatives to report.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._rows: deque[mx.array] = deque()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:  # noqa: ARG002
        """Records the logits and returns them unchanged."""
        row = logits.astype(mx.float32)
        mx.async_eval(row)  # else it would be computed after the next token, and wait for it
        self._rows.append(row)
        return logits

    def take(self, token: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """The log-probability of the next token, and the most probable ids with theirs."""
        logits = np.asarray(self._rows.popleft())[0].astype(np.float64)
        best = logits.max()
        normalizer = best + np.log(np.exp(logits - best).sum())
        logprobs = np.maximum(logits - normalizer, MIN_LOGPROB)
        count = min(self._top, len(logprobs))
        top = np.argpartition(-logprobs, count - 1)[:count] if count else np.empty(0, int)
        order = top[np.lexsort((top, -logprobs[top]))]
        return float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in order)

    def clear(self) -> None:
        """Forget the logits of tokens that are discarded."""
        self._rows.clear()


def make_processors(sampling: Sampling) -> list[LogitsProcessor]:
    """mlx-lm's logits processors for penalties and biases."""
    repetition = max(sampling.repetition_penalty, MIN_REPETITION_PENALTY)
    sizes = {
        name: getattr(sampling, name)
        for name in ("repetition_context_size", "presence_context_size", "frequency_context_size")
    }
    repetition_size = sampling.repetition_context_size
    # mlx-lm takes 0 for all tokens, too.
    return make_logits_processors(
        logit_bias=sampling.logit_bias or None,
        repetition_penalty=repetition if repetition != 1 and repetition_size else None,
        presence_penalty=sampling.presence_penalty if sampling.presence_context_size else None,
        frequency_penalty=sampling.frequency_penalty if sampling.frequency_context_size else None,
        **{name: size if size >= 0 else 0 for name, size in sizes.items()},
    )


class GrammarProcessor:
    """A logits processor that masks what a grammar does not allow.

    Each mask needs the previous token, so the next token is not started before the last one is
    known.
    """

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Tokens so far [length], logits [1, vocabulary] -> logits, -inf where not allowed."""
        new_tokens = [int(t) for t in np.asarray(tokens[self._matcher.length :])]  # waits
        mx.async_eval(logits)  # the model runs while the mask is made
        known = self._matcher.allowed(new_tokens)
        mask = np.zeros(logits.shape[-1], bool)
        width = min(len(known), len(mask))  # embeddings are often larger than the tokenizer
        mask[:width] = known[:width]
        return mx.where(mx.array(mask), logits, -mx.inf)


class StopTokenBlocker:
    """A logits processor that lets no stop token come before `length` tokens, prompt included,
    unless a grammar leaves no other."""

    def __init__(self, stop_tokens: Sequence[int], length: int) -> None:
        self._stop_tokens, self._length = mx.array(list(stop_tokens)), length

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Tokens so far [length], logits [1, vocabulary] -> logits, -inf for stop tokens."""
        if tokens.shape[0] >= self._length:
            return logits
        blocked = mx.put_along_axis(
            logits, self._stop_tokens[None], mx.array(-mx.inf, logits.dtype), axis=-1
        )
        return mx.where(mx.max(blocked) == -mx.inf, logits, blocked)


@dataclass
class SamplingState:
    """All that decides one request's tokens.

    Args:
        sampler: see `Sampler`.
        processors: applied to the logits before it, in this order.
        recorder: one of them, if this rank reports log-probabilities.
        matcher: of the grammar, if there is one.
    """

    sampler: Sampler
    processors: list[LogitsProcessor] = field(default_factory=list)
    recorder: LogprobRecorder | None = None
    matcher: Matcher | None = None

    def sample(self, tokens: mx.array | None, logits: mx.array, position: int) -> mx.array:
        """This rank's own tokens at several positions: [rows, vocabulary] -> [rows].

        Args:
            tokens: all before the first row, then those that lead to the other rows; may be None
                without processors.
            logits: of the model.
            position: in the output, of the first row.
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
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self.sampler.sample(logprobs, position)

    def allowed_prefix(self, tokens: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft, from the first, the grammar allows after `tokens`."""
        if self.matcher is None or not draft:
            return len(draft)
        unread = tokens[self.matcher.length :]
        return max(self.matcher.allowed_prefix([*unread, *draft]) - len(unread), 0)

    def discard(self, length: int | None = None) -> None:
        """Discard what was sampled and is not part of the output.

        Args:
            length: how many tokens, including the prompt's, the grammar keeps; None: all.
        """
        if self.recorder is not None:
            self.recorder.clear()
        if self.matcher is not None and length is not None:
            self.matcher.rewind(length)

    def make_event(self, request_id: str, token: int, finish: str | None) -> TokenEvent:
        """The event of a token; call it once for each, in order."""
        if self.matcher is not None and self.matcher.error:
            finish = "error"
        if self.recorder is None:
            return TokenEvent(request_id, token, finish)
        logprob, top = self.recorder.take(token)
        return TokenEvent(request_id, token, finish, logprob, top)


class SamplingStates:
    """Creates the sampling states of a group's requests.

    Args:
        collective: the ranks that must agree.
        vocabulary: for grammars; None: the checkpoint has no tokenizer.
    """

    def __init__(self, collective: Collective, vocabulary: Vocabulary | None = None) -> None:
        self._collective, self._vocabulary = collective, vocabulary
        # mlx-lm samples a batch at once if its rows share one sampler object.
        self._greedy = Sampler(collective, Sampling(), 0)

    def create(self, request: Request) -> SamplingState:
        """The state of a request, which must have a seed.

        Raises:
            InputError: its grammar cannot be followed.
        """
        sampling = request.sampling
        assert sampling.seed is not None, "the group gives every request a seed"
        sampler = self._greedy
        if sampling.temperature > 0:
            sampler = Sampler(self._collective, sampling, sampling.seed, request.resumed_tokens)
        state = SamplingState(sampler, make_processors(sampling))
        if request.logprobs is not None and self._collective.rank == 0:  # only rank 0 reports
            state.recorder = LogprobRecorder(request.logprobs)
            state.processors.insert(0, state.recorder)
        if request.grammar is not None:
            if self._vocabulary is None:
                raise InputError("grammar: this checkpoint has no tokenizer", "grammar")
            prompt_tokens = len(request.tokens) - request.resumed_tokens
            state.matcher = self._vocabulary.matcher(request.grammar, prompt_tokens)
            state.processors.append(GrammarProcessor(state.matcher))
        if request.min_tokens and request.stop_tokens:
            length = len(request.tokens) - request.resumed_tokens + request.min_tokens
            state.processors.append(StopTokenBlocker(request.stop_tokens, length))
        return state
