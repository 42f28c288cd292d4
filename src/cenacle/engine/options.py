"""How each rank runs the model.

Owns: `EngineOptions`, sent to every rank as JSON.
Does not know: MLX, plans, draft models.
Invariant: options that exist are valid; the constructor raises otherwise.
Next: `engine.py`, which takes them; `memory.py`, the memory that they need.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError

SPECULATIVE_MODES = ("auto", "off", "always")
KV_DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class EngineOptions:
    """How a rank runs the model.

    Args:
        prefill_chunk_size: maximum prompt tokens per step.
        max_batch_size: maximum requests that generate at once.
        kv_dtype: of keys and values beside native kernels: "auto", that of the checkpoint, as
            mlx-lm keeps them; "float32", "float16" or "bfloat16".
        kv_bits: bits of a quantized KV cache, 4 or 8; None: not quantized.
        kv_group_size: group size of the quantized KV cache.
        max_kv_size: positions to keep (the first four and the last); None: all.
        max_queue: maximum waiting requests; None: unlimited.
        kv_cache_gb: gigabytes on each rank for the KV cache of running requests; None: half of the
            memory that is left.
        prefix_cache_gb: gigabytes on each rank for the caches of requests that have ended; None: an
            eighth of the memory that is left; 0: disabled.
        speculative: draft tokens for running requests, if caches can be trimmed: "auto" (while it
            pays), "always" or "off".
        prefix_cache_disk_gb: gigabytes of disk on each rank for prefixes of prompts, which survive
            a restart; 0: disabled.
        prefix_cache_dir: folder for those; None: `paths.prefix_cache_dir`.
        images: load what sees images, if the checkpoint has it.

    Raises:
        InputError: `speculative` is not one of `SPECULATIVE_MODES`, `kv_dtype` not one of
            `KV_DTYPES`.
    """

    prefill_chunk_size: int = 512
    max_batch_size: int = 32
    kv_dtype: str = "auto"
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_size: int | None = None
    max_queue: int | None = None
    kv_cache_gb: float | None = None
    prefix_cache_gb: float | None = None
    speculative: str = "auto"
    prefix_cache_disk_gb: float = 0.0
    prefix_cache_dir: str | None = None
    images: bool = True

    def __post_init__(self) -> None:
        if self.speculative not in SPECULATIVE_MODES:
            raise InputError(
                f"speculative: expected one of {', '.join(SPECULATIVE_MODES)}, "
                f"got {self.speculative!r}",
                "speculative",
            )
        if self.kv_dtype not in KV_DTYPES:
            raise InputError(
                f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}",
                "kv_dtype",
            )

    def kept_dtype(self, checkpoint_dtype: str) -> str:
        """The data type of keys and values beside native kernels.

        Args:
            checkpoint_dtype: see `ModelSpec.dtype`.
        """
        dtype = checkpoint_dtype if self.kv_dtype == "auto" else self.kv_dtype
        return dtype if self.kv_bits is None and dtype in KV_DTYPES else "float32"

    @property
    def plain_kv_cache(self) -> bool:
        """Whether the KV cache is neither quantized nor limited in size."""
        return self.kv_bits is None and self.max_kv_size is None

    @property
    def sees_images(self) -> bool:
        """Whether images are wanted and possible: they need the batch."""
        return self.images and self.plain_kv_cache
