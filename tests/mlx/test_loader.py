"""Damaged checkpoints are rejected with a reason; a rank reads and holds only its own bytes."""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import psutil
import pytest
from mlx.utils import tree_flatten
from one_process import VECTORS

from cenacle.core.model_spec import ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.demo.run import DEMO_MODEL_DIR as DEMO
from cenacle.errors import CheckpointError, PlanError
from cenacle.model import architecture
from cenacle.model.checkpoint import Checkpoint, locate_checkpoint
from cenacle.model.loader import (
    _CHUNK_WORDS,
    _is_finite,
    _own_parameters,
    build_model,
    load_rank_model,
    open_rank_model,
)
from cenacle.model.spec_reader import read_model_spec

MIXTRAL = VECTORS / "mixtral"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    shutil.copytree(MIXTRAL, tmp_path / "model", ignore=shutil.ignore_patterns("ve*"))
    return tmp_path / "model"


def open_and_load(folder: Path, nodes: int = 2) -> None:
    checkpoint = Checkpoint.open(folder)
    plan = Plan.whole(read_model_spec(checkpoint), nodes)
    for rank in range(nodes):
        load_rank_model(checkpoint, plan, rank, lambda done, total: None)


def assert_rejected(folder: Path, *patterns: str) -> None:
    """Loading must fail with a message that has all of these in it."""
    with pytest.raises(CheckpointError) as caught:
        open_and_load(folder)
    for pattern in patterns:
        assert pattern in str(caught.value)


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_tensors(folder: Path, **changes) -> None:
    """Replace tensors by name (None: take away); dots are written as __."""
    path = str(folder / WEIGHTS)
    tensors = mx.load(path)
    mx.eval(tensors)
    tensors |= {k.replace("__", "."): v for k, v in changes.items()}
    mx.save_safetensors(path, {k: v for k, v in tensors.items() if v is not None})


def change_header(folder: Path, change) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    head = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])


def test_intact_checkpoint(folder):
    open_and_load(folder)


# Files


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    for name in (str(tmp_path / "nowhere"), "./no/where", "nowhere", "~/no/where"):
        with pytest.raises(CheckpointError, match="no such folder"):
            locate_checkpoint(name)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert_rejected(folder, "has no config.json", str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe"])
def test_config_that_is_not_json(folder, content):
    (folder / "config.json").write_bytes(content)
    assert_rejected(folder, "config.json is not JSON")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"x"'])
def test_config_that_is_not_an_object(folder, content):
    (folder / "config.json").write_text(content)
    assert_rejected(folder, "config.json: expected a JSON object")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    assert_rejected(folder, "has no weights: expected files named model*.safetensors")


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_file_cut_in_its_header(folder, size):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:size])
    assert_rejected(folder, WEIGHTS, "truncated or not a safetensors file", "download it again")


@pytest.mark.parametrize("missing", [1, 1000, 300_000])
def test_file_cut_in_its_data(folder, missing):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-missing])
    assert_rejected(folder, WEIGHTS, "is truncated: tensor ", f"the file has {len(data) - missing}")


@pytest.mark.parametrize("head", [b"{" * 50, b"\xff" * 50, b"[1, 2]" + b" " * 44, b"3".ljust(50)])
def test_garbage_header(folder, head):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * 100)
    assert_rejected(folder, WEIGHTS, "the header is corrupted")


def test_header_of_nonsense_length(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"\0" * 100)
    assert_rejected(folder, WEIGHTS, "truncated or not a safetensors file")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"data_offsets": [0, 4]},
            f"tensor {NORM} of F32 [64] needs 256 bytes, its header gives it 4",
        ),
        ({"data_offsets": [-256, 0]}, f"tensor {NORM} of F32 [64] needs 256 bytes"),
        ({"data_offsets": [10**9, 10**9 + 256]}, f"is truncated: tensor {NORM} ends at byte"),
        ({"data_offsets": [0]}, f"expected dtype, shape and data_offsets for tensor {NORM}"),
        ({"data_offsets": ["a", "b"]}, f"expected dtype, shape and data_offsets for tensor {NORM}"),
        ({"data_offsets": None}, f"expected dtype, shape and data_offsets for tensor {NORM}"),
        ({"shape": [65]}, f"tensor {NORM} of F32 [65] needs 260 bytes, its header gives it 256"),
        ({"shape": None}, f"expected dtype, shape and data_offsets for tensor {NORM}"),
        ({"shape": ["x"]}, f"expected dtype, shape and data_offsets for tensor {NORM}"),
        ({"dtype": "F5"}, f"expected dtype, shape and data_offsets for tensor {NORM}"),
        ({"dtype": "F64"}, f"tensor {NORM} of F64 [64] needs 512 bytes"),
    ],
)
def test_header_with_wrong_entries(folder, entry, message):
    change_header(folder, lambda header: header[NORM].update(entry))
    assert_rejected(folder, WEIGHTS, message)


def test_entry_that_is_not_an_object(folder):
    change_header(folder, lambda header: header.update({NORM: 3}))
    assert_rejected(folder, f"data_offsets for tensor {NORM}, got 3")


def test_missing_shard(folder):
    tensors = mx.load(str(folder / WEIGHTS))
    mx.eval(tensors)
    (folder / WEIGHTS).unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    named = {}
    for number, half in enumerate(halves, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), half)
        named |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    open_and_load(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert_rejected(
        folder,
        f"{len(halves[1])} of {len(tensors)} tensors of the index are missing",
        "in model-00002-of-00002.safetensors",
    )


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": null}'])
def test_invalid_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    assert_rejected(folder, "model.safetensors.index.json: expected JSON with a weight_map")


# Tensors


def test_missing_tensor(folder):
    change_tensors(folder, model__layers__1__self_attn__q_proj__weight=None)
    assert_rejected(folder, "model.layers.1.self_attn.q_proj.weight")


def test_missing_expert(folder):
    """Rank 0's experts are there; it is rank 1's that are not."""
    change_header(
        folder,
        lambda header: [
            header.pop(k) for k in list(header) if ".0.block_sparse_moe.experts.7.w1" in k
        ],
    )
    assert_rejected(folder, "experts.7.w1")


def test_surplus_tensor(folder):
    change_tensors(folder, model__layers__0__surprise__weight=mx.zeros((2, 2)))
    assert_rejected(folder, "model.layers.0.surprise.weight")


def test_misshapen_tensor(folder):
    change_tensors(folder, lm_head__weight=mx.zeros((256, 63)))
    assert_rejected(folder, "lm_head.weight", "(256, 64)", "(256, 63)")


# What the config says


def test_unknown_family(folder):
    change_config(folder, model_type="fancy_moe")
    assert_rejected(
        folder, "neither mlx-lm nor mlx-vlm supports model_type 'fancy_moe'", "cenacle families"
    )


@pytest.mark.parametrize("kind", [None, 3, ["mixtral"]])
def test_no_family(folder, kind):
    change_config(folder, model_type=kind)
    assert_rejected(folder, "config.json: expected a model_type")


def test_missing_key(folder):
    change_config(folder, hidden_size="wide")
    assert_rejected(folder, str(folder), "mixtral")


def test_code_of_a_checkpoint_is_never_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('it was run')")
    change_config(folder, model_file="evil.py")
    assert_rejected(folder, "evil.py", "executes no code from a checkpoint")


def test_dense_model(tmp_path):
    from mlx_lm.models import llama

    config = {
        **{"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64},
        **{"intermediate_size": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-5},
        **{"num_key_value_heads": 4},
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(tmp_path / WEIGHTS), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_rejected(tmp_path, "llama is a dense model", "no experts")


# Plans


def test_more_nodes_than_experts(folder):
    with pytest.raises(PlanError, match="at most 8, the number of experts of a layer, got 9"):
        open_and_load(folder, 9)


@pytest.mark.parametrize(("experts", "layers"), [(4, 2), (16, 2), (8, 1), (8, 3)])
def test_plan_of_another_model(experts, layers):
    """With another model's plan, wrong experts would answer."""
    moe = tuple(MoELayer(i, experts, 18432) for i in range(layers))
    plan = Plan.whole(ModelSpec("mixtral", layers, moe, 2, 0, 512, 256, "float32"), 2)
    with pytest.raises(PlanError, match="the plan is of another model"):
        build_model(Checkpoint.open(MIXTRAL), plan, 0)


def test_progress_counts_the_plans_bytes():
    checkpoint = Checkpoint.open(MIXTRAL)
    plan = Plan.whole(read_model_spec(checkpoint), 3)
    for rank in range(3):
        reports = []
        load_rank_model(checkpoint, plan, rank, lambda *now, reports=reports: reports.append(now))
        total = plan.bytes_of(rank)["total"]
        assert reports[-1] == (total, total)
        assert [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_a_model_is_read_module_by_module():
    checkpoint = Checkpoint.open(MIXTRAL)
    plan = Plan.whole(read_model_spec(checkpoint), 1)
    reports = []
    with open_rank_model(checkpoint, plan, 0, lambda *now: reports.append(now)) as (model, reader):
        parameters = dict(architecture.named_parameters(model))
        assert sum(1 for m in model.modules() for _ in _own_parameters(m)) == len(parameters)
        assert reports == []
        reader.read(model.lm_head)
        reader.read(model.lm_head)  # counted once
        assert {done for done, _ in reports} == {model.lm_head.weight.nbytes}
        del model.lm_head  # taken away meanwhile, as a packed layer's weights are
    total = plan.bytes_of(0)["total"]
    assert reports[-1] == (total, total)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("value", [1.0, math.inf, -math.inf, math.nan, 0.0])
def test_scales_are_numbers(dtype, value):
    scales = mx.full((3, _CHUNK_WORDS // 2), -mx.finfo(dtype).max, dtype)
    scales[2, -1] = value
    for array in (scales, scales.T):
        expected = bool(mx.all(mx.isfinite(array)).item())
        assert _is_finite(nn.Module(), "scales", array) is expected
    assert _is_finite(nn.Module(), "weight", scales)


# Bytes

EXPERTS, LAYERS, WIDTH, HIDDEN = 16, 4, 256, 512
MB = 1_000_000

# What a rank's process reads and holds while it loads, after one rank's imports.
RANK = """
import json, re, sys
from pathlib import Path
import mlx.core as mx
import psutil
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.loader import load_rank_model
from cenacle.model.spec_reader import read_model_spec
from cenacle.core.plan import Plan

def number(file, key):
    return int(re.search(key + r":\\s*(\\d+)", Path(file).read_text())[1])

folder, nodes, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
checkpoint = Checkpoint.open(folder)
plan = getattr(Plan, sys.argv[4])(read_model_spec(checkpoint), nodes, trunk=sys.argv[5])
Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
read, held = number("/proc/self/io", "rchar"), number("/proc/self/status", "VmRSS") * 1024
model = load_rank_model(checkpoint, plan, rank, lambda done, total: None)
print(json.dumps({
    "plan": plan.bytes_of(rank)["total"],
    "whole": plan.spec.total_bytes,
    "read": number("/proc/self/io", "rchar") - read,
    "grown": number("/proc/self/status", "VmHWM") * 1024 - held,
    "peak": number("/proc/self/status", "VmHWM") * 1024,
    "active": mx.get_active_memory(),
}))
"""


def save(folder: Path, config: dict, tensors: dict[str, tuple[int, ...]]) -> None:
    mx.random.seed(1)
    arrays = {name: mx.random.normal(shape) for name, shape in tensors.items()}
    mx.save_safetensors(str(folder / WEIGHTS), arrays)
    (folder / "config.json").write_text(json.dumps(config))


def trunk(layer: int) -> dict[str, tuple[int, ...]]:
    at = f"model.layers.{layer}"
    return {
        **{f"{at}.self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in "qkv"},
        **{f"{at}.self_attn.o_proj.weight": (WIDTH, WIDTH)},
        **{f"{at}.{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")},
    }


COMMON = {
    **{"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 16},
    **{"num_key_value_heads": 16, "head_dim": 16, "vocab_size": 128, "num_experts_per_tok": 2},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False},
    **{"max_position_embeddings": 512},
}
ENDS = {"model.embed_tokens.weight": (128, WIDTH), "lm_head.weight": (128, WIDTH)}
ENDS |= {"model.norm.weight": (WIDTH,)}


def save_stacked(folder: Path) -> None:
    """qwen3_moe as mlx-lm converts it: one tensor holds a layer's experts."""
    tensors = dict(ENDS)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        tensors |= trunk(i) | {f"{at}.mlp.gate.weight": (EXPERTS, WIDTH)}
        tensors |= {f"{at}.self_attn.{n}_norm.weight": (16,) for n in "qk"}
        tensors |= {
            f"{at}.mlp.switch_mlp.{n}_proj.weight": (EXPERTS, HIDDEN, WIDTH) for n in ("gate", "up")
        }
        tensors[f"{at}.mlp.switch_mlp.down_proj.weight"] = (EXPERTS, WIDTH, HIDDEN)
    own = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "moe_intermediate_size": HIDDEN}
    own |= {"intermediate_size": 512, "decoder_sparse_step": 1, "mlp_only_layers": []}
    save(folder, COMMON | own | {"norm_topk_prob": True}, tensors)


def save_single(folder: Path) -> None:
    """mixtral as the hub has it: a tensor for every expert."""
    tensors = dict(ENDS)
    for i in range(LAYERS):
        at = f"model.layers.{i}.block_sparse_moe"
        tensors |= trunk(i) | {f"{at}.gate.weight": (EXPERTS, WIDTH)}
        for e in range(EXPERTS):
            tensors |= {f"{at}.experts.{e}.{n}.weight": (HIDDEN, WIDTH) for n in ("w1", "w3")}
            tensors[f"{at}.experts.{e}.w2.weight"] = (WIDTH, HIDDEN)
    own = {"model_type": "mixtral", "num_local_experts": EXPERTS, "intermediate_size": HIDDEN}
    save(folder, COMMON | own, tensors)


@pytest.fixture(scope="module", params=[save_stacked, save_single])
def large(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    request.param(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("how", ["whole replicated", "sliced sharded"])
def test_a_rank_reads_and_holds_its_own_bytes(large, how):
    header = struct.unpack("<Q", (large / WEIGHTS).read_bytes()[:8])[0]
    # Columns of a row of 2 KB: less than two pages lie between a rank's, so they are read too,
    # once, and never held. The trunk's rows are shorter still.
    between = 0
    if how.startswith("sliced"):
        between = 4 * LAYERS * (EXPERTS * WIDTH * HIDDEN + WIDTH * WIDTH)
        between -= between // 4
    for rank in (0, 3):
        command = [sys.executable, "-W", "error", "-c", RANK, str(large), "4", str(rank)]
        command += how.split()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        saw = json.loads(done.stdout)
        assert saw["whole"] > 95 * MB
        assert saw["plan"] < 0.3 * saw["whole"]
        assert saw["plan"] + 0.99 * between <= saw["read"]
        assert saw["read"] <= saw["plan"] + between + 3 * header + 0.5 * MB
        assert saw["active"] <= 1.05 * saw["plan"], "other ranks' experts were evaluated"
        assert saw["grown"] <= 1.1 * saw["plan"] + 16 * MB
        assert saw["peak"] <= 1.1 * saw["plan"] + 300 * MB


def test_ranks_together_have_the_files_rows(large):
    """Every expert's tensors, put together from the ranks, are the file's."""
    checkpoint = Checkpoint.open(large)
    plan = Plan.whole(read_model_spec(checkpoint), 3, (1, 2, 4))
    whole = dict(tree_flatten(build_model(checkpoint, None, 0).parameters()))
    ranks = [
        dict(tree_flatten(build_model(checkpoint, plan, rank).parameters())) for rank in range(3)
    ]
    for name, value in whole.items():
        parts = [rank[name] for rank in ranks]
        if ".switch_mlp." in name:
            assert mx.array_equal(mx.concatenate(parts), value), name
        else:
            assert all(mx.array_equal(part, value) for part in parts), name


def test_reading_a_spec_leaves_no_memory_behind():
    """A head builds one for each machine whenever it forms a group, for months."""
    checkpoint = Checkpoint.open(DEMO)
    read_model_spec(checkpoint)
    before = psutil.Process().memory_info().rss
    for _ in range(30):  # 28 MB, where the draws of their weights were kept
        read_model_spec(checkpoint)
    assert psutil.Process().memory_info().rss - before < 10e6
