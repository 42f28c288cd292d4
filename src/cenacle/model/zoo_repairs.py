"""Faults of mlx-lm 0.32.2 and mlx-vlm 0.7.10 that change answers or end the process, repaired.

Owns: the repairs, one function for each family that needs one.
Does not know: ranks, plans, bytes on disk.
Invariant: a repair changes nothing where the package is right. What is right say transformers'
logits (`tests/vectors`), and for families that transformers lacks one pass over a prompt.
Next: `zoo.py`, which applies them before a family's classes are used. A new version: try without
each (`tests/mlx/test_zoo.py`, `tests/mlx/test_vectors.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .rotary import initialize_scaled


def _repair_deepseek_v4() -> None:
    """A compressed entry overlaps the window before it, also when that came in an earlier pass.

    mlx-vlm forgets it between passes: of generated tokens, and at every border of chunks.
    """
    from mlx_vlm.models.deepseek_v4 import language

    compress = language.Compressor.__call__

    def compress_with_previous(self: Any, x: mx.array, cache: Any, offset: Any) -> mx.array:
        if cache is None or not self.overlap:
            return compress(self, x, cache, offset)
        ratio = self.compress_ratio
        kv, gate, base = cache.accumulate_windows(self.wkv(x), self.wgate(x), offset)
        windows = kv.shape[1] // ratio
        if not windows:
            return cache.update_and_fetch(mx.zeros((x.shape[0], 0, self.head_dim), x.dtype))
        last = kv[:, -ratio:], gate[:, -ratio:]
        if cache.is_speculating:
            cache.windows += zip(mx.split(kv, windows, 1), mx.split(gate, windows, 1), strict=True)
        if (previous := getattr(cache, "previous_window", None)) is not None:
            kv, gate = (
                mx.concatenate([a, b], 1) for a, b in zip(previous, (kv, gate), strict=True)
            )
        cache.previous_window = last
        kv, gate = (mx.unflatten(a, 1, (-1, ratio)) for a in (kv, gate))
        pooled = language._overlap_compress_kv(kv, gate, self.ape, self.head_dim)[:, -windows:]
        pooled = self.rope(self.norm(pooled)[:, None], offset=base).squeeze(1)
        return cache.update_and_fetch(pooled)

    _replace_call(language.Compressor, compress_with_previous)
    pool = language.PoolingCache
    begin, commit, abort = pool.start_speculation, pool.commit_speculation, pool.abort_speculation

    def start_speculation(self: Any, length: int) -> int:
        self.windows = [getattr(self, "previous_window", None)]
        return begin(self, length)

    def commit_speculation(self: Any, lengths: Any, generation: int | None = None) -> None:
        remainder = self._speculation["remainder"]
        commit(self, lengths, generation)
        kept = lengths if isinstance(lengths, int) else int(lengths[0])
        if len(self.windows) > 1:  # of layers without overlap none are told
            self.previous_window = self.windows[(remainder + kept) // self.ratio]
        self.windows = []

    def abort_speculation(self: Any, generation: int | None = None) -> None:
        if self._speculation is not None:
            self.previous_window, self.windows = self.windows[0], []
        abort(self, generation)

    pool.start_speculation = start_speculation  # type: ignore[method-assign]
    pool.commit_speculation = commit_speculation  # type: ignore[method-assign]
    pool.abort_speculation = abort_speculation  # type: ignore[method-assign]


def _repair_hy_v4() -> None:
    """The tokens to attend to are chosen for the length at hand.

    mlx-vlm compiles the choice without shapes, and with the length of its first call in it: other
    lengths choose wrong tokens, or read beyond the array and end the process.
    """
    from mlx_vlm.models.deepseek_v32.language import Indexer
    from mlx_vlm.models.hy_v4.indexer import HyV4Indexer

    _replace_call(HyV4Indexer, Indexer.__call__)


def _repair_inkling() -> None:
    """Convolutions tell their caches what they were given, so that it can be taken back."""
    from mlx_vlm.models.inkling.language import InklingShortConvolution

    convolve = InklingShortConvolution.__call__

    def call(self: Any, x: mx.array, cache: Any = None, *args: Any, **keywords: Any) -> mx.array:
        is_recording = cache is not None and cache.is_speculating
        before = cache[self.conv_idx] if is_recording else None
        output: mx.array = convolve(self, x, cache, *args, **keywords)
        if is_recording:
            width = self.kernel_size - 1
            if before is None:
                before = mx.zeros((x.shape[0], width, x.shape[-1]), mx.float32)
            inputs = mx.concatenate([before, x.astype(mx.float32)], axis=1)
            cache.record_speculative_window(self.conv_idx, inputs, width)
        return output

    _replace_call(InklingShortConvolution, call)


def _repair_glm5_next() -> None:
    """Taking a request out of a batch works where a cache is still empty (a short prompt)."""
    from mlx_vlm.models import cache

    extract = cache.BatchKVCache.extract

    def extract_or_new(self: Any, index: int) -> Any:
        return cache.KVCache() if self.keys is None else extract(self, index)

    cache.BatchKVCache.extract = extract_or_new  # type: ignore[method-assign]


def _repair_qwen4_exp() -> None:
    """Blocks that do not exist yet are past the end of a mask.

    mlx-vlm numbers them -1, and writes at tokens -ratio to -1: with a short prompt before the
    array, over the allocator's own count of its bytes.
    """
    from mlx_vlm.models.qwen4_exp.language import Qwen4ExpQSAIndexer

    build = Qwen4ExpQSAIndexer.build_mask

    def build_mask(self: Any, selection: SimpleNamespace) -> mx.array:
        blocks = selection.selected_blocks
        known = mx.where(blocks < 0, selection.key_len, blocks)
        return build(self, SimpleNamespace(**vars(selection) | {"selected_blocks": known}))

    Qwen4ExpQSAIndexer.build_mask = build_mask  # type: ignore[method-assign]


def _repair_mistral_large3() -> None:
    """Biases of routers, which are zero and not published, have an entry for each of all experts.

    mlx-vlm makes them for the experts of the config, which are those that a rank holds.
    """
    from mlx_vlm.models.mistral_large3 import Model

    convert = Model.sanitize

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        converted = convert(self, weights)
        for name, gate in list(converted.items()):
            if name.endswith(".mlp.gate.weight"):
                bias = name.removesuffix("weight") + "e_score_correction_bias"
                if bias in converted and bias not in weights:
                    converted[bias] = mx.zeros((gate.shape[0],))
        return converted

    Model.sanitize = sanitize  # type: ignore[method-assign]


def _replace_call(kind: type[nn.Module], function: Callable[..., Any]) -> None:
    kind.__call__ = function  # type: ignore[method-assign]


def _take_top(x: mx.array, count: int) -> mx.array:
    return mx.stop_gradient(mx.argpartition(-x, kth=count - 1, axis=-1)[..., :count])


def _repair_ernie4_5_moe() -> None:
    """The router chooses by its scores and a bias that mlx-lm drops; the weights have no bias."""
    from mlx_lm.models import ernie4_5_moe

    block, model = ernie4_5_moe.Ernie4_5_MoeMLP, ernie4_5_moe.Model
    build, convert, bias_name = block.__init__, model.sanitize, "e_score_correction_bias"

    def build_with_bias(self: Any, args: Any) -> None:
        build(self, args)
        self[bias_name] = mx.zeros((args.moe_num_experts,))

    def forward(self: Any, x: mx.array) -> mx.array:
        scores = self.gate_act(self.gate(x).astype(mx.float32))
        ids = _take_top(scores + self[bias_name].astype(mx.float32), self.k)
        weights = mx.take_along_axis(scores, ids, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12)
        y = self.switch_mlp(x, ids)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        return y if self.shared_experts is None else y + self.shared_experts(x)

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        converted = convert(self, weights)
        for name, gate in list(converted.items()):
            if name.endswith(".mlp.gate.weight"):
                path = name.removesuffix("gate.weight")
                bias = weights.get(f"{path}moe_statics.{bias_name}", weights.get(path + bias_name))
                # Checkpoints that mlx-lm converted have lost it.
                bias = mx.zeros((gate.shape[0],)) if bias is None else bias.reshape(-1)
                converted[path + bias_name] = bias
        return converted

    block.__init__ = build_with_bias  # type: ignore[method-assign]
    model.sanitize = sanitize  # type: ignore[method-assign]
    _replace_call(block, forward)


def _repair_jamba() -> None:
    """The weights of the chosen experts are their shares of the softmax over all experts."""
    from mlx_lm.models.jamba import JambaSparseMoeBlock

    def forward(self: Any, x: mx.array) -> mx.array:
        scores = mx.softmax(self.router(x), axis=-1, precise=True)
        ids = _take_top(scores, self.num_experts_per_tok)
        weights = mx.take_along_axis(scores, ids, axis=-1)
        return (self.switch_mlp(x, ids) * weights[..., None]).sum(axis=-2)

    _replace_call(JambaSparseMoeBlock, forward)


def _repair_hunyuan() -> None:
    """The weights of the chosen experts are divided by their sum."""
    from mlx_lm.models.hunyuan import MoeBlock

    def forward(self: Any, x: mx.array) -> mx.array:
        scores = mx.softmax(self.gate(x), axis=-1, precise=True)
        ids = _take_top(scores, self.top_k)
        weights = mx.take_along_axis(scores, ids, axis=-1).astype(mx.float32)
        y = self.switch_mlp(x, ids)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        return y + self.shared_mlp(x) if self.use_shared_mlp else y

    _replace_call(MoeBlock, forward)


def _repair_gpt_oss() -> None:
    """YaRN's range of frequencies is not rounded to whole numbers where the config says so.

    `scale_classes` gives it to our models; this also to mlx-lm's own, with which they are compared.
    """
    from mlx_lm.models import gpt_oss

    initialize = gpt_oss.initialize_rope

    def initialize_rope(
        dims: int,
        base: float,
        traditional: bool,
        scaling_config: dict[str, Any] | None = None,
        max_position_embeddings: int | None = None,
    ) -> nn.Module:
        if scaling_config is None or scaling_config.get("truncate", True):
            return initialize(dims, base, traditional, scaling_config, max_position_embeddings)
        settings = {**scaling_config, "rope_type": "yarn"}
        return initialize_scaled(dims, base, traditional, settings, max_position_embeddings)

    gpt_oss.initialize_rope = initialize_rope


REPAIRS = {
    "ernie4_5_moe": _repair_ernie4_5_moe,
    "gpt_oss": _repair_gpt_oss,
    "hunyuan": _repair_hunyuan,
    "jamba": _repair_jamba,
    "deepseek_v4": _repair_deepseek_v4,
    "glm5_next": _repair_glm5_next,
    "hy_v4": _repair_hy_v4,
    "inkling": _repair_inkling,
    "mistral_large3": _repair_mistral_large3,
    "qwen4_exp": _repair_qwen4_exp,
}


@cache
def repair(family: str) -> None:
    """Repair a family's classes, once."""
    if (function := REPAIRS.get(family)) is not None:
        function()
