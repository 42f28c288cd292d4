"""Caches of mlx-vlm's models as mlx-lm's, which batches, prefixes and drafts know.

Owns: `as_mlx_lm_caches`.
Does not know: families.
Invariant: caches that mlx-lm has no kind for stay as they are, with all others of their model.
Next: `zoo.py`.
"""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache


def as_mlx_lm_caches(caches: list[Any]) -> list[Any]:
    """Empty caches of a model as mlx-lm's; the same ones, if it lacks a kind."""
    converted = [_convert(cache) for cache in caches]
    return caches if None in converted else converted


def _convert(cache: Any) -> Any | None:
    from mlx_vlm.models import cache as vlm_cache

    kind = type(cache)
    # Hy4's differs in how it grows.
    if kind is vlm_cache.KVCache or kind.__name__ == "HyV4KVCache":
        return KVCache()
    if kind is vlm_cache.RotatingKVCache:
        return RotatingKVCache(max_size=cache.max_size, keep=cache.keep)
    if kind is vlm_cache.CacheList:
        parts = [_convert(part) for part in cache.caches]
        return None if None in parts else CacheList(*parts)
    return None
