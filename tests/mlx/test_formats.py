"""Checkpoints in the formats in which models are published, in every placement.

The witness is the same model with weights that `support/quantized_formats.py` decoded.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from one_process import VECTORS, in_threads, load_rank, run_ranks

from cenacle.collective.base import Collective
from cenacle.core.plan import Plan
from cenacle.engine.speculative.draft_model import load_draft_model
from cenacle.errors import CheckpointError
from cenacle.model import architecture
from cenacle.model.byte_ranges import ColumnRange, total_bytes
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.format_notices import describe_formats
from cenacle.model.fp8_layers import widen
from cenacle.model.loader import build_model, load_rank_model
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.tensor_slice import COLUMNS, ROWS
from support.products import in_turn
from support.quantized_checkpoints import (
    FAMILIES,
    HEADS,
    HIDDEN,
    WEIGHTS,
    WIDTH,
    Shapes,
    attention,
    mlp,
    write_checkpoints,
)
from support.quantized_formats import BLOCKS, FORMATS, Format, e4m3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, name: str) -> Path:
        if (family, name) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{name}")
            made[family, name] = write_checkpoints(folder, family, FORMATS[name])
        return made[family, name]

    return make


TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def logits(folder: Path, nodes: int = 1, placement: str = "whole") -> mx.array:
    def run(model, collective):
        y = model(TOKENS).astype(mx.float32)
        mx.eval(y)
        return y

    return run_ranks(folder, nodes, run, placement=placement)[0]


def difference(got: mx.array, expected: mx.array) -> float:
    return float(mx.max(mx.abs(got - expected)) / mx.max(mx.abs(expected)))


PLACEMENTS = ("whole", "sliced", "replicated")  # on three nodes


def placements_of(family: str, name: str) -> list[str]:
    return in_turn(PLACEMENTS, [*FAMILIES].index(family) + [*FORMATS].index(name))


def test_every_family_and_every_format_has_all_placements():
    for family in FAMILIES:
        assert {p for name in FORMATS for p in placements_of(family, name)} == set(PLACEMENTS)
    for name in FORMATS:
        assert {p for family in FAMILIES for p in placements_of(family, name)} == set(PLACEMENTS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_decoded_weights(checkpoints, family, name):
    folder = checkpoints(family, name)
    expected = logits(folder / "dense")
    for nodes, placement in ((1, "whole"), *((3, p) for p in placements_of(family, name))):
        got = logits(folder, nodes, placement)
        assert difference(got, expected) < 1e-4, (nodes, placement)


@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_held_as_they_should_be(checkpoints, name):
    model = build_model(Checkpoint.open(checkpoints("qwen3_moe", name)), None, 0)
    (block,) = architecture.find_blocks(model)
    for linear in block.linears.values():
        assert getattr(linear, "mode", "dense") == FORMATS[name].held


def load_native(folder: Path, collective: Collective) -> nn.Module:
    plan = Plan.whole(read_model_spec(Checkpoint.open(folder)), 1)
    return load_rank(folder, plan, collective, kernels="native")


@pytest.mark.parametrize("name", FORMATS)
def test_native_kernels(checkpoints, name):
    folder = checkpoints("qwen3_moe", name)

    def run(collective):
        model = load_native(folder, collective)
        stored = Checkpoint.open(folder).quantized
        notices = describe_formats(model, stored, uses_native_kernels=True)
        y = model(TOKENS).astype(mx.float32)
        mx.eval(y)
        return y, notices

    ((got, notices),) = in_threads(1, run)
    assert difference(got, logits(folder / "dense")) < 2e-3  # activations are rounded
    assert not [notice for notice in notices if "plain MLX" in notice], notices


# Layers that the formats' own tools wrote

WRITTEN = VECTORS / "formats" / "written.safetensors"
"""Layers of [32, 128] by compressed-tensors 0.20.0 (`compress`, and what its `decompress` makes, in
bfloat16), auto-gptq 0.7.1 (`QuantLinear.pack`) and autoawq 0.2.9 (`WQLinear_GEMM.from_linear`). The
settings of each are in the header."""


def written_settings() -> dict[str, dict]:
    data = WRITTEN.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["settings"])


def open_written(folder: Path, name: str) -> Checkpoint:
    shutil.copy(WRITTEN, folder / WEIGHTS)
    config = {"model_type": "qwen3_moe", "torch_dtype": "float32"}
    config["quantization_config"] = written_settings()[name]
    (folder / "config.json").write_text(json.dumps(config))

    def keep(tensor, dtype, shape, data):
        return (dtype, shape) if tensor.startswith(f"{name}.") else DROP

    rewrite(folder, keep)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", sorted(written_settings()))
def test_layers_that_the_tools_of_the_formats_wrote(tmp_path, name):
    checkpoint = open_written(tmp_path, name)
    layer = checkpoint.quantized.layers[name]
    expected = mx.load(str(WRITTEN))[f"{name}.decompressed"]
    close = 2**-8 if expected.dtype == mx.bfloat16 else 1e-6
    # compressed-tensors rounds scales of floats and their products to bfloat16 on the way.
    close *= 2 if "fp" in name else 1
    expected = expected.astype(mx.float32)
    whole = layer.dequantize(layer.read(ROWS, ((0, 32),), []))
    assert bool(mx.all(mx.abs(whole - expected) <= close * mx.abs(expected)))
    rows = layer.dequantize(layer.read(ROWS, ((0, 16), (16, 32)), []))
    border = layer.group_size or 32
    ranges = ((0, border), (border, 128)) if border < 128 else ((0, 128),)
    columns = layer.dequantize(layer.read(COLUMNS, ranges, []))
    assert mx.array_equal(rows, whole)
    assert mx.array_equal(columns, whole)


# What a rank reads


def listed_bytes(folder: Path, plan: Plan, rank: int, *, experts: bool) -> int:
    checkpoint = Checkpoint.open(folder)
    slices = slices_for(plan, rank, ModelLayout.read(checkpoint))
    return sum(
        total_bytes(piece.byte_ranges(1 << 16))
        for piece in slices.tensors
        if (".experts." in piece.tensor.name) == experts
    )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("placement", ["whole", "sliced"])
def test_a_rank_reads_its_own_bytes_of_experts(checkpoints, name, placement):
    """In sum at most 5 % more than the file has: scales that ranks share."""
    folder = checkpoints("mixtral", name)
    plan = getattr(Plan, placement)(read_model_spec(Checkpoint.open(folder)), 3)
    checkpoint = Checkpoint.open(folder)
    tensors = [t for n, t in checkpoint.tensors.items() if n not in checkpoint.quantized.ignored]
    whole = sum(t.stop - t.start for t in tensors if ".experts." in t.name)
    ranks = [listed_bytes(folder, plan, rank, experts=True) for rank in range(3)]
    # With act-order any column may be of any group: a rank reads the scales of all.
    limit = 1.15 if name == "gptq-act-order" else 1.05
    assert whole <= sum(ranks) <= limit * whole
    if placement == "sliced":
        assert max(ranks) <= limit * whole / 3


def parameters(model) -> dict[str, mx.array]:
    return dict(architecture.named_parameters(model))


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        (name, placement)
        for number, name in enumerate(FORMATS)
        # Columns differ with the format; of rows one of two is enough.
        for placement in ("sliced", *in_turn(("whole", "replicated"), number))
    ],
)
def test_bytes_that_a_rank_does_not_list_change_nothing(checkpoints, tmp_path, name, placement):
    folder = checkpoints("deepseek_v3", name)
    checkpoint = Checkpoint.open(folder)
    plan = getattr(Plan, placement)(read_model_spec(checkpoint), 3, trunk="sharded")
    data = (folder / WEIGHTS).read_bytes()
    slices = slices_for(plan, 1, ModelLayout.read(checkpoint))
    kept = bytearray(len(data))
    header = min(t.start for t in checkpoint.tensors.values())
    kept[:header] = data[:header]
    for byte_range in required_ranges(slices)[WEIGHTS]:
        spans = byte_range.spans() if isinstance(byte_range, ColumnRange) else [byte_range]
        for start, stop in spans:
            kept[start:stop] = data[start:stop]
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / WEIGHTS).write_bytes(kept)
    expected = parameters(load_rank_model(checkpoint, plan, 1, lambda *_: None))
    got = parameters(load_rank_model(Checkpoint.open(tmp_path), plan, 1, lambda *_: None))
    assert got.keys() == expected.keys()
    for key, array in expected.items():
        assert mx.array_equal(array, got[key], equal_nan=True), key


# The trunk


@pytest.mark.parametrize("name", FORMATS)
def test_a_sharded_trunk_is_sliced_as_it_is_stored(checkpoints, name):
    folder = checkpoints("qwen3_moe", name)
    checkpoint = Checkpoint.open(folder)
    plan = Plan.sliced(read_model_spec(checkpoint), 2, trunk="sharded")
    assert any(plan.is_sharded(part) for part in plan.spec.dense_modules)
    whole = parameters(build_model(checkpoint, None, 0))
    ranks = [parameters(build_model(checkpoint, plan, rank)) for rank in range(2)]
    cut = 0
    for key, value in whole.items():
        parts = [rank[key] for rank in ranks]
        if parts[0].shape == value.shape:
            assert mx.array_equal(parts[0], value), key
            continue
        cut += ".mlp.down_proj.weight" in key
        axis = next(i for i, n in enumerate(parts[0].shape) if n != value.shape[i])
        assert mx.array_equal(mx.concatenate(parts, axis=axis), value), key
    assert cut


# What is not held exactly


def test_block_fp8_stays_8_bits_exactly(tmp_path):
    """Groups of 128 inputs, or of 64 in a layer of 192; each has the scale of its block."""
    folder = write_checkpoints(tmp_path, "mixtral", FORMATS["block-fp8"], "bfloat16")
    checkpoint = Checkpoint.open(folder)
    model = build_model(checkpoint, None, 0)
    exact = parameters(build_model(Checkpoint.open(folder / "dense"), None, 0))
    (block, _) = architecture.find_blocks(model)
    for name, group in (("up_proj", 128), ("down_proj", 64)):
        layer = block.linears[name]
        assert (layer.mode, layer.bits, layer.group_size) == ("fp8", 8, group)
        assert layer.weight.dtype == mx.uint32
        got = widen(layer.weight, layer.scales, mx.float32)
        assert mx.array_equal(got, exact[f"{block.experts_path}.{name}.weight"])
    assert all(layer.error == 0 for layer in checkpoint.quantized.layers.values())
    spec = read_model_spec(checkpoint)
    assert "block fp8 held as fp8 8-bit, groups of 128" in str(spec.quantization)
    # A byte for each weight, and the scales.
    weights = 3 * HIDDEN * WIDTH
    assert weights < spec.moe[0].expert_bytes < weights * (1 + 4 / 64)
    for native, text in ((True, "exactly"), (False, "widens each of them")):
        (notice,) = describe_formats(nn.Module(), checkpoint.quantized, uses_native_kernels=native)
        assert notice.startswith("24 matrices of the checkpoint (block fp8) stay 8 bits in memory")
        assert notice.endswith(text) or text in notice


def test_fp8_in_odd_blocks_is_rounded_to_the_type_of_the_model(tmp_path):
    """Blocks of 48 inputs: no group of the kernels ends where they do."""

    def write(rng, out, width):
        leaves = FORMATS["block-fp8"].write(rng, out, width)
        blocks = (-(-out // 48), -(-width // 48))
        scale = rng.uniform(0.01, 0.03, blocks).astype(np.float32)
        return leaves | {"weight_scale_inv": ("F32", scale)}

    def read(leaves, out, width):
        scale = np.repeat(np.repeat(leaves["weight_scale_inv"][1], 48, 0), 48, 1)
        return e4m3(leaves["weight"][1]) * scale[:out, :width]

    form = Format(write, read, BLOCKS | {"weight_block_size": [48, 48]}, "dense")
    folder = write_checkpoints(tmp_path, "mixtral", form, "bfloat16")
    got = parameters(build_model(Checkpoint.open(folder), None, 0))
    exact = parameters(build_model(Checkpoint.open(folder / "dense"), None, 0))
    layer = Checkpoint.open(folder).quantized.layers["model.layers.1.block_sparse_moe.experts.0.w3"]
    assert layer.error == 2**-8
    name = "model.layers.1.block_sparse_moe.switch_mlp.up_proj.weight"
    assert got[name].dtype == mx.bfloat16
    apart = mx.abs(got[name].astype(mx.float32) - exact[name])
    assert bool(mx.all(apart <= layer.error * mx.abs(exact[name])))
    assert bool(mx.any(apart > layer.error / 2 * mx.abs(exact[name])))
    stored = Checkpoint.open(folder).quantized
    (notice,) = describe_formats(nn.Module(), stored, uses_native_kernels=True)
    assert "(fp8) are held as bfloat16, which rounds each weight by at most 0.39 %" in notice


# Mixed formats


def test_layers_of_one_checkpoint_have_formats_of_their_own(tmp_path):
    """Attention in FP8 per row, experts in integers of 4 bits, one layer in 8."""

    def write(rng, out, width):
        form = FORMATS["channel-fp8" if out != HIDDEN and width != HIDDEN else "int4"]
        return form.write(rng, out, width, **form.options)

    def read(leaves, out, width):
        form = FORMATS["int4" if "weight_packed" in leaves else "channel-fp8"]
        return form.read(leaves, out, width)

    mixed = Format(write, read, FORMATS["int4"].settings, "")
    folder = write_checkpoints(tmp_path, "qwen3_moe", mixed)
    expected = logits(folder / "dense")
    for nodes, placement in ((1, "whole"), (3, "sliced")):
        assert difference(logits(folder, nodes, placement), expected) < 1e-4
    description = read_model_spec(Checkpoint.open(folder)).quantization
    assert description is not None
    assert "int 4-bit held as affine 4-bit, groups of 32; fp8 held as mxfp8" in description


# Models without experts: draft models


@pytest.mark.parametrize("name", ["awq", "modelopt", "block-fp8"])
def test_a_dense_model(tmp_path, monkeypatch, name):
    def llama(layer: str) -> tuple[dict, Shapes, Shapes]:
        config = {"model_type": "llama", "intermediate_size": HIDDEN, "rms_norm_eps": 1e-6}
        config |= {"num_attention_heads": HEADS, "num_key_value_heads": 2}
        config |= {"tie_word_embeddings": False, "rope_theta": 1e4}
        config |= {"num_local_experts": None, "num_experts_per_tok": None}
        return config, attention(f"{layer}.self_attn") | mlp(f"{layer}.mlp"), {}

    monkeypatch.setitem(FAMILIES, "mixtral", llama)
    folder = write_checkpoints(tmp_path, "mixtral", FORMATS[name])
    for file in (folder / "config.json", folder / "dense" / "config.json"):
        config = json.loads(file.read_text())
        config = {k: v for k, v in config.items() if v is not None and k != "architectures"}
        file.write_text(json.dumps(config))
    expected = load_draft_model(Checkpoint.open(folder / "dense"), "mlx")(TOKENS)
    assert difference(load_draft_model(Checkpoint.open(folder), "mlx")(TOKENS), expected) < 1e-4


# Damage


DROP = "", [0]


def rewrite(folder: Path, change: Callable[[str, str, list[int], bytearray], object]) -> None:
    """Change tensors in place: change(name, type, shape, bytes) returns a new (type, shape)."""
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body, kept = bytearray(), {}
    for name, entry in header.items():
        a, b = entry["data_offsets"]
        piece = bytearray(data[8 + length + a : 8 + length + b])
        made = change(name, entry["dtype"], entry["shape"], piece)
        if made == DROP:
            continue
        if made is not None:
            entry["dtype"], entry["shape"] = made
        kept[name] = entry
        entry["data_offsets"] = [len(body), len(body) + len(piece)]
        body += piece
    head = json.dumps(kept).encode()
    (folder / WEIGHTS).write_bytes(len(head).to_bytes(8, "little") + head + bytes(body))


def copied(folder: Path, to: Path) -> Path:
    for file in folder.glob("*.*"):
        (to / file.name).write_bytes(file.read_bytes())
    return to


def open_and_load(folder: Path, placement: str) -> None:
    checkpoint = Checkpoint.open(folder)
    plan = getattr(Plan, placement)(read_model_spec(checkpoint), 3)
    for rank in range(3):
        load_rank_model(checkpoint, plan, rank, lambda *_: None)


SCALES = (
    ".weight_scale",
    ".weight_scale_inv",
    ".scales",
    ".weight_global_scale",
    ".weight_scale_2",
)
NAN = {"F32": b"\x00\x00\xc0\x7f", "F16": b"\x00\x7e", "BF16": b"\xc0\x7f"}
NAN |= {"U8": b"\xff", "F8_E4M3": b"\x7f"}


@pytest.mark.parametrize("placement", ["whole", "sliced"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_that_is_no_number_is_a_sentence(checkpoints, tmp_path, name, placement):
    folder = copied(checkpoints("mixtral", name), tmp_path)

    def spoil(tensor, dtype, shape, data):
        if ".experts.2.w3" in tensor and tensor.endswith(SCALES):
            data[: len(NAN[dtype])] = NAN[dtype]

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match="scale"):
        open_and_load(folder, placement)


@pytest.mark.parametrize("name", FORMATS)
def test_scales_of_another_shape_are_a_sentence(checkpoints, tmp_path, name):
    folder = copied(checkpoints("mixtral", name), tmp_path)

    def shorten(tensor, dtype, shape, data):
        if ".experts.2.w3" in tensor and tensor.endswith(SCALES):
            size = len(data) // max(1, int(np.prod(shape)))
            data += data[:size] * 7
            return dtype, [int(np.prod(shape)) + 7]
        return None

    rewrite(folder, shorten)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_scale_is_a_sentence(checkpoints, tmp_path, name):
    folder = copied(checkpoints("mixtral", name), tmp_path)
    data = (folder / WEIGHTS).read_bytes()
    for leaf in SCALES:
        old = f".experts.2.w3{leaf}".encode() + b'"'
        data = data.replace(old, old.replace(b"w3", b"wx"))
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError):
        open_and_load(folder, "whole")


def change_settings(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("block-fp8", {"scale_fmt": "ue8m0"}, "not a power of two"),
        ("gptq", {"sym": True}, "zero points are not in the middle"),
        ("gptq-act-order", {"desc_act": False}, "g_idx has columns in another order"),
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("awq", {"version": "gemv"}, "gemv"),
        ("awq", {"quant_method": "other"}, "expected quant_method awq or gptq"),
        ("int4", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ],
)
def test_a_config_that_lies_is_a_sentence(checkpoints, tmp_path, name, changes, message):
    folder = copied(checkpoints("mixtral", name), tmp_path)
    change_settings(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_and_load(folder, "sliced")


@pytest.mark.parametrize(
    ("name", "leaf"),
    [("awq", "qzeros"), ("gptq", "qzeros"), ("int4-zeros", "weight_zero_point")],
)
def test_missing_zero_points_are_a_sentence(checkpoints, tmp_path, name, leaf):
    """They are not taken for the middle of the range."""
    folder = copied(checkpoints("mixtral", name), tmp_path)
    lost = f"experts.2.w3.{leaf}"
    rewrite(folder, lambda tensor, *_: DROP if tensor.endswith(lost) else None)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3: expected .*(zero|qzeros)"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["block-fp8", "int8", "awq", "gptq", "int4"])
def test_an_empty_matrix_is_a_sentence(checkpoints, tmp_path, name):
    folder = copied(checkpoints("mixtral", name), tmp_path)

    def empty(tensor, dtype, shape, data):
        if tensor.endswith(tuple(f"experts.2.w3.{leaf}" for leaf in WEIGHT_LEAVES)):
            data.clear()
            return dtype, [shape[0], 0]
        return None

    rewrite(folder, empty)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3: expected"):
        Checkpoint.open(folder)


WEIGHT_LEAVES = ("weight", "weight_packed", "qweight")


@pytest.mark.parametrize("name", ["int4", "gptq"])
def test_bits_that_are_no_whole_number_are_not_believed(checkpoints, tmp_path, name):
    """4.0 equals 4, and what is computed with it is no shape."""
    folder = copied(checkpoints("mixtral", name), tmp_path)
    text = (folder / "config.json").read_text()
    for key in ("bits", "num_bits"):
        text = text.replace(f'"{key}": 4', f'"{key}": 4.0')
    (folder / "config.json").write_text(text)
    checkpoint = Checkpoint.open(folder)
    assert all(type(layer.inputs) is int for layer in checkpoint.quantized.layers.values())
