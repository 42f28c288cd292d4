"""Random blocks of GGUF's types, for those that the package gguf reads but does not write."""

import numpy as np

from cenacle.gguf import blocks

# Where a block has float16 numbers: random bytes there would be infinities.
HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2)},
    **{"Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82), "IQ4_NL": (0,)},
    **{"IQ4_XS": (0,), "MXFP4": ()},
}


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """uint8 [*shape, bytes of a block]."""
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (*shape, blocks.BLOCK_TYPES[kind].nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = generator.normal(0, 0.01, (*shape, 1)).astype("<f2")
        data[..., at : at + 2] = halves.view(np.uint8)
    if kind == "MXFP4":
        data[..., 0] = generator.integers(100, 140, shape)
    return data
