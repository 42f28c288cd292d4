"""Random values for the tensors of a model, drawn a few MiB at a time.

Owns: distributions that make a checkpoint worth testing: nothing stays at the zeros and ones that
mlx-lm starts from, and scales are such that logits are well spread.
Does not know: files, configs of particular families.
How: each tensor has a stream of random bits named after it; the words of a quantized tensor are
drawn as they are stored.
Invariant: the same model, config and seed give the same bytes.
Next: `synth.py` writes them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..core.model_config import Config, text_config
from . import zoo
from .architecture import named_parameters

_INTEGERS = (mx.int32, mx.int64)
CHUNK_VALUES = 1 << 21  # drawn at a time

# Standard deviations. A linear layer maps unit variance to LINEAR_STD**2; logits have
# about HEAD_STD.
LINEAR_STD = 1.5
HEAD_STD = 3.0
TIED_HEAD_STD = 0.5  # more, and a tied model sees little but its last token and repeats it
ATTENTION_STD = 0.5  # it averages tokens: with more, a deep model's positions are all alike
EMBEDDING_STD = 1.0
NOISE_STD = 0.1  # around the default, for norms, biases and corrections
_ATTENTION_OUTPUTS = ("dense", "o_b_proj", "o_proj", "out_proj")
_E2M1_RMS = math.sqrt(68.5 / 8)  # of the 16 values of mxfp4's elements: 0, 0.5, ..., 4, 6


@dataclass(frozen=True)
class RandomTensor:
    """A tensor's distribution: `default` (or 0) plus noise of standard deviation `std`."""

    std: float
    default: np.ndarray | None = None


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write. `values` yields its bytes in order."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    values: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.size


def random_parameters(model: nn.Module, config: Config) -> dict[str, RandomTensor]:
    """The distribution of each parameter of a model that is not quantized, by name."""
    modules = dict(model.named_modules())
    stacked, per_head = zoo.switch_linear_types(), zoo.multi_linear_types()
    params = dict(named_parameters(model))
    tied = not any(name.startswith(("lm_head.", "language_model.lm_head.")) for name in params)
    # Some families divide or multiply the logits by a constant of the config: undo it.
    text = text_config(config)
    head = (
        (TIED_HEAD_STD if tied else HEAD_STD)
        * text.get("logits_scaling", 1.0)
        / text.get("output_multiplier", 1.0)
        / text.get("logit_scale", 1.0)
    )

    def distribution(name: str, value: mx.array) -> RandomTensor:
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        width = value.shape[-1] if value.ndim else 1
        if isinstance(owner, nn.Embedding):
            return RandomTensor(head / math.sqrt(width) if tied else EMBEDDING_STD)
        if "lm_head" in name and value.ndim == 2:
            return RandomTensor(head / math.sqrt(width))
        if leaf == "weight" and isinstance(owner, (nn.Linear, *stacked, *per_head)):
            mixes = path.rpartition(".")[2] in _ATTENTION_OUTPUTS
            return RandomTensor((ATTENTION_STD if mixes else LINEAR_STD) / math.sqrt(width))
        if leaf == "weight" and isinstance(owner, nn.Conv1d | nn.Conv3d):
            return RandomTensor(LINEAR_STD / math.sqrt(math.prod(value.shape[1:])))
        if value.dtype in _INTEGERS:
            return RandomTensor(0.0)
        if leaf == "bias" and isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv3d, *stacked)):
            return RandomTensor(NOISE_STD)
        default = np.array(value.astype(mx.float32))
        if value.ndim == 2 and not default.any():  # a router kept as a bare matrix
            return RandomTensor(LINEAR_STD / math.sqrt(width))
        return RandomTensor(NOISE_STD, default.reshape(-1))

    return {name: distribution(name, value) for name, value in params.items()}


def list_tensors(
    model: nn.Module,
    distributions: Mapping[str, RandomTensor],
    seed: int,
    expert_count: int | None = None,
) -> list[OutputTensor]:
    """The parameters of a model, quantized or not, in its own order.

    Args:
        distributions: of the model before it was quantized, see `random_parameters`.
        expert_count: routed experts of a layer, for tables that assign experts to tokens.
    """
    modules = dict(model.named_modules())

    def values(name: str, value: mx.array) -> Callable[[], Iterator[np.ndarray]]:
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        if value.dtype in _INTEGERS:
            return partial(_integers, seed, name, value, expert_count)
        is_packed = hasattr(owner, "bits") and leaf != "bias"
        if not is_packed:
            return partial(_floats, seed, name, value.size, distributions[name], value.dtype)
        if leaf == "weight":
            return partial(_words, seed, name, value.size)
        assert owner is not None
        std = distributions[f"{path}.weight"].std
        if owner.mode == "mxfp4":
            return partial(_exponents, seed, name, value.size, std)
        groups = partial(_groups, seed, path, value.size, std, owner.bits, leaf)
        return partial(_encoded, groups, value.dtype)

    return [
        OutputTensor(name, value.dtype, tuple(value.shape), values(name, value))
        for name, value in named_parameters(model)
    ]


class _RandomStream:
    """Random bits that depend on the seed and the tensor's name only."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        self._bits = np.random.SFC64(int.from_bytes(digest, "little"))

    def words(self, n: int) -> np.ndarray:
        """`n` random uint32."""
        return self._bits.random_raw((n + 1) // 2).view(np.uint32)[:n]

    def unit(self, n: int) -> np.ndarray:
        """`n` float32, uniform in (-1, 1), in 65536 steps."""
        steps = self._bits.random_raw((n + 3) // 4).view(np.uint16)[:n]
        return (steps.astype(np.float32) - 32767.5) / 32768


def _chunks(n: int) -> Iterator[int]:
    for start in range(0, n, CHUNK_VALUES):
        yield min(CHUNK_VALUES, n - start)


def _encode(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """float32 values as the file stores them."""
    if dtype == mx.bfloat16:
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even
    return values.astype({mx.float32: np.float32, mx.float16: np.float16}[dtype])


def _encoded(groups: Callable[[], Iterator[np.ndarray]], dtype: mx.Dtype) -> Iterator[np.ndarray]:
    for chunk in groups():
        yield _encode(chunk, dtype)


def _floats(
    seed: int, name: str, n: int, distribution: RandomTensor, dtype: mx.Dtype
) -> Iterator[np.ndarray]:
    stream, done = _RandomStream(seed, name), 0
    scale = np.float32(distribution.std * math.sqrt(3))
    for m in _chunks(n):
        values = stream.unit(m) * scale
        if distribution.default is not None:
            values += distribution.default[done : done + m]
        done += m
        yield _encode(values, dtype)


def _integers(
    seed: int, name: str, value: mx.array, expert_count: int | None
) -> Iterator[np.ndarray]:
    """Constants as they are; where the model has zeros, each token's experts, all different."""
    default = np.array(value)
    if default.ndim != 2 or default.any() or not expert_count:
        yield default.reshape(-1)
        return
    first = _RandomStream(seed, name).words(len(default))[:, None]
    ids = (first % expert_count + np.arange(default.shape[1])) % expert_count
    yield ids.astype(default.dtype).reshape(-1)


def _words(seed: int, name: str, n: int) -> Iterator[np.ndarray]:
    """Packed elements: uniform over all levels, whatever the number of bits."""
    stream = _RandomStream(seed, name)
    for m in _chunks(n):
        yield stream.words(m)


def _groups(seed: int, path: str, n: int, std: float, bits: int, leaf: str) -> Iterator[np.ndarray]:
    """Scales or biases of affine groups: w = scale * q + bias, q in 0 .. 2**bits - 1.

    As in real checkpoints scales have both signs and differ by group, and zero is not in the middle
    of the levels. Weights have the standard deviation `std`.
    """
    levels = 2**bits
    step = std / math.sqrt((levels**2 - 1) / 12)
    scales, zeros = _RandomStream(seed, f"{path}.scales"), _RandomStream(seed, f"{path}.biases")
    for m in _chunks(n):
        u = scales.unit(m)
        scale = np.copysign(np.float32(step) * (0.5 + np.abs(u)), u)
        if leaf == "scales":
            yield scale
        else:
            yield -scale * ((levels - 1) / 2 + zeros.unit(m) * np.float32(levels / 8))


def _exponents(seed: int, name: str, n: int, std: float) -> Iterator[np.ndarray]:
    """Scales of mxfp4 groups: powers of two around what gives the standard deviation `std`."""
    stream = _RandomStream(seed, name)
    nearest = math.log2(std / _E2M1_RMS) + 127
    for m in _chunks(n):
        yield np.floor(nearest + 0.5 + stream.unit(m) / 2).astype(np.uint8)
