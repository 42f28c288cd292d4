"""Layers for multi-token prediction that mlx-vlm's drafters compute, as models of one layer.

Owns: which families have such a drafter, and how it is called; `drafter_classes`.
Does not know: names in checkpoints (`mtp.py`), ranks, requests.
How: a drafter of mlx-vlm is the layer, with its norms and what joins its inputs; beside it are an
embedding and an output head. Its tensors lie below `LAYER`, under the names that follow the prefix
in the file; the drafter's own conversion does the rest.
Invariant: mlx-vlm is imported only for a config that asks for a drafter.
Next: `mtp.py`, which reads such a model; `draft_heads.py`, which calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.model_config import Config, text_config
from ..extras import import_extra
from .zoo_caches import as_mlx_lm_caches

PREFIX_KEY = "_draft_prefix"
"""Of a config: build its family's drafter, whose tensors have this prefix in published files."""
LAYER = "model.layers.0."
NORM = "model.norm."  # of the served model, where the drafter has none

Forward = Callable[[Any, mx.array, mx.array, mx.array, list[Any]], tuple[mx.array, mx.array]]
"""A drafter, embeddings of tokens [batch, length, width], hidden states of the tokens before them,
the tokens [batch, length], and caches -> what the output head reads, and the states."""


def _forward(
    drafter: Any, embedded: mx.array, hidden: mx.array, ids: mx.array, caches: list[Any]
) -> tuple[mx.array, mx.array]:
    drafter._next_position = caches[0].offset  # where its rotary positions are not the cache's
    head_input, states = drafter._forward_hidden(embedded, hidden, ids, caches)
    return head_input, states


def _forward_hy_v4(
    drafter: Any,
    embedded: mx.array,
    hidden: mx.array,
    ids: mx.array,  # noqa: ARG001
    caches: list[Any],
) -> tuple[mx.array, mx.array]:
    states = drafter._forward_hidden(embedded, hidden, caches, None)
    return states, states


def _forward_glm5_next(
    drafter: Any, embedded: mx.array, hidden: mx.array, ids: mx.array, caches: list[Any]
) -> tuple[mx.array, mx.array]:
    drafter._next_position = 1  # it reads no token at place 0, and its caches begin later
    head_input, states = drafter._forward_hidden(embedded, hidden, ids, caches)
    return head_input, states


def _forward_inkling(
    drafter: Any, embedded: mx.array, hidden: mx.array, ids: mx.array, caches: list[Any]
) -> tuple[mx.array, mx.array]:
    drafter._input_embed, drafter._cache = lambda _: embedded, caches
    states = drafter._forward_seq(ids, hidden, 0, ids.dtype)
    return drafter.norm(states) / drafter._mup, states


def _forward_deepseek_v4(
    drafter: Any, embedded: mx.array, hidden: mx.array, ids: mx.array, caches: list[Any]
) -> tuple[mx.array, mx.array]:
    drafter._next_position = None  # then each cache's own
    head_input, streams = drafter._forward_hidden(embedded, hidden, ids, caches)
    return head_input, streams.reshape(*streams.shape[:2], -1)


@dataclass(frozen=True)
class ZooDrafter:
    """How mlx-vlm's drafter of a family is called.

    Args:
        forward: see `Forward`.
        layers: the decoder layers of a drafter.
        published: beginnings of its parameters' names, and what files have instead.
        streams: the module of the served model whose input it reads; "": it reads hidden states
            behind the final norm, or before it, as the model's decoder gives them.
        settings: keys of its config.
        has_models_norm: its last norm is that of the served model.
    """

    forward: Forward = _forward
    layers: Callable[[Any], list[nn.Module]] = lambda drafter: [drafter.decoder]
    published: tuple[tuple[str, str], ...] = ()
    streams: str = ""
    settings: Config = field(default_factory=dict)
    has_models_norm: bool = False

    def name_in_files(self, name: str) -> str:
        """What follows the prefix in a file, of a parameter of the drafter."""
        for own, published in self.published:
            if name.startswith(own):
                return published + name.removeprefix(own)
        return name


ZOO_DRAFTERS = {
    "deepseek_v4": ZooDrafter(
        _forward_deepseek_v4,
        published=(
            ("decoder.attn_hc.", "hc_attn_"),
            ("decoder.ffn_hc.", "hc_ffn_"),
            ("decoder.ffn.gate.e_score_correction_bias", "ffn.gate.bias"),
            ("decoder.", ""),
            ("hc_head.", "hc_head_"),
        ),
        streams="hc_head",
    ),
    "glm5_next": ZooDrafter(
        _forward_glm5_next,
        layers=lambda drafter: [drafter.mtp_block],
        published=(("mtp_block.", ""), ("shared_head_norm.", "shared_head.norm.")),
    ),
    "hy_v4": ZooDrafter(
        _forward_hy_v4, published=(("decoder.", ""), ("norm.", "final_layernorm."))
    ),
    "inkling": ZooDrafter(
        _forward_inkling,
        layers=lambda drafter: [block.transformer_block for block in drafter.blocks],
        published=(("blocks.0.", ""),),
        settings={"num_mtp_layers": 1},
        has_models_norm=True,
    ),
    "qwen4_exp": ZooDrafter(
        layers=lambda drafter: drafter.layers, streams="hyper_connection_mixer"
    ),
}


def drafter_classes(family: str) -> tuple[type[nn.Module], Any]:
    """The class of a family's model of one layer, and of its arguments, in mlx-lm's form.

    Raises:
        InputError: mlx-vlm is not installed.
    """
    kind = type("DraftLayer", (DraftLayer,), {"_family": family})
    return kind, SimpleNamespace(from_dict=lambda config: (config, _splitter(config)))


def _splitter(config: Config) -> Any:
    """What mlx-vlm knows of a family's drafter."""
    return import_extra("mlx_vlm.speculative.drafters.mtp_split", "vlm").get_mtp_splitter(
        source_config=config
    )


class DraftLayer(nn.Module):
    """A drafter of mlx-vlm with an embedding and an output head.

    Args:
        arguments: a config with `PREFIX_KEY`, and what mlx-vlm knows of the drafter.
    """

    _family: str

    def __init__(self, arguments: tuple[Config, Any]) -> None:
        super().__init__()
        config, splitter = arguments
        self._prefix, self._splitter = config[PREFIX_KEY], splitter
        self._text = splitter.read_text_config(config) | ZOO_DRAFTERS[self._family].settings
        kind = splitter.draft_model_cls
        arguments_of = kind.__init__.__annotations__["config"].from_dict
        drafter = kind(arguments_of({"text_config": self._text}))
        vocab_size, width = (text_config(config)[key] for key in ("vocab_size", "hidden_size"))
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab_size, width)
        self.model.layers = [drafter]
        if not self._text.get("tie_word_embeddings"):
            self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.eval()

    @property
    def drafter(self) -> Any:
        """mlx-vlm's."""
        return self.model.layers[0]

    @property
    def known_tokens(self) -> int | None:
        """Ids that it may draft; None: all."""
        count: int | None = getattr(self.drafter, "_uv", None)
        return count

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return ZOO_DRAFTERS[self._family].layers(self.drafter)

    def make_cache(self) -> list[Any]:
        """A cache for each layer; mlx-vlm's own, if it rotates: that can be taken back."""
        caches: list[Any] = self.drafter.make_cache()
        converted = as_mlx_lm_caches(caches)
        return caches if any(hasattr(cache, "max_size") for cache in caches) else converted

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """As mlx-vlm converts the layer's tensors."""
        inside = {
            self._prefix + name.removeprefix(LAYER): array
            for name, array in weights.items()
            if name.startswith(LAYER)
        }
        renamed = self._splitter.rename(inside, self._text)
        converted = self._splitter.run_sanitize(renamed, self._text)
        shared = {
            f"{LAYER}{n.removeprefix('model.')}" if n.startswith(NORM) else n: array
            for n, array in weights.items()
            if not n.startswith(LAYER)
        }
        return shared | {LAYER + name: array for name, array in converted.items()}
