"""Damaged, truncated and lying checkpoints of every published format, for `damaged_checkpoints.py`.

`write_source` writes a small model in a format; `damage_safetensors` and `damage_gguf` make one
fault in a copy of it. Formats are those of `tests/support/quantized_formats.py`, "mixed-bits" of
mlx-lm, and GGUF with each type of block, in several files, and as the folder that a head prepares.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cenacle.gguf.blocks import BLOCK_TYPES, UNQUANTIZED
from support.gguf_blocks import HALVES
from support.quantized_checkpoints import write_checkpoints
from support.quantized_formats import FORMATS

SAFETENSORS = (*FORMATS, "mixed-bits")
GGUF_OF_BLOCKS = tuple(f"gguf-{kind}" for kind in BLOCK_TYPES)
GGUF = (*GGUF_OF_BLOCKS, "gguf-split", "gguf-folder")
NAMES = (*SAFETENSORS, *GGUF)
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")

ODD_COUNTS = (0, 1, 2, 3, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 5, 7.5, 96, 129, 2**31, 2**63, 10**30, float("nan"), "", "x",
    "int", "float", "gptq", "awq", "marlin", "mxfp4", [], [0, 0], [128, 0], [-128, 128], [3, 5],
    [128], [2**63, 1], {}, {"a": 1},
)  # fmt: skip
TYPES = ("F32", "F16", "BF16", "I64", "I32", "U32", "I8", "U8", "F8_E4M3", "F8_E8M0", "BOOL", "F64")


# Sources


def write_source(folder: Path, name: str) -> None:
    """A model of a format, in `folder`; for several families one each."""
    if name in FORMATS:
        for family in FAMILIES:
            write_checkpoints(folder / family, family, FORMATS[name])
            shutil.rmtree(folder / family / "dense")
    elif name == "mixed-bits":
        write_mixed_bits(folder / "qwen3_moe")
    else:
        sizes = dict.fromkeys(("hidden_size", "moe_intermediate_size", "intermediate_size"), 256)
        sizes |= {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}
        write_gguf(folder / "qwen3_moe", name.removeprefix("gguf-"), head_dim=64, **sizes)


def write_mixed_bits(folder: Path, **changes: Any) -> None:
    """A model whose layers have several of MLX's own formats; `changes` are config.json's."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    from cenacle.model.config_catalog import tiny_config
    from cenacle.model.synth import synth

    kinds = [{"bits": bits, "group_size": 32, "mode": "affine"} for bits in (3, 4, 8)]
    kinds += [{"bits": 4, "group_size": 32, "mode": "mxfp4"}]

    def choose(path: str, module: Any) -> dict[str, Any] | bool:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return kinds[len(path) % len(kinds)] if fits else False

    floats = folder.with_name("floats")
    synth(floats, config=tiny_config("qwen3_moe") | changes)
    model, config = load_model(floats)
    model, config = quantize_model(model, config, 32, 4, quant_predicate=choose)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    shutil.rmtree(floats)


def write_gguf(folder: Path, kind: str, **changes: Any) -> None:
    """A model in GGUF with a type of block, in several files, or as a head prepares it."""
    from cenacle.model.gguf_checkpoint import prepare_folder
    from support.moe_gguf import write_moe

    folder.mkdir(parents=True)
    block_type = "Q4_0" if kind in ("split", "folder") else kind
    write_moe(folder, "qwen3_moe", block_type, 6 if kind == "split" else 0, **changes)
    shutil.rmtree(folder / "floats")
    if kind == "folder":
        prepared = prepare_folder(folder / "model.gguf")
        for file in prepared.iterdir():
            if not file.is_symlink():  # which leads to the file
                shutil.copy(file, folder / file.name)


# safetensors


@dataclass
class _File:
    """A safetensors file: entries in order, a name may be there twice, and the bytes."""

    path: Path
    entries: list[tuple[str, dict[str, Any]]]
    data: bytearray

    @classmethod
    def read(cls, path: Path) -> _File:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        pairs = json.loads(raw[8 : 8 + length], object_pairs_hook=lambda pairs: pairs)
        entries = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
        return cls(path, entries, bytearray(raw[8 + length :]))

    def write(self) -> None:
        members = ",".join(f"{json.dumps(n)}:{json.dumps(entry)}" for n, entry in self.entries)
        head = b"{" + members.encode() + b"}"
        self.path.write_bytes(struct.pack("<Q", len(head)) + head + self.data)

    def append(self, data: bytes) -> list[int]:
        """Offsets of bytes that are put at the end."""
        start = len(self.data)
        self.data += data
        return [start, len(self.data)]


_SCALE_LEAVES = (
    *("weight_scale", "weight_scale_inv", "scales", "biases", "weight_global_scale"),
    *("weight_scale_2", "qzeros", "weight_zero_point", "g_idx", "weight_shape"),
)
_BAD_FLOATS = {
    "F32": (0x7FC00000, 0x7F800000, 0, 0x80000000, 0xFF7FFFFF, 1, 0xBF800000),
    "F16": (0x7E00, 0x7C00, 0, 0x8000, 0xFBFF, 1, 0xBC00),
    "BF16": (0x7FC0, 0x7F80, 0, 0x8000, 0xFF7F, 1, 0xBF80),
}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "I64": 8}


def damage_safetensors(folder: Path, dice: random.Random) -> str:
    """One fault in what makes the format: settings, parts of layers, offsets."""
    if dice.random() < 0.3:
        return _change_settings(folder, dice)
    file = _File.read(dice.choice(sorted(folder.glob("*.safetensors"))))
    kind = dice.choice(
        (
            *("values", "values", "shape", "resize", "dtype", "drop", "overlap", "double", "name"),
            *("beyond", "count", "cut", "exchange", "words"),
        )
    )
    parts = [i for i, (n, _) in enumerate(file.entries) if n.rpartition(".")[2] in _SCALE_LEAVES]
    at = dice.choice(parts if parts and dice.random() < 0.7 else range(len(file.entries)))
    what = _change_entry(file, kind, at, dice)
    file.write()
    return f"{kind} of {file.entries[min(at, len(file.entries) - 1)][0]}: {what}"[:160]


def _change_entry(file: _File, kind: str, at: int, dice: random.Random) -> Any:
    name, entry = file.entries[at]
    start, stop = entry["data_offsets"]
    other = dice.choice(file.entries)[1]
    if kind == "values":
        return _change_values(file, entry, dice)
    if kind == "shape":  # as many elements
        shape = list(entry["shape"])
        count = (stop - start) // max(1, _size_of(entry))
        entry["shape"] = dice.choice(
            (
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                [count],
                [count, 1],
                [1, count],
                [2, count // 2],
            )
        )
        return entry["shape"]
    if kind == "resize":
        rows = list(entry["shape"]) or [1]
        axis = dice.randrange(len(rows))
        rows[axis] = max(0, dice.choice((rows[axis] - 1, rows[axis] + 1, rows[axis] * 2, 0, 1)))
        size = _size_of(entry)
        for n in rows:
            size *= n
        entry["shape"], entry["data_offsets"] = rows, file.append(dice.randbytes(size))
        return rows
    if kind == "dtype":
        entry["dtype"] = dice.choice(TYPES)
        return entry["dtype"]
    if kind == "drop":
        if dice.random() < 0.5:
            del file.entries[at]
            return "alone"
        leaf = name.rpartition(".")[2]
        file.entries = [(n, e) for n, e in file.entries if n.rpartition(".")[2] != leaf]
        return f"every {leaf}"
    if kind == "overlap":
        a, _ = other["data_offsets"]
        entry["data_offsets"] = dice.choice(([a, a + stop - start], [start - 1, stop - 1]))
        return entry["data_offsets"]
    if kind == "double":
        file.entries.insert(dice.randrange(len(file.entries)), (name, dict(other)))
        return "another entry of this name"
    if kind == "name":
        path, _, leaf = name.rpartition(".")
        leaves = (*_SCALE_LEAVES, "weight", "weight_packed", "qweight", "weight_g_idx", "scale")
        new = dice.choice(leaves)
        file.entries[at] = (f"{path}.{new}", entry)
        return new
    return _change_bounds(file, kind, entry, dice)


def _change_bounds(file: _File, kind: str, entry: dict[str, Any], dice: random.Random) -> Any:
    start, stop = entry["data_offsets"]
    other = dice.choice(file.entries)[1]
    if kind == "beyond":
        size = len(file.data)
        entry["data_offsets"] = dice.choice(
            (
                [size, size + stop - start],
                [2**63, 2**63 + stop - start],
                [start - stop, 0],
                [size - 1, size - 1 + stop - start],
            )
        )
        return entry["data_offsets"]
    if kind == "count":
        shape = list(entry["shape"]) or [1]
        shape[dice.randrange(len(shape))] = dice.choice((*ODD_COUNTS, -1, 1.5, "8", None, True))
        entry["shape"] = shape
        if dice.random() < 0.3:
            entry["shape"], entry["data_offsets"] = [2**33, 2**31], [0, 2**64]
        return entry["shape"]
    if kind == "exchange":
        mine = dict(entry)
        entry.clear()
        entry.update(other)
        other.clear()
        other.update(mine)
        return "with another"
    if kind == "words":
        data = dice.randbytes(stop - start)
        file.data[start:stop] = data
        return "random"
    del file.data[dice.randrange(len(file.data) + 1) :]
    return "cut"


def _size_of(entry: dict[str, Any]) -> int:
    return _SIZES.get(entry["dtype"], 1)


def _change_values(file: _File, entry: dict[str, Any], dice: random.Random) -> str:
    start, stop = entry["data_offsets"]
    dtype, size = entry["dtype"], _size_of(entry)
    codes = _BAD_FLOATS.get(dtype) or (0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1, 0x7F, 0xFF)
    value = dice.choice(codes).to_bytes(size, "little")
    if stop - start < size:
        return "none"
    if dice.random() < 0.3:
        file.data[start:stop] = value * ((stop - start) // size)
        return f"all {value.hex()}"
    place = start + dice.randrange((stop - start) // size) * size
    file.data[place : place + size] = value
    return f"one {value.hex()}"


def _members(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in items:
        yield (*path, key)
        if isinstance(member, dict | list):
            yield from _members(member, (*path, key))


def _change_settings(folder: Path, dice: random.Random) -> str:
    """config.json tells of another format, another group, or of nothing."""
    separate = folder / "hf_quant_config.json"
    file = separate if separate.exists() else folder / "config.json"
    config = json.loads(file.read_text())
    if file == separate:
        key = "quantization"
    else:
        key = "quantization_config" if "quantization_config" in config else "quantization"
    kind = dice.choice(("other", "none", "member", "member", "member", "delete", "also"))
    settings = config.get(key)
    if kind == "other":
        name = dice.choice(sorted(FORMATS))
        config[key] = FORMATS[name].settings
        what = f"that of {name}"
    elif kind == "none" or not isinstance(settings, dict) or not settings:
        config.pop(key, None)
        what = "gone"
    elif kind == "also":
        (folder / "hf_quant_config.json").write_text(dice.choice(("{}", "[]", "", '{"a": NaN}')))
        what = "two files"
    else:
        path = dice.choice(list(_members(settings)))
        parent: Any = settings
        for part in path[:-1]:
            parent = parent[part]
        if kind == "delete" and isinstance(parent, dict):
            del parent[path[-1]]
            what = f"without {path}"
        else:
            parent[path[-1]] = odd = dice.choice(ODD_VALUES)
            what = f"{path} = {odd!r}"
    if file.name != "hf_quant_config.json" or kind != "also":
        file.write_text(json.dumps(config))
    return f"{file.name} {key}: {what}"[:160]


# GGUF


@dataclass(frozen=True)
class _Field:
    """A number of a GGUF header: what it is, where, how many bytes, and of whom."""

    kind: str
    at: int
    width: int
    owner: str = ""


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _fields(data: bytes) -> Iterator[_Field]:
    """The numbers of a header, in order."""
    at = 8

    def number(kind: str, width: int, owner: str = "") -> tuple[_Field, int]:
        nonlocal at
        field = _Field(kind, at, width, owner)
        at += width
        if at > len(data):
            raise ValueError("the header was damaged before")
        return field, int.from_bytes(data[at - width : at], "little")

    yield _Field("version", 4, 4)
    field, tensors = number("count", 8)
    yield field
    field, values = number("count", 8)
    yield field
    for _ in range(values):
        field, length = number("length", 8)
        yield field
        key = data[at : at + length].decode(errors="replace")
        yield _Field("text", at, length, key)
        at += length
        field, kind = number("type", 4, key)
        yield field
        if kind == 9:
            field, kind = number("item type", 4, key)
            yield field
            field, count = number("length", 8, key)
            yield field
        else:
            count = 1
        for _ in range(count):
            if kind == 8:
                field, length = number("length", 8, key)
                yield field
                yield _Field("text", at, length, key)
                at += length
            else:
                field, _ = number("value", _WIDTHS[kind], key)
                yield field
    for _ in range(tensors):
        field, length = number("length", 8)
        yield field
        name = data[at : at + length].decode(errors="replace")
        yield _Field("name", at, length, name)
        at += length
        field, dimensions = number("dimensions", 4, name)
        yield field
        for _ in range(dimensions):
            field, _ = number("size", 8, name)
            yield field
        field, _ = number("tensor type", 4, name)
        yield field
        field, _ = number("offset", 8, name)
        yield field
    yield _Field("end", at, 0)


def damage_gguf(folder: Path, dice: random.Random) -> str:
    """One fault in a GGUF file, or in the set of files that are one model."""
    index = folder / "gguf-tensors.json"
    if index.exists() and dice.random() < 0.7:
        return _change_index(index, dice)
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1 and dice.random() < 0.3:
        return _change_set(files, dice)
    file = dice.choice(files)
    data = bytearray(file.read_bytes())
    try:
        fields = list(_fields(bytes(data)))
        what = _change_field(data, fields, dice)
    except (IndexError, KeyError, ValueError, MemoryError, OverflowError):  # damaged before
        at = dice.randrange(len(data))
        data[at] ^= 1 << dice.randrange(8)
        what = f"bit at {at}"
    file.write_bytes(data)
    return f"{file.name} {what}"[:160]


def _change_field(data: bytearray, fields: list[_Field], dice: random.Random) -> str:
    groups: dict[str, list[_Field]] = {}
    for field in fields:
        groups.setdefault(field.kind, []).append(field)
    end = groups.pop("end")[0].at
    kind = dice.choice(
        (*groups, "cut", "longer", "flip", "blocks", "blocks", "noise", "header cut")
    )
    if kind in ("cut", "header cut"):
        del data[dice.randrange(len(data) if kind == "cut" else end) :]
    elif kind == "longer":
        data += dice.randbytes(999)
    elif kind == "flip":
        data[dice.randrange(end)] ^= 1 << dice.randrange(8)
    elif kind == "noise":
        at = dice.randrange(end, len(data))
        noise = dice.randbytes(min(len(data) - at, dice.choice((1, 8, 4096))))
        data[at : at + len(noise)] = noise
    elif kind == "blocks":
        return _change_blocks(data, groups, end, dice)
    else:
        field = dice.choice(groups[kind])
        if kind == "value" and dice.random() < 0.7:  # not one of the thousands of vocabularies
            field = dice.choice([f for f in groups[kind] if "tokenizer" not in f.owner] or [field])
        return _overwrite(data, field, groups[kind], dice)
    return kind


def _overwrite(data: bytearray, field: _Field, alike: list[_Field], dice: random.Random) -> str:
    old = bytes(data[field.at : field.at + field.width])
    if field.kind in ("name", "text"):
        same = [f for f in alike if f.width == field.width and f.at != field.at]
        other = dice.choice(same) if same else field
        copied = bytes(data[other.at : other.at + other.width])
        texts = (copied, b"\x1b" * field.width, b"\xff" * field.width, old[::-1], old[:-1] + b"x")
        new = dice.choice(texts)[: field.width]
    elif field.kind in ("type", "item type", "tensor type", "dimensions", "version"):
        number = dice.choice((*range(45), 99, 2**31, 2**32 - 1))
        number = 9 if field.kind == "item type" and dice.random() < 0.4 else number
        new = number.to_bytes(4, "little")
    elif field.kind == "value" and field.width in (4, 8) and dice.random() < 0.5:
        odd = dice.choice((float("nan"), float("inf"), -1.0, 0.0, 0.5, 3e38, 1e-40))
        new = struct.pack("<f" if field.width == 4 else "<d", odd)
    else:
        was = int.from_bytes(old, "little")
        number = dice.choice((*ODD_COUNTS, was + 1, was - 1, was * 2, was + 32, was ^ 2**40))
        new = (number % 2 ** (8 * field.width)).to_bytes(field.width, "little")
    data[field.at : field.at + field.width] = new
    return f"{field.kind} of {field.owner}: {old[:16].hex()} -> {new[:16].hex()}"


def _change_blocks(
    data: bytearray, groups: dict[str, list[_Field]], end: int, dice: random.Random
) -> str:
    """Scales of a tensor's blocks are not numbers, or infinite."""
    begin = -(-end // 32) * 32
    types, offsets = groups["tensor type"], groups["offset"]
    i = dice.randrange(len(types))
    code = int.from_bytes(data[types[i].at : types[i].at + 4], "little")
    names = {0: "F32", 1: "F16", 30: "BF16"} | {code: _type_name(code)}
    name = names[code]
    at = begin + int.from_bytes(data[offsets[i].at : offsets[i].at + 8], "little")
    if name in UNQUANTIZED:
        bad = {"F32": b"\0\0\xc0\x7f", "F16": b"\0\x7e", "BF16": b"\xc0\x7f"}[name]
        data[at : at + len(bad)] = bad
    else:
        block = at + dice.randrange(4) * BLOCK_TYPES[name].nbytes
        for place in HALVES[name] or (0,):
            data[block + place : block + place + 2] = dice.choice(
                (b"\0\x7e", b"\0\x7c", b"\xff\xff")
            )
    return f"a scale of {types[i].owner} ({name})"


def _type_name(code: int) -> str:
    from cenacle.gguf.blocks import TYPE_NAMES

    return TYPE_NAMES[code]


def _change_set(files: list[Path], dice: random.Random) -> str:
    one, other = dice.sample(files, 2)
    kind = dice.choice(("gone", "exchange", "same", "empty", "more", "renamed", "link"))
    if kind == "gone":
        one.unlink()
    elif kind == "exchange":
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "same":
        one.write_bytes(other.read_bytes())
    elif kind == "empty":
        one.write_bytes(b"")
    elif kind == "more":
        shutil.copy(one, one.with_name("model-00001-of-00001.gguf"))
    elif kind == "renamed":
        one.rename(one.with_name("model-00001-of-99999.gguf"))
    else:
        one.unlink()
        one.symlink_to(one.name)
    return f"{kind}: {one.name}, {other.name}"


def _change_index(index: Path, dice: random.Random) -> str:
    """The list of tensors that a head has written lies."""
    try:
        data = json.loads(index.read_bytes())
        name = dice.choice(sorted(data["tensors"]))
        entry = data["tensors"][name]
        kind = dice.choice(("file", "type", "shape", "start", "both", "family", "entry", "drop"))
        if kind == "file":
            entry[0] = dice.choice(("../x.gguf", "/etc/passwd", "", ".", "x.gguf", 3, None, "\0"))
        elif kind == "type":
            entry[1] = dice.choice((*BLOCK_TYPES, "X", 3, None))
        elif kind == "shape":
            odd = ([], [-1, -1], entry[2][::-1], [1, *entry[2]], [0], ["x"], None, [2**63], [1.5])
            entry[2] = dice.choice((*odd, [float(n) for n in entry[2]]))
        elif kind == "start":
            entry[3] = dice.choice((*ODD_COUNTS, -1, 1.5, None))
        elif kind == "both":
            shift = dice.choice((-(10**6), 1, 10**6, 2**63, -(2**63)))
            entry[3], entry[4] = entry[3] + shift, entry[4] + shift
        elif kind == "family":
            data["family"] = dice.choice(("mixtral", "x", 3, None, [], {}))
        elif kind == "entry":
            data["tensors"][name] = dice.choice((None, [], [1] * 5, {}, "abcde"))
        else:
            del data["tensors"][name]
        text = json.dumps(data)
    except (KeyError, TypeError, ValueError, IndexError):
        return "index left"
    index.write_text(text if dice.random() < 0.95 else text[: len(text) // 2])
    return f"index {kind} of {name}: {data['tensors'].get(name)!r}"[:160]


def model_path(folder: Path, dice: random.Random) -> Path:
    """What is given as the model: a folder, or a GGUF file in it."""
    files = sorted(folder.glob("*.gguf"))
    is_folder = not files or (folder / "gguf-tensors.json").exists() or dice.random() < 0.5
    return folder if is_folder else files[0]
