"""EAGLE-3: a separate checkpoint whose layer drafts from hidden states of three layers.

Owns: its config, its modules, and the head that drafts with them.
Does not know: ranks, requests, what becomes of drafts.
How: `fc` joins the served model's hidden states of a token. The first layer's attention reads the
embedding of the token after it beside that; the layer's output takes the place of the served
model's states for the second drafted token. The layers are mlx-lm's of Llama, and their kernels.
The output head knows the most frequent tokens only: `d2t` says how far the id of each is from that
of the served model.
Two layouts are read: that of the authors, SGLang and ModelOpt (`LlamaForCausalLMEagle3`, with
`midlayer`), and that of speculators (`Eagle3Speculator`, with `layers.0`).
Source: Li et al., EAGLE-3 (2025), https://arxiv.org/abs/2503.01840.
Next: `engine/speculative/mtp.py`, which drafts with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask

from ..core.model_config import Config
from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .draft_heads import TokenHead
from .drafter_config import EAGLE3, MAX_LAYERS, Fit, FittingDrafter, ServedShape
from .families import Zoo
from .zoo import ModelClasses

_UNUSED = ("t2d", "verifier_", "rotary_emb")  # the beginnings of names of tensors, or parts
_QKV = ("q_proj", "k_proj", "v_proj")


def read_eagle3(draft: Checkpoint, served: ServedShape) -> FittingDrafter:
    """Check the config of a drafter; reads no weights.

    Raises:
        CheckpointError: it is damaged, or of a kind that is not supported.
        InputError: it was made for another model.
    """
    fit = Fit.read(draft, EAGLE3, served)
    tensors = {_rename(name): tensor for name, tensor in draft.tensors.items()}
    fit.require_numbers()
    fit.require_vocabulary()
    draft_vocab_size = fit.size("draft_vocab_size", served.vocab_size)
    if draft_vocab_size != served.vocab_size and "d2t" not in tensors:
        raise CheckpointError(
            f"{draft.folder}: expected a tensor d2t, since its {draft_vocab_size} token ids are "
            f"not the {served.vocab_size} of {served.name}, got none"
        )
    layers = _served_layers(fit, draft.config)
    width = fit.size("target_hidden_size", served.width)
    if width != served.width:
        raise fit.misfit(f"hidden states of {served.width}", str(width))
    fc, states = tensors.get("fc.weight"), width * len(layers)
    if fc is not None and fc.dtype != "U32" and fc.shape[-1:] != (states,):
        raise fit.misfit(
            f"fc.weight for {len(layers)} hidden states of {width}, [..., {states}]",
            str(list(fc.shape)),
        )
    hidden_size, has_embedding = fit.size("hidden_size"), "embed_tokens.weight" in tensors
    if not has_embedding and hidden_size != served.width:
        raise fit.misfit(
            f"an embedding of its own or a hidden_size of {served.width}", f"{hidden_size}"
        )
    if (count := fit.size("num_hidden_layers")) > MAX_LAYERS:
        raise fit.damage("num_hidden_layers", f"at most {MAX_LAYERS}", count)
    if (activation := fit.config.get("hidden_act", "silu")) != "silu":
        raise fit.damage("hidden_act", "silu, which alone is supported", activation)
    config = {
        **fit.config,
        "draft_vocab_size": draft_vocab_size,
        "states_size": states,
        "has_embedding": has_embedding,
        "has_map": "d2t" in tensors,
        "has_head": any(name.startswith("lm_head.") for name in tensors),
    }
    classes = ModelClasses(EAGLE3, Zoo.MLX_LM, Eagle3Model, Eagle3Arguments)
    return FittingDrafter(
        replace(draft, config=config), layers, classes, has_embedding, has_head=True
    )


def _served_layers(fit: Fit, config: Config) -> tuple[int, ...]:
    # Numbers at the top level are of layers that read what is recorded, those inside of layers that
    # give it: so vLLM and SGLang count, each for the layout that it introduced.
    if numbers := config.get("eagle_aux_hidden_state_layer_ids"):
        return fit.served_layers(numbers, first=1)
    inside = config.get("eagle_config")
    if isinstance(inside, dict) and (numbers := inside.get("eagle_aux_hidden_state_layer_ids")):
        return fit.served_layers(numbers)
    count = fit.served.layers
    if count < 6:
        raise fit.misfit("eagle_aux_hidden_state_layer_ids for so few layers", "none")
    return fit.served_layers([2, count // 2, count - 3], first=1)


def _rename(name: str) -> str:
    name = name.removeprefix("model.")
    return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name


@dataclass(frozen=True)
class Eagle3Arguments:
    """Of `Eagle3Model`.

    Args:
        layer: of each layer.
        states_size: width of the served model's hidden states of a token, together.
        draft_vocab_size: rows of the output head.
        has_embedding, has_head, has_map: whether the files have these.
        norm_before_fc: states go through a norm first.
        norm_before_residual: the first layer adds to its input behind the norm.
    """

    layer: llama.ModelArgs
    states_size: int
    draft_vocab_size: int
    has_embedding: bool
    has_head: bool
    has_map: bool
    norm_before_fc: bool
    norm_before_residual: bool

    @classmethod
    def from_dict(cls, config: Config) -> Eagle3Arguments:
        """Of the config of an `FittingDrafter`."""
        own = ("states_size", "draft_vocab_size", "has_embedding", "has_head", "has_map")
        return cls(
            layer=llama.ModelArgs.from_dict({**config, "layer_types": None}),
            norm_before_fc=bool(config.get("norm_before_fc")),
            norm_before_residual=bool(config.get("norm_before_residual")),
            **{key: config[key] for key in own},
        )


class Eagle3Model(nn.Module):
    """The layers of a drafter."""

    def __init__(self, args: Eagle3Arguments) -> None:
        super().__init__()
        layer = args.layer
        width, eps = layer.hidden_size, layer.rms_norm_eps
        self.fc = nn.Linear(args.states_size, width, bias=False)
        if args.norm_before_fc:
            self.input_norm = nn.RMSNorm(args.states_size, eps=eps)
        self.layers = [llama.TransformerBlock(layer) for _ in range(layer.num_hidden_layers)]
        first: Any = self.layers[0]
        first.hidden_norm = nn.RMSNorm(width, eps=eps)
        for name in _QKV:
            rows, has_bias = first.self_attn[name].weight.shape[0], "bias" in first.self_attn[name]
            first.self_attn[name] = nn.Linear(2 * width, rows, bias=has_bias)
        self.norm = nn.RMSNorm(width, eps=eps)
        if args.has_embedding:
            self.embed_tokens = nn.Embedding(layer.vocab_size, width)
        # Without one the embedding is the head too, if there can be no other.
        if args.has_head or not args.has_embedding or args.has_map:
            self.lm_head = nn.Linear(width, args.draft_vocab_size, bias=False)
        if args.has_map:
            self.d2t = mx.zeros((args.draft_vocab_size,), dtype=mx.int64)
        self._norm_before_residual = args.norm_before_residual

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of both layouts, by the names of this model."""
        renamed = {_rename(name): array for name, array in weights.items()}
        if "input_norm" not in self:
            renamed.pop("input_norm.weight", None)
        return {
            name: array
            for name, array in renamed.items()
            if not name.startswith(_UNUSED) and ".rotary_emb." not in name
        }

    def __call__(self, embeddings: mx.array, hidden: mx.array, caches: list[Any]) -> mx.array:
        """Of tokens, and of the tokens before them: [batch, length, width] twice -> the same."""
        mask = create_attention_mask(hidden, caches[0])
        first: Any = self.layers[0]
        normed = first.hidden_norm(hidden)
        read = mx.concatenate([first.input_layernorm(embeddings), normed], axis=-1)
        residual = normed if self._norm_before_residual else hidden
        states = residual + first.self_attn(read, mask, caches[0])
        states = states + first.mlp(first.post_attention_layernorm(states))
        for layer, cache in zip(self.layers[1:], caches[1:], strict=True):
            states = layer(states, mask, cache)
        return states


def read_token_ids(model: Any, folder: Path, vocab_size: int) -> mx.array | None:
    """The served model's id of each that the output head knows, [draft_vocab_size]; None: the same.

    Raises:
        CheckpointError: one is none of the served model's.
    """
    if "d2t" not in model:
        return None
    if not mx.issubdtype(model.d2t.dtype, mx.integer):
        raise CheckpointError(f"{folder}: d2t: expected integers, got {model.d2t.dtype}")
    try:
        offsets = np.asarray(model.d2t).astype(np.int64)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: reading the weights failed: {error}") from error
    ids = np.arange(len(offsets)) + offsets
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise CheckpointError(
            f"{folder}: d2t: expected token ids from 0 to {vocab_size - 1}, got {wrong[0]}; the "
            f"drafter is damaged or was made for another model"
        )
    return mx.array(ids.astype(np.int32))


class Eagle3Head(TokenHead):
    """A drafter in memory.

    Args:
        model: loaded, its layers as they are.
        embedding: of the served model, for a drafter without its own.
        token_ids: see `read_token_ids`.
        vocab_size: number of the served model's token ids.
    """

    def __init__(
        self,
        model: Any,
        embedding: nn.Module | None,
        token_ids: mx.array | None,
        vocab_size: int,
    ) -> None:
        super().__init__(model)
        self._embed: Any = model.embed_tokens if "embed_tokens" in model else embedding
        self._token_ids, self._vocab_size = token_ids, vocab_size

    def join(self, states: mx.array) -> mx.array:
        """The served model's states of tokens, [..., layers * width], as the first layer reads
        them, [..., width]."""
        if "input_norm" in self.model:
            states = self.model.input_norm(states)
        joined: mx.array = self.model.fc(states)
        return joined

    def read(self, ids: mx.array, hidden: mx.array, caches: list[Any]) -> tuple[mx.array, mx.array]:
        """See `TokenHead`."""
        states = self.model(self._embed(ids), hidden, caches)
        return states, states

    def score(self, outputs: mx.array) -> mx.array:
        """See `TokenHead`."""
        outputs = self.model.norm(outputs)
        head = self.model.lm_head if "lm_head" in self.model else self._embed.as_linear
        known: mx.array = head(outputs)
        if self._token_ids is None:
            return known
        logits = mx.full((known.shape[0], self._vocab_size), -mx.inf, dtype=known.dtype)
        logits[:, self._token_ids] = known
        return logits
