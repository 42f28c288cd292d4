"""DFlash and DSpark: separate checkpoints whose layers draft a block of tokens in one pass.

Owns: their config, their modules, and the head that drafts with them.
Does not know: ranks, requests, what becomes of drafts.
How: the served model's hidden states of some layers, joined by `fc`, are what attention looks at:
keys and values of each token of the text, kept in a cache. A block is the last token and a mask
token for each that is to be drafted; its queries see the text and the whole block. Embedding and
output head are the served model's. DSpark's adds scores of pairs of tokens (`markov_head`), so that
a token depends on the one drafted before it. The layers are mlx-lm's of Qwen3.
Source: Chen et al., DFlash (2026), https://arxiv.org/abs/2602.06036.
Next: `engine/speculative/mtp.py`, which drafts with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3

from ..core.model_config import Config
from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .draft_heads import DraftHead
from .drafter_config import DFLASH, DSPARK, MAX_LAYERS, Fit, FittingDrafter, ServedShape, find_form
from .families import Zoo
from .zoo import ModelClasses

MAX_BLOCK = 64  # tokens
_FULL, _SLIDING = "full_attention", "sliding_attention"
_UNSUPPORTED: Mapping[str, Any] = {
    "attention_sink_bias": False,
    "rope_is_neox_style": True,
    "markov_head_type": "vanilla",
    "hidden_act": "silu",
}


def read_dflash(draft: Checkpoint, served: ServedShape) -> FittingDrafter:
    """Check the config of a drafter; reads no weights.

    Raises:
        CheckpointError: it is damaged, or of a kind that is not supported.
        InputError: it was made for another model.
    """
    form = find_form(draft.config) or DFLASH
    inner = draft.config.get("dflash_config")
    merged = {**draft.config, **(inner if isinstance(inner, dict) else {})}
    fit = replace(Fit.read(draft, form, served), config={**merged, "model_type": "qwen3"})
    if isinstance(draft.config.get("transformer_layer_config"), dict):
        raise CheckpointError(
            f"{draft.folder}: expected {form} in the layout of its authors, got that of "
            f"speculators, which is not supported"
        )
    for key, value in _UNSUPPORTED.items():
        if (got := merged.get(key, value)) != value:
            raise fit.damage(key, f"{value!r}, which alone is supported", got)
    fit.require_numbers()
    fit.require_vocabulary()
    layers = fit.served_layers(merged.get("target_layer_ids"))
    if (count := fit.size("num_target_layers", served.layers)) != served.layers:
        raise fit.misfit(f"a model of {served.layers} layers", str(count))
    if (width := fit.size("hidden_size")) != served.width:
        raise fit.misfit(f"hidden states of {served.width}", str(width))
    if (count := fit.size("num_hidden_layers")) > MAX_LAYERS:
        raise fit.damage("num_hidden_layers", f"at most {MAX_LAYERS}", count)
    mask = merged.get("mask_token_id")
    if type(mask) is not int or not 0 <= mask < served.vocab_size:
        raise fit.damage("mask_token_id", f"a token id below {served.vocab_size}", mask)
    # DSpark's block may be of drafted tokens alone; else the last token is in it.
    with_last = form != DSPARK or bool(merged.get("dspark_bonus_anchor"))
    longest = fit.size("block_size") - with_last
    if not 1 <= longest <= MAX_BLOCK:
        raise fit.damage("block_size", f"a block of 1 to {MAX_BLOCK} drafted tokens", longest)
    config = {
        **fit.config,
        "states_size": width * len(layers),
        "windows": _windows(fit, count),
        "is_causal": any(merged.get(key) for key in ("causal", "dflash_query_causal", "is_causal")),
        "markov_rank": fit.size("markov_rank", 256) if form == DSPARK else 0,
        "begins_with_last": form == DSPARK and bool(merged.get("sample_from_anchor", True)),
        "rope_scaling": merged.get("rope_scaling"),
        "tie_word_embeddings": False,
    }
    return FittingDrafter(
        replace(draft, config=config),
        layers,
        ModelClasses(form, Zoo.MLX_LM, DFlashModel, DFlashArguments),
        has_embedding=False,
        has_head=False,
        longest=longest,
    )


def _windows(fit: Fit, layers: int) -> list[int | None]:
    """How many tokens of the text each layer sees; None: all."""
    kinds = fit.config.get("layer_types") or [_FULL] * layers
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (_FULL, _SLIDING) for kind in kinds)
    ):
        raise fit.damage("layer_types", f"{_FULL} or {_SLIDING} for each layer", kinds)
    wide = None
    if fit.config.get("draft_window_size") is not None:
        wide = fit.size("draft_window_size")
    return [wide if kind == _FULL else fit.size("sliding_window") - 1 for kind in kinds]


@dataclass(frozen=True)
class DFlashArguments:
    """Of `DFlashModel`.

    Args:
        layer: of each layer.
        states_size: width of the served model's hidden states of a token, together.
        windows: how many tokens of the text each layer sees; None: all.
        mask_token_id: stands for a token that is to be drafted.
        is_causal: a place of a block sees those before it only.
        begins_with_last: the place of the last token gives the first drafted one.
        markov_rank: of the scores of pairs of tokens; 0: there are none.
        softcap: of logits; None: none.
    """

    layer: qwen3.ModelArgs
    states_size: int
    windows: tuple[int | None, ...]
    mask_token_id: int
    is_causal: bool
    begins_with_last: bool
    markov_rank: int
    softcap: float | None

    @classmethod
    def from_dict(cls, config: Config) -> DFlashArguments:
        """Of the config of a `FittingDrafter`."""
        own = ("states_size", "mask_token_id", "is_causal", "begins_with_last", "markov_rank")
        cap = config.get("final_logit_softcapping")
        return cls(
            layer=qwen3.ModelArgs.from_dict(config),
            windows=tuple(config["windows"]),
            softcap=float(cap) if cap else None,
            **{key: config[key] for key in own},
        )


class DFlashModel(nn.Module):
    """The layers of a drafter."""

    def __init__(self, args: DFlashArguments) -> None:
        super().__init__()
        layer = args.layer
        self.fc = nn.Linear(args.states_size, layer.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        self.layers = [qwen3.TransformerBlock(layer) for _ in range(layer.num_hidden_layers)]
        self.norm = nn.RMSNorm(layer.hidden_size, eps=layer.rms_norm_eps)
        if args.markov_rank:
            self.markov_head = {
                "markov_w1": nn.Embedding(layer.vocab_size, args.markov_rank),
                "markov_w2": nn.Linear(args.markov_rank, layer.vocab_size, bias=False),
            }
        self._args = args

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors by the names of this model, without those that it has not."""
        unused = ("embed_tokens.", "lm_head.", "confidence_head.")
        renamed = {name.removeprefix("model."): array for name, array in weights.items()}
        return {name: array for name, array in renamed.items() if not name.startswith(unused)}

    def read(self, states: mx.array, caches: list[Any]) -> None:
        """Append keys and values of tokens of the text: joined states [rows, length, width]."""
        for layer, cache in zip(self.layers, caches, strict=True):
            keys, values = _keys_and_values(layer.self_attn, states, cache.offset)
            cache.update_and_fetch(keys, values)

    def __call__(self, embeddings: mx.array, caches: list[Any]) -> mx.array:
        """States of a block after the text in the caches, which stay: [rows, length, width] ->
        the same."""
        states, length = embeddings, embeddings.shape[1]
        for layer, cache, window in zip(self.layers, caches, self._args.windows, strict=True):
            attention, rows = layer.self_attn, states.shape[0]
            x = layer.input_layernorm(states)
            queries = attention.q_proj(x).reshape(rows, length, attention.n_heads, -1)
            queries = attention.q_norm(queries).swapaxes(1, 2)
            own = _keys_and_values(attention, x, cache.offset)
            lengths = getattr(cache, "lengths", None) or [cache.offset]
            kept = [array[..., : max(lengths), :] for array in (cache.keys, cache.values)]
            keys, values = (mx.concatenate([a, b], axis=2) for a, b in zip(kept, own, strict=True))
            y = mx.fast.scaled_dot_product_attention(
                attention.rope(queries, offset=cache.offset),
                keys,
                values,
                scale=attention.scale,
                mask=_mask(lengths, length, window, is_causal=self._args.is_causal),
            )
            states = states + attention.o_proj(y.swapaxes(1, 2).flatten(2))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return states


def _keys_and_values(attention: Any, x: mx.array, offset: Any) -> tuple[mx.array, mx.array]:
    shape = (x.shape[0], x.shape[1], attention.n_kv_heads, -1)
    keys = attention.k_norm(attention.k_proj(x).reshape(shape)).swapaxes(1, 2)
    return attention.rope(keys, offset=offset), attention.v_proj(x).reshape(shape).swapaxes(1, 2)


def _mask(
    lengths: list[int], block: int, window: int | None, *, is_causal: bool
) -> mx.array | None:
    """What each place of a block sees, [rows, 1, block, text + block]; None: all."""
    end = max(lengths)
    is_cut = window is not None and end > window
    if not is_causal and not is_cut and min(lengths) == end:
        return None
    text = mx.arange(end)
    first = mx.arange(block)[:, None] if is_causal else mx.zeros((block, 1), dtype=mx.int32)
    rows = []
    for length in lengths:
        seen = mx.broadcast_to(text < length, (block, end))
        if window is not None:
            seen = seen & (text >= length + first - window)
        rows.append(seen)
    every = mx.ones((block, block), dtype=mx.bool_)
    inside = mx.broadcast_to(mx.tril(every) if is_causal else every, (len(rows), block, block))
    return mx.concatenate([mx.stack(rows), inside], axis=-1)[:, None]


class DFlashHead(DraftHead):
    """Drafts a block at once.

    Args:
        model: loaded, its layers as they are.
        embedding, head: of the served model: ids -> states, states -> logits.
    """

    def __init__(self, model: Any, embedding: Any, head: Any) -> None:
        super().__init__(model)
        self._embed, self._head = embedding, head
        self._args: DFlashArguments = model._args

    def join(self, states: mx.array) -> mx.array:
        """The served model's states of tokens, [..., layers * width], as attention reads them,
        [..., width]."""
        joined: mx.array = self.model.hidden_norm(self.model.fc(states))
        return joined

    def read(self, hidden: mx.array, caches: list[Any]) -> None:
        """Read tokens of the text: joined states [rows, length, width]."""
        self.model.read(hidden, caches)

    def draft_states(self, ids: mx.array, caches: list[Any], count: int) -> mx.array:
        """States of the places of tokens that follow the text and its last token.

        Args:
            ids: of the last token, whose states are not known, [rows, 1].

        Returns:
            [rows, count, width].
        """
        masks = count - self._args.begins_with_last
        block = mx.pad(ids, [(0, 0), (0, masks)], constant_values=self._args.mask_token_id)
        states: mx.array = self.model(self._embed(block), caches)
        return self.model.norm(states[:, -count:])

    def score(self, states: mx.array, previous: mx.array) -> mx.array:
        """Logits of a drafted token.

        Args:
            states: of its place, [rows, width].
            previous: the token before it, [rows, 1].

        Returns:
            [rows, vocabulary].
        """
        logits: mx.array = self._head(states[:, None])[:, 0]
        if (cap := self._args.softcap) is not None:
            logits = mx.tanh(logits / cap) * cap
        if self._args.markov_rank:
            pairs = self.model.markov_head
            logits = logits + pairs["markov_w2"](pairs["markov_w1"](previous[:, 0]))
        return logits
