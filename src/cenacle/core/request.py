"""What travels: requests into the group, steps to every rank, events back.

Owns: the messages and the rules their fields obey; each is plain data with a JSON form.
Does not know: tokenizers, MLX, sockets, time.
Invariant: a `Request` that exists is valid (its constructor raises otherwise).
Next: `engine/scheduler.py` turns requests into steps, `engine/engine.py` carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import InputError

MAX_LOGPROBS = 20  # OpenAI's limit of top_logprobs


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits; the defaults are greedy.

    Args:
        temperature: 0 is greedy; at most 2.
        top_p: nucleus, in (0, 1].
        top_k: 0 keeps every token.
        min_p: least probability relative to the best token's, in [0, 1).
        seed: None draws a fresh one; the same seed gives the same text on any number of nodes.
        repetition_penalty: 1 is none; must be positive.
        presence_penalty, frequency_penalty: from -2 to 2.
        logit_bias: from -100 to 100, added to the logits of single token ids.

    Raises:
        InputError: names the field that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 2)
        _within("top_p", self.top_p, 0, 1, above=True)
        _within("top_k", self.top_k, 0, float("inf"), whole=True)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0, 10, above=True)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1, whole=True)
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100, 100)


@dataclass(frozen=True)
class Request:
    """One prompt to be continued.

    Args:
        id: unique among the requests of a group.
        tokens: the prompt's ids, at least one.
        max_tokens: most tokens to generate, at least one.
        stop_tokens: ids that end the answer.
        sampling: see `Sampling`.
        logprobs: how many alternatives to report with each token's own log-probability, 0 to
            `MAX_LOGPROBS`; None: no log-probabilities at all.
        grammar: what the answer must match, as llguidance reads it (JSON); None: anything.
        key: on whose account it runs; requests of different keys share the group fairly.
        answered: how many of the last of `tokens` are answer tokens that were given already: the
            group was formed again in the middle of this answer. What is drawn, penalised or
            matched goes on behind them.
    """

    id: str
    tokens: tuple[int, ...]
    max_tokens: int
    stop_tokens: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    grammar: str | None = None
    key: str = ""
    answered: int = 0

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InputError("prompt: expected at least one token, got none", "prompt")
        if self.max_tokens < 1:
            raise InputError(
                f"max_tokens: expected at least 1, got {self.max_tokens}", "max_tokens"
            )
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS, whole=True)
        _within("answered", self.answered, 0, len(self.tokens) - 1, whole=True)

    def after(self, given: Sequence[int]) -> Request:
        """What is left of this request when `given` are the answer's tokens so far."""
        return replace(
            self,
            tokens=(*self.tokens, *given),
            max_tokens=self.max_tokens - len(given),
            answered=self.answered + len(given),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """Read what `to_json` gave (JSON makes lists of tuples and strings of keys)."""
        sampling = dict(data["sampling"])
        sampling["logit_bias"] = {int(k): v for k, v in sampling["logit_bias"].items()}
        return cls(
            data["id"],
            tuple(data["tokens"]),
            data["max_tokens"],
            tuple(data["stop_tokens"]),
            Sampling(**sampling),
            data["logprobs"],
            data["grammar"],
            data["key"],
            data["answered"],
        )


@dataclass(frozen=True)
class TokenEvent:
    """One token of one request.

    Args:
        request: the request's id.
        token: the id that was chosen.
        finish: None while it goes on, else "stop" (a stop token), "length", or "error" (its grammar
            could not be followed to the end; the token is no part of the answer).
        logprob: natural logarithm of the probability that the model gave the token, before
            temperature and filters; None unless asked for.
        top: the most probable ids with their log-probabilities, best first, as many as asked for.
        cached: with a request's first token: how many of its prompt's tokens were not computed
            because their cache was still there.
        read: how many of those were read from disk for this request.
    """

    request: str
    token: int
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    cached: int = 0
    read: int = 0

    @classmethod
    def from_json(cls, data: list[Any]) -> TokenEvent:
        """Read a list of the fields' values, as a rank sends it."""
        event = cls(*data)
        return replace(event, top=tuple((i, p) for i, p in event.top))

    def outcome(self) -> TokenEvent | InputError:
        """What whoever asked is told: the token, or why there is no answer."""
        if self.finish != "error":
            return self
        return InputError(
            "grammar: expected one that can be followed to the end of the answer, but llguidance "
            "reached a limit of its own in the middle of it; simplify the grammar",
            "grammar",
        )


def _within(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    above: bool = False,
    whole: bool = False,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name}: expected a number, got {value!r}", name)
    if whole and not isinstance(value, int):
        raise InputError(f"{name}: expected a whole number, got {value!r}", name)
    if not (low < value if above else low <= value) or not value <= high:
        bracket = "above" if above else "from"
        raise InputError(f"{name}: expected {bracket} {low} to {high}, got {value}", name)
