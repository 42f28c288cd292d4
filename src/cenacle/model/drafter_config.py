"""Checkpoints that draft for one other model: which form one has, and whether it fits.

Owns: recognizing a form by config.json, and the checks that all forms share.
Does not know: modules, weights, ranks, what becomes of drafts.
Such a checkpoint has a few layers, which read hidden states of some layers of the served model. It
is made for that model: its width, its number of layers and its token ids.
Next: `eagle3.py` and `dflash.py`, the forms that are supported, and
`engine/speculative/draft_model.py`, which asks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.model_config import (
    HIDDEN_SIZE_KEYS,
    LAYER_COUNT_KEYS,
    VOCAB_SIZE_KEYS,
    Config,
    find_int,
    text_config,
)
from ..errors import CheckpointError, InputError
from .architecture import complete_config
from .checkpoint import Checkpoint
from .zoo import ModelClasses

EAGLE3, DFLASH, DSPARK = "EAGLE-3", "DFlash", "DSpark"
SUPPORTED = f"an ordinary language model with the same tokenizer, {EAGLE3}, {DFLASH} or {DSPARK}"

MAX_LAYERS = 64  # of a drafter, or of the served model's that it reads

# Of names in config.json; the first that matches.
_FORMS = (
    (re.compile(r"p.?eagle"), "P-EAGLE"),
    (re.compile(r"eagle.?3"), EAGLE3),
    (re.compile(r"eagle(?!.*vl)"), "EAGLE"),
    (re.compile(r"dspark"), DSPARK),
    (re.compile(r"dflash.?2"), "DFlash2"),
    (re.compile(r"dflash"), DFLASH),
    (re.compile(r"medusa"), "Medusa"),
    (re.compile(r"mlp_?speculator"), "MLP speculator"),
    (re.compile(r"\w+_mtp|\w*mtpmodel"), "multi-token prediction layer"),
    (re.compile(r"\w+_assistant|\w*assistantforcausallm"), "assistant"),
)


def find_form(config: Config) -> str | None:
    """The form of a checkpoint that drafts for one other model; None: it is an ordinary model."""
    kinds, inner = config.get("architectures"), config.get("dflash_config")
    names = [
        *(kinds if isinstance(kinds, list) else []),
        config.get("speculators_model_type"),
        config.get("model_type"),
        inner.get("projector_type") if isinstance(inner, dict) else None,
        DSPARK if isinstance(inner, dict) and "markov_rank" in inner else None,
        *(key for key in ("dspark_config", "dflash_config") if key in config),
    ]
    texts = [name.lower() for name in names if isinstance(name, str)]
    for pattern, form in _FORMS:
        if any(pattern.search(text) for text in texts):
            return form
    return None


@dataclass(frozen=True)
class ServedShape:
    """What a drafter must fit.

    Args:
        name: of the served model, for people.
        width: of its hidden states.
        layers: how many it has.
        vocab_size: number of its token ids.
    """

    name: str
    width: int
    layers: int
    vocab_size: int

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> ServedShape:
        """Of a checkpoint's config."""
        text = text_config(checkpoint.config)
        keys = HIDDEN_SIZE_KEYS, LAYER_COUNT_KEYS, VOCAB_SIZE_KEYS
        width, layers, vocab_size = (find_int(text, k) or 0 for k in keys)
        return cls(checkpoint.folder.name, width, layers, vocab_size)


@dataclass(frozen=True)
class FittingDrafter:
    """A drafter that fits.

    Args:
        checkpoint: its files, with a config that the arguments of its classes read.
        layers: of the served model, whose outputs it reads, ascending.
        classes: of its layers.
        has_embedding, has_head: False: it uses the served model's.
        longest: how many tokens it drafts at most; None: any number.
    """

    checkpoint: Checkpoint
    layers: tuple[int, ...]
    classes: ModelClasses
    has_embedding: bool
    has_head: bool
    longest: int | None = None


@dataclass(frozen=True)
class Fit:
    """A drafter's config beside the model that it is to draft for.

    Args:
        folder: of the drafter.
        form: see `find_form`.
        config: of its layers, with the names that mlx-lm looks for.
        served: the model.
    """

    folder: Path
    form: str
    config: Config
    served: ServedShape

    @classmethod
    def read(cls, draft: Checkpoint, form: str, served: ServedShape) -> Fit:
        """Of a drafter's checkpoint, whose layers may have a config of their own."""
        layer = draft.config.get("transformer_layer_config")
        if isinstance(layer, dict):
            config = {**draft.config, **complete_config(layer), "model_type": "llama"}
        else:
            config = {**draft.config, "model_type": "llama"}
        return cls(draft.folder, form, config, served)

    def misfit(self, expected: str, got: str) -> InputError:
        """The error of a drafter that was made for another model."""
        return InputError(
            f"draft_model: {self.folder.name} ({self.form}) cannot draft for {self.served.name}: "
            f"expected {expected}, got {got}; use the drafter that was made for this model",
            "draft_model",
        )

    def damage(self, key: str, expected: str, got: Any) -> CheckpointError:
        """The error of a value of config.json that cannot be."""
        return CheckpointError(
            f"{self.folder}: config.json: {key}: expected {expected}, got {got!r:.100}"
        )

    def size(self, key: str, default: int | None = None) -> int:
        """A positive number of the config.

        Raises:
            CheckpointError: it is something else, or missing without a default.
        """
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.damage(key, "a positive integer", value)
        return value

    def require_numbers(self) -> None:
        """What scales positions and norms are positive numbers.

        Raises:
            CheckpointError: one is not.
        """
        for key in ("rope_theta", "rms_norm_eps"):
            value = self.config.get(key, 1.0)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise self.damage(key, "a positive number", value)

    def require_vocabulary(self) -> None:
        """Token ids are those of the served model.

        Raises:
            InputError: they are not.
        """
        if (size := self.size("vocab_size")) != self.served.vocab_size:
            raise self.misfit(f"{self.served.vocab_size} token ids", str(size))

    def served_layers(self, numbers: Any, first: int = 0) -> tuple[int, ...]:
        """Layers of the served model whose outputs are read, ascending, from 0.

        Args:
            numbers: as the config has them.
            first: the number of the first layer there.

        Raises:
            CheckpointError: they are no numbers of different layers.
            InputError: the served model has no such layers.
        """
        is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
        if not (
            is_list
            and 0 < len(numbers) <= MAX_LAYERS
            and all(type(n) is int for n in numbers)
            and len(set(numbers)) == len(numbers)
        ):
            raise self.damage("layers of the served model", "numbers of different layers", numbers)
        last = self.served.layers - 1 + first
        if min(numbers) < first or max(numbers) > last:
            raise self.misfit(f"numbers of layers from {first} to {last}", str(list(numbers)))
        return tuple(sorted(n - first for n in numbers))
