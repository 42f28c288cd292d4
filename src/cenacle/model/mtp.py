"""Multi-token prediction: the layer behind the last one, which drafts the token after the next.

Owns: which tensors of a checkpoint are of such a layer; the layer as a small model of its own.
Does not know: ranks, requests, what becomes of drafts.
The form is that of DeepSeek and GLM: layer `num_hidden_layers` is a decoder layer like the others,
before it `eh_proj` joins the embedding of a token and the hidden state of the token before, each
behind a norm. Norm, head and embedding are the model's own where the layer brings none.
How: the layer is read as a checkpoint of one layer with the same config, so that conversions,
formats and kernels are those of the family.
Source: DeepSeek-V3 Technical Report (2024), section 2.2.
Next: `engine/speculative/mtp.py`, which drafts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.model_config import Config
from .checkpoint import Checkpoint
from .config_file import read_quantization_settings
from .families import family_of, layer_index
from .format_recognition import find_quantized_layers

MTP_FAMILIES = ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa")
"""Families whose published checkpoints have such a layer, and whose caches can drop drafts."""

_OWN = {
    "eh_proj": "mtp.eh_proj",
    "enorm": "mtp.enorm",
    "hnorm": "mtp.hnorm",
    "shared_head.norm": "model.norm",
    "shared_head.head": "lm_head",
    "embed_tokens": "model.embed_tokens",
}
_SHARED = ("model.embed_tokens.", "lm_head.", "model.norm.")


def is_mtp_tensor(name: str, family: str, config: Config) -> bool:
    """Whether a tensor of a checkpoint is of a layer behind the model's last one."""
    layer = layer_index(name) if family in MTP_FAMILIES else None
    return layer is not None and layer >= config["num_hidden_layers"]


def has_mtp(checkpoint: Checkpoint, family: str) -> bool:
    """Whether a checkpoint has a layer that drafts, in the form that is read here."""
    if family not in MTP_FAMILIES or checkpoint.gguf is not None:
        return False
    prefix = f"model.layers.{checkpoint.config['num_hidden_layers']}."
    needed = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "input_layernorm.weight")
    return all(prefix + name in checkpoint.tensors for name in needed)


def mtp_checkpoint(checkpoint: Checkpoint, family: str) -> Checkpoint:
    """The first of a checkpoint's layers that draft, as a checkpoint of a model of one layer."""
    names = _rename(checkpoint)
    tensors = {
        new: replace(tensor, name=new)
        for old, tensor in checkpoint.tensors.items()
        if (new := names.get(old)) is not None
    }
    prefix = f"model.layers.{checkpoint.config['num_hidden_layers']}."
    config = {**checkpoint.config, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            config[key] = {
                _rename_path(name, prefix) if name.startswith(prefix) else name: value
                for name, value in config[key].items()
            }
    settings = read_quantization_settings(checkpoint.folder, checkpoint.config)
    quantized = find_quantized_layers(
        str(checkpoint.folder), tensors, config, settings, family_of(family).own_formats
    )
    return replace(checkpoint, config=config, tensors=tensors, quantized=quantized, renamed=names)


def _rename(checkpoint: Checkpoint) -> dict[str, str]:
    prefix = f"model.layers.{checkpoint.config['num_hidden_layers']}."
    names: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name.startswith(prefix):
            path, _, leaf = name.rpartition(".")
            names[name] = f"{_rename_path(path, prefix)}.{leaf}"
    own = set(names.values())
    for shared in _SHARED:
        if not any(name.startswith(shared) for name in own):
            names |= {name: name for name in checkpoint.tensors if name.startswith(shared)}
    return names


def _rename_path(path: str, prefix: str) -> str:
    inside = path.removeprefix(prefix)
    return _OWN.get(inside, f"model.layers.0.{inside}")


class MtpInput(nn.Module):
    """Joins what a layer that drafts reads.

    Args:
        width: of a hidden state.
        eps: of the norms.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(width, eps=eps)
        self.hnorm = nn.RMSNorm(width, eps=eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)

    def __call__(self, embeddings: mx.array, hidden: mx.array) -> mx.array:
        """Of tokens, and of the tokens before them: [batch, length, width] twice -> the same."""
        joined = mx.concatenate([self.enorm(embeddings), self.hnorm(hidden)], axis=-1)
        return self.eh_proj(joined)


@cache
def with_mtp_input(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a model of one layer, with `mtp`, which makes its input."""

    def build(self: Any, arguments: Any) -> None:
        base.__init__(self, arguments)  # type: ignore[call-arg]
        self.mtp = MtpInput(arguments.hidden_size, arguments.rms_norm_eps)

    return type(base.__name__, (base,), {"__init__": build})


class _Given(nn.Module):
    """In the place of an embedding: returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self._value: mx.array | None = None

    def give(self, value: mx.array) -> None:
        self._value = value

    def __call__(self, ids: mx.array) -> mx.array:  # noqa: ARG002
        value, self._value = self._value, None
        assert value is not None
        return value


class MtpHead:
    """A layer that drafts, in memory.

    Args:
        model: loaded from `mtp_checkpoint`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._embed, self._given = model.model.embed_tokens, _Given()
        model.model.embed_tokens = self._given

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
            hidden: of the tokens before each, behind the final norm, [batch, length, width].
            caches: of the layer.
            places: of each row's last token, where some are padded; None: the final one.

        Returns:
            [batch, vocabulary] and [batch, length, width].
        """
        self._given.give(self.model.mtp(self._embed(ids), hidden))
        states = self.model.model(ids, caches)
        last = states[:, -1] if places is None else at_places(states, places)[:, 0]
        return self.model.lm_head(last), states


def at_places(values: mx.array, places: Sequence[int]) -> mx.array:
    """One place of each row: [rows, length, width] -> [rows, 1, width]."""
    return mx.take_along_axis(values, mx.array(list(places))[:, None, None], axis=1)


RecordStates = Callable[[mx.array], None]
"""Called with hidden states behind the final norm, [batch, length, width]."""


def record_hidden_states(model: Any, record: RecordStates) -> None:
    """Have a model tell the hidden states of each pass, in place."""
    inner = model.model
    kind = type(inner)

    def call(self: Any, *args: Any, **keywords: Any) -> mx.array:
        states: mx.array = kind.__call__(self, *args, **keywords)
        record(states)
        return states

    inner.__class__ = type(kind.__name__, (kind,), {"__call__": call})
