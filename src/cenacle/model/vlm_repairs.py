"""Faults of mlx-vlm 0.7.10 that change answers or end the process, repaired in its modules.

Owns: the repairs, one function for each family that needs one.
Does not know: ranks, plans, bytes on disk.
Invariant: a repair changes nothing where mlx-vlm is right: a prompt in one pass gives the same.
Next: `zoo.py`, which applies them when a family's module is imported. A new version of mlx-vlm: try
without each (`tests/mlx/test_zoo.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn


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


def _repair_hy_v4() -> None:
    """The tokens to attend to are chosen for the length at hand.

    mlx-vlm compiles the choice without shapes, and with the length of its first call in it: other
    lengths choose wrong tokens, or read beyond the array and end the process.
    """
    from mlx_vlm.models.deepseek_v32.language import Indexer
    from mlx_vlm.models.hy_v4.indexer import HyV4Indexer

    _replace_call(HyV4Indexer, Indexer.__call__)


def _repair_glm5_next() -> None:
    """Taking a request out of a batch works where a cache is still empty (a short prompt)."""
    from mlx_vlm.models import cache

    extract = cache.BatchKVCache.extract

    def extract_or_new(self: Any, index: int) -> Any:
        return cache.KVCache() if self.keys is None else extract(self, index)

    cache.BatchKVCache.extract = extract_or_new  # type: ignore[method-assign]


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


REPAIRS = {
    "deepseek_v4": _repair_deepseek_v4,
    "glm5_next": _repair_glm5_next,
    "hy_v4": _repair_hy_v4,
    "mistral_large3": _repair_mistral_large3,
}
