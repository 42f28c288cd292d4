"""Tables of n-grams stay on disk: whole on every node, or their rows spread over the nodes."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import in_threads, load_rank

from cenacle.core.plan import Plan
from cenacle.errors import CheckpointError
from cenacle.model import disk_tables
from cenacle.model.byte_ranges import covering_spans
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.disk_tables import DiskTable, is_table_tensor
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth
from support.own_models import load_own_model

pytest.importorskip("mlx_vlm", reason="needs the extra vlm")

IDS = mx.array([[5, 9, 2, 77, 1, 31, 8, 4, 5, 9, 2, 77]])
FAMILIES = ["deepseek_v41", "qwen4_exp"]


def logits(model) -> np.ndarray:
    return np.array(model(IDS, cache=make_prompt_cache(model)).astype(mx.float32))


def run(folder, nodes, trunk):
    plan = Plan.whole(read_model_spec(Checkpoint.open(folder)), nodes, trunk=trunk)
    return in_threads(nodes, lambda collective: logits(load_rank(folder, plan, collective)))


@pytest.mark.parametrize("quantize", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_tables_on_disk_give_what_mlx_vlm_gives(family, quantize, tmp_path):
    synth(tmp_path, family=family, quantize=quantize, group_size=32)
    expected = logits(load_own_model(tmp_path)[0])
    # Of quantized rows too, but once with more ranks.
    many = 3 if quantize is None else 4
    for nodes, trunk in ((1, "replicated"), (2, "replicated"), (many, "sharded")):
        for got in run(tmp_path, nodes, trunk):
            error = np.abs(got - expected[:, -got.shape[1] :]).max() / np.abs(expected).max()
            assert error < 1e-4, (nodes, trunk)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_needs_its_own_rows_and_holds_none(family, tmp_path):
    synth(tmp_path, family=family)
    checkpoint = Checkpoint.open(tmp_path)
    tables = [t for t in checkpoint.tensors.values() if is_table_tensor(t.name)]
    assert tables
    spec = read_model_spec(checkpoint)
    sizes = {t.name: t.stop - t.start for t in tables}
    assert spec.total_bytes == checkpoint.nbytes() - sum(sizes.values())
    layout = ModelLayout.read(checkpoint)
    for trunk in ("replicated", "sharded"):
        plan = Plan.whole(spec, 3, trunk=trunk)
        held = np.zeros((3, len(tables)), int)
        for rank in range(3):
            slices = slices_for(plan, rank, layout)
            pieces = {p.tensor.name: p for p in slices.tensors if is_table_tensor(p.tensor.name)}
            assert set(pieces) == set(sizes)
            for i, name in enumerate(sizes):
                spans = covering_spans(pieces[name].byte_ranges(0))
                held[rank, i] = sum(b - a for a, b in spans)
            assert required_ranges(slices)
        whole = list(sizes.values())
        expected = held.sum(axis=0) if trunk == "sharded" else held.mean(axis=0)
        assert expected.tolist() == whole
    with_table = load_rank(tmp_path, Plan.whole(spec, 1), in_threads(1, lambda c: c)[0])
    found = [m for m in with_table.modules() if isinstance(m, DiskTable)]
    assert found
    assert not any(m.parameters() for m in found)


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    synth(tmp_path, family="deepseek_v41")
    read = []
    monkeypatch.setattr(
        disk_tables.DiskTable,
        "_read",
        lambda self, number, rows, _read=DiskTable._read: (
            read.extend(rows) or _read(self, number, rows)
        ),
    )
    run(tmp_path, 1, "replicated")
    assert 0 < len(read) <= 2 * 4 * IDS.size  # layers with tables, columns of hashes


def test_engram_is_never_left_out_without_a_word(tmp_path):
    synth(tmp_path, family="deepseek_v41")
    (tmp_path / "tokenizer.json").rename(tmp_path / "hidden")
    plan = Plan.whole(read_model_spec(Checkpoint.open(tmp_path)), 1)
    with pytest.raises(CheckpointError, match=r"engram_token_map.json or tokenizer.json"):
        in_threads(1, lambda collective: load_rank(tmp_path, plan, collective))
    (tmp_path / "engram_token_map.json").write_text(json.dumps([0] * 512))
    with pytest.raises(CheckpointError, match="do not fit"):
        in_threads(1, lambda collective: load_rank(tmp_path, plan, collective))
