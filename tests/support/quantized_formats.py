"""Quantized layers as published checkpoints store them: random ones, and what they mean.

A writer and a decoder for each format, made of its specification and of nothing in `cenacle`. The
decoders go column by column, to be obvious. They follow: block FP8, DeepSeek-V3's README_WEIGHTS;
compressed-tensors, its `compressors`; NVFP4, ModelOpt's `NVFP4QTensor`; AWQ, AutoAWQ's `gemm`
packing; GPTQ, AutoGPTQ's `QuantLinear.pack`.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Stored = tuple[str, np.ndarray]
"""A safetensors type, and an array whose bytes are the tensor's."""

Leaves = dict[str, Stored]
"""By the last part of a tensor's name."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def write_safetensors(file: Path, tensors: dict[str, Stored]) -> None:
    header, at = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    head = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Floats of FP8 e4m3 codes: 4 bits of exponent with bias 7, 3 of mantissa."""
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7)
    return (sign * np.where(exponent, normal, mantissa / 8 * 2.0**-6)).astype(np.float32)


def e8m0(codes: np.ndarray) -> np.ndarray:
    return (2.0 ** (codes.astype(int) - 127)).astype(np.float32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of floats, rounded to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def floats(stored: Stored) -> np.ndarray:
    dtype, array = stored
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def integers(words: np.ndarray, bits: int) -> np.ndarray:
    """What `packed` packed: words [rows, n * bits / 32] -> values [rows, n]."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n] -> words [rows, n * bits / 32], one stream of bits, lowest first."""
    rows, count = values.shape
    stream = np.zeros((rows, count * bits), np.uint8)
    for bit in range(bits):
        stream[:, bit::bits] = (values >> bit) & 1
    return np.packbits(stream, axis=1, bitorder="little").view(np.uint32)


# Floats of 8 bits


def fp8_codes(rng: np.random.Generator, out: int, width: int) -> np.ndarray:
    """Codes of small numbers, with signs; no NaN."""
    return (rng.integers(0, 0x50, (out, width)) | rng.integers(0, 2, (out, width)) * 0x80).astype(
        np.uint8
    )


def write_block_fp8(rng, out, width) -> Leaves:
    blocks = (-(-out // 128), -(-width // 128))
    return {
        "weight": ("F8_E4M3", fp8_codes(rng, out, width)),
        "weight_scale_inv": ("F32", rng.uniform(0.01, 0.03, blocks).astype(np.float32)),
    }


def write_ue8m0(rng, out, width) -> Leaves:
    leaves = write_block_fp8(rng, out, width)
    exponents = rng.integers(-7, -4, leaves["weight_scale_inv"][1].shape)
    return leaves | {"weight_scale_inv": ("F32", (2.0**exponents).astype(np.float32))}


def read_block_fp8(leaves: Leaves, out: int, width: int) -> np.ndarray:
    weight, scale = e4m3(leaves["weight"][1]), leaves["weight_scale_inv"][1]
    for i in range(0, out, 128):
        for j in range(0, width, 128):
            weight[i : i + 128, j : j + 128] *= scale[i // 128, j // 128]
    return weight


def write_channel_fp8(rng, out, width) -> Leaves:
    scale = bfloat16(rng.uniform(0.01, 0.03, (out, 1)))
    return {"weight": ("F8_E4M3", fp8_codes(rng, out, width)), "weight_scale": ("BF16", scale)}


def write_tensor_fp8(rng, out, width) -> Leaves:
    return {
        "weight": ("F8_E4M3", fp8_codes(rng, out, width)),
        "weight_scale": ("F32", rng.uniform(0.01, 0.03, ()).astype(np.float32)),
        "input_scale": ("F32", np.float32(0.5)),
    }


def read_scaled_fp8(leaves: Leaves, out: int, width: int) -> np.ndarray:
    return e4m3(leaves["weight"][1]) * floats(leaves["weight_scale"])


def write_mxfp8(rng, out, width) -> Leaves:
    return {
        "weight": ("F8_E4M3", fp8_codes(rng, out, width)),
        "weight_scale": ("U8", rng.integers(119, 123, (out, width // 32)).astype(np.uint8)),
    }


def read_mxfp8(leaves: Leaves, out: int, width: int) -> np.ndarray:
    weight = e4m3(leaves["weight"][1])
    for column in range(width):
        weight[:, column] *= e8m0(leaves["weight_scale"][1])[:, column // 32]
    return weight


# Floats of 4 bits


def fp4_codes(rng, out, width) -> np.ndarray:
    return rng.integers(0, 256, (out, width // 2)).astype(np.uint8)


def fp4(codes: np.ndarray) -> np.ndarray:
    """The first of two columns is in the low bits."""
    weight = np.empty((codes.shape[0], 2 * codes.shape[1]), np.float32)
    weight[:, 0::2], weight[:, 1::2] = E2M1[codes & 15], E2M1[codes >> 4]
    return weight


def write_nvfp4(rng, out, width) -> Leaves:
    """As compressed-tensors: the scale of the tensor divides."""
    return {
        "weight_packed": ("U8", fp4_codes(rng, out, width)),
        "weight_scale": ("F8_E4M3", rng.integers(0x60, 0x78, (out, width // 16)).astype(np.uint8)),
        "weight_global_scale": ("F32", rng.uniform(3000, 5000, (1,)).astype(np.float32)),
        "input_global_scale": ("F32", np.ones(1, np.float32)),
    }


def write_modelopt(rng, out, width) -> Leaves:
    leaves = write_nvfp4(rng, out, width)
    return {
        "weight": leaves["weight_packed"],
        "weight_scale": leaves["weight_scale"],
        "weight_scale_2": ("F32", rng.uniform(2e-4, 4e-4, ()).astype(np.float32)),
        "input_scale": ("F32", np.float32(0.5)),
    }


def read_nvfp4(leaves: Leaves, out: int, width: int) -> np.ndarray:
    weight = fp4(leaves.get("weight_packed", leaves.get("weight"))[1])
    scale = e4m3(leaves["weight_scale"][1])
    for column in range(width):
        weight[:, column] *= scale[:, column // 16]
    if "weight_scale_2" in leaves:
        return weight * leaves["weight_scale_2"][1]
    return weight / leaves["weight_global_scale"][1]


def write_mxfp4(rng, out, width) -> Leaves:
    return {
        "weight_packed": ("U8", fp4_codes(rng, out, width)),
        "weight_scale": ("U8", rng.integers(119, 123, (out, width // 32)).astype(np.uint8)),
    }


def read_mxfp4(leaves: Leaves, out: int, width: int) -> np.ndarray:
    weight = fp4(leaves["weight_packed"][1])
    for column in range(width):
        weight[:, column] *= e8m0(leaves["weight_scale"][1])[:, column // 32]
    return weight


# Integers


def write_packed(rng, out, width, bits=4, group: int | None = 32, zeros=False) -> Leaves:
    """compressed-tensors' pack-quantized; group None: a scale for each row."""
    groups = width // group if group else 1
    span = 0.4 / 2**bits
    leaves: Leaves = {
        "weight_packed": (
            "I32",
            packed(rng.integers(0, 2**bits, (out, width)), bits).view(np.int32),
        ),
        "weight_scale": ("BF16", bfloat16(rng.uniform(span / 2, span, (out, groups)))),
        "weight_shape": ("I64", np.array([out, width], np.int64)),
    }
    if zeros:
        zero = rng.integers(2 ** (bits - 2), 3 * 2 ** (bits - 2), (groups, out))
        words = np.ascontiguousarray(packed(zero, bits).T)
        leaves["weight_zero_point"] = ("I32", words.view(np.int32))
    return leaves


def read_packed(leaves: Leaves, out: int, width: int) -> np.ndarray:
    words, scale = leaves["weight_packed"][1].view(np.uint32), floats(leaves["weight_scale"])
    bits = words.shape[1] * 32 // width
    group = width // scale.shape[1]
    zeros = np.full((out, scale.shape[1]), 2 ** (bits - 1))
    if "weight_zero_point" in leaves:
        packed_rows = leaves["weight_zero_point"][1].view(np.uint32).T
        zeros = integers(packed_rows, bits).T
    of = np.arange(width) // group
    return ((integers(words, bits) - zeros[:, of]) * scale[:, of]).astype(np.float32)


def write_int8(rng, out, width) -> Leaves:
    return {
        "weight": ("I8", rng.integers(-128, 128, (out, width)).astype(np.int8)),
        "weight_scale": ("BF16", bfloat16(rng.uniform(5e-4, 1e-3, (out, 1)))),
    }


def read_int8(leaves: Leaves, out: int, width: int) -> np.ndarray:
    return leaves["weight"][1].astype(np.float32) * floats(leaves["weight_scale"])


def write_awq(rng, out, width, group=32) -> Leaves:
    def words(values: np.ndarray) -> np.ndarray:
        """Of eight columns, nibble i is column (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
        nibbles = values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return packed(nibbles.reshape(len(values), -1), 4).view(np.int32)

    return {
        "qweight": ("I32", words(rng.integers(0, 16, (width, out)))),
        "qzeros": ("I32", words(rng.integers(4, 12, (width // group, out)))),
        "scales": ("F16", rng.uniform(0.01, 0.03, (width // group, out)).astype(np.float16)),
    }


def read_awq(leaves: Leaves, out: int, width: int) -> np.ndarray:
    scale = leaves["scales"][1].astype(np.float32)
    rows = np.arange(out)
    places = rows // 8 * 8 + np.array([0, 4, 1, 5, 2, 6, 3, 7])[rows % 8]
    codes = integers(leaves["qweight"][1].view(np.uint32), 4)[:, places]
    zeros = integers(leaves["qzeros"][1].view(np.uint32), 4)[:, places]
    of = np.arange(width) // (width // len(scale))
    return np.ascontiguousarray(((codes - zeros[of]) * scale[of]).T.astype(np.float32))


def write_gptq(rng, out, width, bits=4, group=32, symmetric=False, version=1, order=None) -> Leaves:
    """Version 1 stores zero points less one. order: the groups of columns, act-order."""
    zeros = rng.integers(2 ** (bits - 2), 3 * 2 ** (bits - 2), (width // group, out))
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    span = 0.4 / 2**bits
    index = np.arange(width) // group
    if order is not None:
        index = rng.permutation(index)
    words = packed(rng.integers(0, 2**bits, (out, width)), bits)
    return {
        "qweight": ("I32", np.ascontiguousarray(words.T).view(np.int32)),
        "qzeros": ("I32", packed(zeros - (version == 1), bits).view(np.int32)),
        "scales": ("F16", rng.uniform(span / 2, span, zeros.shape).astype(np.float16)),
        "g_idx": ("I32", index.astype(np.int32)),
    }


def read_gptq(leaves: Leaves, out: int, width: int, version=1) -> np.ndarray:
    words = leaves["qweight"][1].view(np.uint32).T
    bits = words.shape[1] * 32 // width
    zeros = leaves["qzeros"][1].view(np.uint32)
    zero = integers(zeros, bits) + (version == 1)
    groups, scale = leaves["g_idx"][1], leaves["scales"][1].astype(np.float32)
    weight = (integers(words, bits) - zero[groups].T) * scale[groups].T
    return np.ascontiguousarray(weight.astype(np.float32))


def compressed(name: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": {"g": group}}


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        write: (random generator, outputs, inputs) -> a layer's tensors.
        read: (tensors, outputs, inputs) -> the layer's weights, float32.
        settings: config.json's quantization_config.
        held: what Cenacle should hold it as.
        separate: the settings are in hf_quant_config.json instead.
    """

    write: Callable[..., Leaves]
    read: Callable[[Leaves, int, int], np.ndarray]
    settings: dict[str, Any]
    held: str
    separate: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def layer(self, rng: np.random.Generator, out: int, width: int) -> tuple[Leaves, np.ndarray]:
        leaves = self.write(rng, out, width, **self.options)
        return leaves, self.read(leaves, out, width).astype(np.float32)


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FORMATS = {
    "block-fp8": Format(write_block_fp8, read_block_fp8, BLOCKS, "fp8"),
    "ue8m0": Format(write_ue8m0, read_block_fp8, BLOCKS | {"scale_fmt": "ue8m0"}, "mxfp8"),
    "channel-fp8": Format(
        write_channel_fp8,
        read_scaled_fp8,
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        "mxfp8",
    ),
    "tensor-fp8": Format(write_tensor_fp8, read_scaled_fp8, {"quant_method": "fp8"}, "mxfp8"),
    "mxfp8": Format(
        write_mxfp8,
        read_mxfp8,
        compressed("mxfp8-quantized", num_bits=8, type="float", group_size=32),
        "mxfp8",
    ),
    "nvfp4": Format(
        write_nvfp4,
        read_nvfp4,
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
        "nvfp4",
    ),
    "modelopt": Format(
        write_modelopt,
        read_nvfp4,
        {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"},
        "nvfp4",
        separate=True,
    ),
    "mxfp4": Format(
        write_mxfp4,
        read_mxfp4,
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
        "mxfp4",
    ),
    "int4": Format(
        write_packed,
        read_packed,
        compressed("pack-quantized", num_bits=4, type="int", group_size=32),
        "affine",
    ),
    "int4-zeros": Format(
        write_packed,
        read_packed,
        compressed("pack-quantized", num_bits=4, type="int", group_size=64, symmetric=False),
        "affine",
        options={"group": 64, "zeros": True},
    ),
    "int3": Format(
        write_packed,
        read_packed,
        compressed("pack-quantized", num_bits=3, type="int", group_size=64, symmetric=False),
        "affine",
        options={"bits": 3, "group": 64, "zeros": True},
    ),
    "w8a16": Format(
        write_packed,
        read_packed,
        compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
        "affine",
        options={"bits": 8, "group": None},
    ),
    "int8": Format(
        write_int8,
        read_int8,
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
        "affine",
    ),
    "awq": Format(
        write_awq,
        read_awq,
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
        "affine",
    ),
    "gptq": Format(write_gptq, read_gptq, GPTQ, "affine"),
    "gptq-symmetric": Format(
        write_gptq, read_gptq, GPTQ | {"sym": True}, "affine", options={"symmetric": True}
    ),
    "gptq-v2": Format(
        write_gptq,
        lambda *a: read_gptq(*a, version=2),
        GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8},
        "affine",
        options={"version": 2, "bits": 8},
    ),
    "gptq-act-order": Format(
        write_gptq, read_gptq, GPTQ | {"desc_act": True}, "dense", options={"order": True}
    ),
}
