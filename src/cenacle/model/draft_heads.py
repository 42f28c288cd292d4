"""What drafts from hidden states of the served model: the interface, and the layers of checkpoints.

Owns: `DraftHead`; `TokenHead`, which drafts one token after the other; the heads of layers for
multi-token prediction, whose models `mtp.py` describes.
Does not know: ranks, requests, what becomes of drafts.
Next: `engine/speculative/mtp.py`, which drafts with them; `eagle3.py` and `dflash.py`, the heads of
separate checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .mtp import FORMS, INPUT, decoder, find_embedding_name, language_model
from .zoo_drafters import ZOO_DRAFTERS


class DraftHead:
    """Drafts from the hidden states of the served model.

    Args:
        model: in memory.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def make_caches(self) -> list[Any]:
        """Empty ones, of one sequence."""
        return make_prompt_cache(self.model)

    def join(self, states: mx.array) -> mx.array:
        """The served model's states of tokens, as they were recorded, as the head reads them."""
        return states


class TokenHead(DraftHead, ABC):
    """Drafts one token after the other, each from the states that it gave for the last one."""

    def __call__(
        self,
        ids: mx.array,
        hidden: mx.array,
        caches: list[Any],
        places: Sequence[int] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Logits of what follows the last token, and the hidden states of all.

        Args:
            ids: [batch, length].
            hidden: of the tokens before each: joined ones of the served model, or what this
                returned; [batch, length, width].
            caches: of the head.
            places: of each row's last token, where some are padded; None: the final one.

        Returns:
            [batch, vocabulary] and [batch, length, width].
        """
        outputs, states = self.read(ids, hidden, caches)
        last = outputs[:, -1] if places is None else at_places(outputs, places)[:, 0]
        return self.score(last), states

    @abstractmethod
    def read(self, ids: mx.array, hidden: mx.array, caches: list[Any]) -> tuple[mx.array, mx.array]:
        """What `score` reads of each token, and the hidden states; see `__call__`."""

    @abstractmethod
    def score(self, outputs: mx.array) -> mx.array:
        """Logits of what follows: [batch, width] -> [batch, vocabulary]."""


def at_places(values: mx.array, places: Sequence[int]) -> mx.array:
    """One place of each row: [rows, length, width] -> [rows, 1, width]."""
    return mx.take_along_axis(values, mx.array(list(places))[:, None, None], axis=1)


class MtpHead(TokenHead):
    """A layer of the model's own kind.

    Args:
        model: loaded from `mtp_checkpoint`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._text, self._decoder = language_model(model), decoder(model)
        name = find_embedding_name(self._decoder)
        self._embed, self._input = self._decoder[name], _JoinedInput()
        self._decoder[name] = self._input
        self._absent: list[None] = []
        if hasattr(self._decoder, "ssm_idx"):  # of a layer with a state, which this has not
            self._decoder.ssm_idx, self._absent = -1, [None]

    def read(self, ids: mx.array, hidden: mx.array, caches: list[Any]) -> tuple[mx.array, mx.array]:
        """See `TokenHead`."""
        self._input.put(self._text[INPUT](self._embed(ids), hidden))
        states = self._decoder(ids, [*caches, *self._absent])
        return states, states

    def score(self, outputs: mx.array) -> mx.array:
        """See `TokenHead`."""
        head = self._text.lm_head if "lm_head" in self._text else self._embed.as_linear
        logits: mx.array = head(outputs)
        return logits


class _JoinedInput(nn.Module):
    """In the place of an embedding: returns what was put in, whatever the ids."""

    def __init__(self) -> None:
        super().__init__()
        self._value: mx.array | None = None  # MLX takes other names for weights

    def put(self, value: mx.array) -> None:
        """Of the next call."""
        self._value = value

    def __call__(self, ids: mx.array) -> mx.array:  # noqa: ARG002
        value, self._value = self._value, None
        assert value is not None
        return value


class ZooHead(TokenHead):
    """mlx-vlm's drafter.

    Args:
        model: loaded from `mtp_checkpoint`.
        family: of the model that is served.
    """

    def __init__(self, model: Any, family: str) -> None:
        super().__init__(model)
        self._forward = ZOO_DRAFTERS[family].forward

    def read(self, ids: mx.array, hidden: mx.array, caches: list[Any]) -> tuple[mx.array, mx.array]:
        """See `TokenHead`."""
        embedded = self.model.model.embed_tokens(ids)
        return self._forward(self.model.drafter, embedded, hidden, ids, caches)

    def score(self, outputs: mx.array) -> mx.array:
        """See `TokenHead`."""
        model = self.model
        head = model.lm_head if "lm_head" in model else model.model.embed_tokens.as_linear
        logits: mx.array = head(outputs)[..., : model.known_tokens]
        return logits


def make_mtp_head(model: Any, family: str) -> TokenHead:
    """Of a model that was loaded from `mtp_checkpoint`."""
    return ZooHead(model, family) if FORMS[family].is_zoo else MtpHead(model)
