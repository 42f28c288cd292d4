"""Where a tensor of a checkpoint is, and of what type.

Owns: `TensorInfo`, the entry of a safetensors header; the types.
Does not know: configs, how bytes are read.
Next: `checkpoint.py` reads the headers, `tensor_reader.py` the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..gguf.blocks import BLOCK_TYPES, UNQUANTIZED

# safetensors name -> (bits of an element, numpy type that carries the bytes, type MLX gives it)
DTYPES: dict[str, tuple[int, Any, mx.Dtype]] = {
    "F64": (64, np.float64, mx.float32),
    "F32": (32, np.float32, mx.float32),
    "F16": (16, np.float16, mx.float16),
    "BF16": (16, np.uint16, mx.bfloat16),
    "I64": (64, np.int64, mx.int64),
    "I32": (32, np.int32, mx.int32),
    "I16": (16, np.int16, mx.int16),
    "I8": (8, np.int8, mx.int8),
    "U64": (64, np.uint64, mx.uint64),
    "U32": (32, np.uint32, mx.uint32),
    "U16": (16, np.uint16, mx.uint16),
    "U8": (8, np.uint8, mx.uint8),
    "BOOL": (8, np.bool_, mx.bool_),
    "F8_E4M3": (8, np.uint8, mx.uint8),
    "F8_E8M0": (8, np.uint8, mx.uint8),
    **dict.fromkeys(BLOCK_TYPES.keys() - UNQUANTIZED, (8, np.uint8, mx.uint8)),  # GGUF's blocks
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are: [start, stop) of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
