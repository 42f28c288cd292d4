"""Requests and the tokens they produce.

Owns: `Request`, `Sampling`, `TokenEvent`, `PromptLogprobs`: plain data with a JSON form, and the
checks of their fields.
Does not know: tokenizers, MLX, sockets, time.
Invariant: a `Request` that exists is valid; its constructor raises otherwise.
Next: `step.py`; `scheduler/scheduler.py` turns requests into steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import CenacleError, InputError
from .image import PromptImage, cache_tokens

MAX_LOGPROBS = 20  # OpenAI's limit for top_logprobs
MAX_COUNT = 2**31 - 1  # what ranks and MLX can take as a number of tokens, or as a token's id


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits. The defaults are greedy.

    Args:
        temperature: 0 (greedy) to 2.
        top_p: nucleus sampling, in (0, 1].
        top_k: 0 keeps every token; at most `MAX_COUNT`.
        min_p: minimum probability relative to the best token's, from 0 to 1.
        seed: None picks a random seed. With the same seed, the text does not depend on the number
            of nodes.
        repetition_penalty: above 0, at most 10; 1 disables it.
        presence_penalty, frequency_penalty: from -2 to 2.
        repetition_context_size, presence_context_size, frequency_context_size: over how many of
            the last tokens, the prompt's included, each penalty counts; -1: all; 0: no penalty.
        logit_bias: token id -> value from -100 to 100, added to that token's logit.

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
    repetition_context_size: int = 20  # mlx-lm's
    presence_context_size: int = 20
    frequency_context_size: int = 20

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0, 2)
        _check_range("top_p", self.top_p, 0, 1, exclude_low=True)
        _check_range("top_k", self.top_k, 0, MAX_COUNT, integer=True)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0, 10, exclude_low=True)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        for name in ("repetition", "presence", "frequency"):
            size = f"{name}_context_size"
            _check_range(size, getattr(self, size), -1, MAX_COUNT, integer=True)
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**63 - 1, integer=True)
        for token, bias in self.logit_bias.items():
            _check_range("logit_bias", token, 0, MAX_COUNT, integer=True)
            _check_range("logit_bias", bias, -100, 100)


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        id: unique among the requests of a group.
        tokens: token ids of the prompt, at least one.
        max_tokens: limit of generated tokens, 1 to `MAX_COUNT`.
        stop_tokens: token ids that end the output.
        sampling: see `Sampling`.
        logprobs: number of alternatives to report with each token's log-probability, 0 to
            `MAX_LOGPROBS`. None reports no log-probabilities.
        grammar: llguidance grammar (JSON) that the output must match; None: unconstrained.
        key: the client's key. Requests of different keys share the group fairly.
        min_tokens: how many tokens are generated before one of `stop_tokens` may be, unless the
            grammar leaves no other.
        prompt_logprobs: like `logprobs`, for the tokens of the prompt but the first.
        resumed_tokens: how many of the last `tokens` are output that a group produced before it
            was restarted. Sampling, penalties and the grammar continue behind them.
        images: of the prompt, in order; the tokens in their places are the same whatever they show.

    Raises:
        InputError: names the field that is out of range.
    """

    id: str
    tokens: tuple[int, ...]
    max_tokens: int
    stop_tokens: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    grammar: str | None = None
    key: str = ""
    resumed_tokens: int = 0
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    images: tuple[PromptImage, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InputError("prompt: expected at least one token, got none", "prompt")
        _check_range("max_tokens", self.max_tokens, 1, MAX_COUNT, integer=True)
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _check_range(name, count, 0, MAX_LOGPROBS, integer=True)
        _check_range("resumed_tokens", self.resumed_tokens, 0, len(self.tokens) - 1, integer=True)
        _check_range("min_tokens", self.min_tokens, 0, MAX_COUNT, integer=True)
        free = 0
        for image in self.images:
            if not (free <= image.begin < image.end < len(self.tokens)):
                raise InputError(
                    f"images: expected them in order, and text behind the last, got tokens "
                    f"{image.begin} to {image.end} of {len(self.tokens)}",
                    "images",
                )
            free = image.end

    @cached_property
    def cache_tokens(self) -> tuple[int, ...]:
        """`tokens`, and what the images show in the place of theirs."""
        return cache_tokens(self.tokens, self.images, self.id)

    def resumed_with(self, generated_tokens: Sequence[int]) -> Request:
        """The rest of this request after the output so far."""
        return replace(
            self,
            tokens=(*self.tokens, *generated_tokens),
            max_tokens=self.max_tokens - len(generated_tokens),
            resumed_tokens=self.resumed_tokens + len(generated_tokens),
            # They came before the first token.
            prompt_logprobs=None if generated_tokens else self.prompt_logprobs,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads, without the pixels of images."""
        images = [image.to_json() for image in self.images]
        return asdict(replace(self, images=())) | {"images": images}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """Inverse of `to_json`. JSON turns tuples into lists and integer keys into strings."""
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
            data["resumed_tokens"],
            data["min_tokens"],
            data["prompt_logprobs"],
            tuple(PromptImage(*image) for image in data["images"]),
        )


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    Args:
        request_id: the request that it belongs to.
        token: token id.
        finish: None while the request continues, else "stop" (a stop token), "length", or "error"
            (the grammar could not be followed to its end; the token is not part of the output).
        logprob: natural log-probability before temperature and filters; None unless requested.
        top: the most probable token ids with their log-probabilities, best first.
        cached_tokens: with a request's first token: prompt tokens that came from the prefix cache.
        disk_tokens: how many of those were read from disk for this request.
    """

    request_id: str
    token: int
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    cached_tokens: int = 0
    disk_tokens: int = 0

    def to_json(self) -> list[Any]:
        """The values of the fields, as a rank sends them."""
        return [
            *(self.request_id, self.token, self.finish, self.logprob, self.top),
            *(self.cached_tokens, self.disk_tokens),
        ]

    @classmethod
    def from_json(cls, data: list[Any]) -> TokenEvent:
        """Inverse of `to_json`.

        Raises:
            ValueError: not such a list. Log-probabilities may be infinite or NaN.
        """
        request_id, token, finish, logprob, top, cached_tokens, disk_tokens = data
        pairs = tuple((token_id, value) for token_id, value in top)
        integers = [token, cached_tokens, disk_tokens, *(token_id for token_id, _ in pairs)]
        numbers = [value for value in (logprob, *(v for _, v in pairs)) if value is not None]
        if not (
            isinstance(request_id, str)
            and isinstance(finish, str | None)
            and all(type(value) is int for value in integers)
            and all(type(value) in (int, float) for value in numbers)
        ):
            raise ValueError(f"expected the fields of a token event, got {data}")
        return cls(request_id, token, finish, logprob, pairs, cached_tokens, disk_tokens)

    def outcome(self) -> TokenEvent | InputError:
        """The event itself, or the error that it stands for."""
        if self.finish != "error":
            return self
        return InputError(
            "grammar: expected one that can be followed to the end of the output, but llguidance "
            "reached an internal limit; simplify the grammar",
            "grammar",
        )


@dataclass(frozen=True)
class PromptLogprobs:
    """The log-probabilities of some of a prompt's tokens. Those of all tokens but the first come in
    order, before the first generated token; after a restart of the group they may come again.

    Args:
        request_id: the request that they belong to.
        begin: position of the first one in the prompt, at least 1.
        logprobs: natural log-probability of each token.
        ranks: of each token among all, by probability; 1: the most probable.
        top: at each position the most probable token ids with their log-probabilities, best first.
    """

    request_id: str
    begin: int
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def end(self) -> int:
        """Position after the last one."""
        return self.begin + len(self.logprobs)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PromptLogprobs:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: not such an object.
        """
        top = tuple(tuple((token, value) for token, value in row) for row in data["top"])
        logprobs, ranks = tuple(data["logprobs"]), tuple(data["ranks"])
        counts = [data["begin"], *ranks, *(token + 1 for row in top for token, _ in row)]
        numbers = [*logprobs, *(value for row in top for _, value in row)]
        if not (
            isinstance(data["request_id"], str)
            and all(type(count) is int and count >= 1 for count in counts)
            and all(type(number) in (int, float) for number in numbers)
            and len(logprobs) == len(ranks) == len(top)
        ):
            raise ValueError("expected the log-probabilities of prompt tokens")
        return cls(data["request_id"], data["begin"], logprobs, ranks, top)


GroupEvent = TokenEvent | PromptLogprobs | CenacleError
"""What a group tells of a request."""


def _check_range(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    exclude_low: bool = False,
    integer: bool = False,
) -> None:
    noun = "an integer" if integer else "a number"
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        raise InputError(f"{name}: expected {noun}, got {value!r:.80}", name)
    if (low < value if exclude_low else low <= value) and value <= high:
        return
    limits = f"above {low}, at most {high}" if exclude_low else f"from {low} to {high}"
    shown = f"{value}" if abs(value) < 1e30 else "a larger one"  # it may have thousands of digits
    raise InputError(f"{name}: expected {noun} {limits}, got {shown}", name)
