"""Slicing: what ranks read makes the whole, each byte once, in every format of checkpoints."""

import json
import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from one_process import VECTORS, in_threads, load_rank

from cenacle import native
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.errors import CheckpointError, PlanError
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.config_catalog import tiny_config
from cenacle.model.loader import build_model
from cenacle.model.slicing import ModelLayout, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth
from cenacle.model.tensor_parallel import MAX_VERIFIED_POSITIONS
from cenacle.model.tensor_reader import TensorPiece, TensorView, read_piece
from cenacle.model.tensor_slice import TensorSlice
from support.products import in_turn

IO = Path("/proc/self/io")
WEIGHTS = "model.safetensors"


def bytes_read() -> int:
    return int(IO.read_text().split("rchar:")[1].split()[0])


def saved(folder: Path, array: mx.array):
    mx.save_safetensors(str(folder / WEIGHTS), {"x": array})
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return Checkpoint.open(folder).tensors["x"]


def piece(tensor, shape, items, axis, ranges) -> TensorPiece:
    return TensorPiece(tensor, TensorView(shape, axis, tuple(ranges)), tuple(items))


# Reading


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8])
@pytest.mark.parametrize(
    ("shape", "wanted", "axis", "ranges"),
    [
        ((5, 3, 4), [1, 2, 4], 0, []),
        ((5, 7, 4), [0, 1, 4], 1, [(2, 5)]),
        ((5, 7, 4), [3], 1, [(0, 7)]),
        ((5, 7, 40), [0, 3], 2, [(0, 3), (10, 12), (39, 40)]),
        ((4, 8), [2], 1, [(3, 8)]),
        ((2, 700, 1200), [0, 1], 2, [(600, 1200)]),  # many blocks
        ((2, 6, 70000), [1], 2, [(10, 20), (30000, 50000)]),  # pieces far from each other
        ((1, 4, 3, 5), [0], 2, [(1, 2)]),
    ],
)
def test_a_piece_is_what_the_file_holds(tmp_path, dtype, shape, wanted, axis, ranges):
    values = np.random.default_rng(1).integers(0, 250, shape)
    tensor = saved(tmp_path, mx.array(values).astype(dtype))
    got = read_piece(piece(tensor, shape, wanted, axis, ranges))
    expected = values[wanted]
    if axis:
        expected = np.concatenate([expected.take(range(a, b), axis) for a, b in ranges], axis)
    assert got.dtype == dtype
    assert mx.array_equal(got, mx.array(expected).astype(dtype))


@pytest.mark.skipif(not IO.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("shape", "axis", "ranges", "expected"),
    [
        ((4, 100, 1000), 1, [(25, 50)], 4 * 25 * 1000 * 4),  # rows: exactly the rank's
        ((4, 100, 1000), 2, [(500, 1000)], 4 * 100 * 1000 * 4),  # gaps under two pages: all, once
        ((4, 100, 20000), 2, [(5000, 10000)], 4 * 100 * 5000 * 4),  # wide gaps: the rank's
    ],
)
def test_no_byte_is_read_twice(tmp_path, shape, axis, ranges, expected):
    tensor = saved(tmp_path, mx.zeros(shape))
    before = bytes_read()
    overhead = bytes_read() - before  # of asking
    before = bytes_read()
    read_piece(piece(tensor, shape, range(shape[0]), axis, ranges))
    got = bytes_read() - before - overhead
    assert expected - 2**13 <= got <= expected


def test_a_file_that_ends(tmp_path):
    tensor = saved(tmp_path, mx.zeros((4, 100)))
    with pytest.raises(CheckpointError, match="the file ended inside x; download it again"):
        read_piece(piece(replace(tensor, stop=tensor.stop + 1600), (8, 100), [7], 1, [(0, 50)]))


# Slices


def test_borders_inside_a_group_are_refused():
    part = TensorSlice(-1, ((0, 48),), 128)
    assert part.apply(mx.zeros((3, 16)), "weight").shape == (3, 6)  # 4 bits: 16 words of 8
    with pytest.raises(CheckpointError, match="not at borders of an axis of 4; use --placement"):
        part.apply(mx.zeros((3, 4)), "scales")
    with pytest.raises(CheckpointError, match="named qweight cannot be sliced; use --placement"):
        part.apply(mx.zeros((3, 4)), "qweight")


def test_output_biases_are_not_sliced():
    assert TensorSlice(-1, ((0, 2),), 4).apply(mx.zeros(5), "bias").shape == (5,)
    assert TensorSlice(-2, ((0, 2), (3, 4)), 4).apply(mx.zeros((6, 4)), "bias").shape == (6, 3)


# The ways in which checkpoints hold experts; each is made of what mlx-lm's own names hold


def opened(folder: Path) -> dict[str, mx.array]:
    """A checkpoint's tensors, in memory; the files are gone."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= mx.load(str(file))
    mx.eval(tensors)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    return tensors


def rewritten(folder: Path, family: str | None, change, options: dict | None = None) -> Path:
    """A synthetic checkpoint with its experts as on the hub: change(gate, up, down) by name."""
    synth(folder, family=family, **(options or {}))
    tensors = opened(folder)
    made = {}
    for name, value in tensors.items():
        head, _, tail = name.partition(".switch_mlp.")
        if not tail:
            head, _, tail = name.partition(".experts.")
        if not tail:
            made[name] = value
        elif tail == "gate_proj.weight":
            at = name.removesuffix(tail)
            parts = {
                f"{n}_{leaf}": tensors.get(f"{at}{n}_proj.{leaf}")
                for n in ("gate", "up", "down")
                for leaf in ("weight", "bias", "scales")
            }
            made |= {f"{head}.{k}": v for k, v in change(**parts).items()}
    mx.save_safetensors(str(folder / WEIGHTS), made)
    return folder


def alternate(gate, up, axis):
    return mx.stack([gate, up], axis=axis + 1).flatten(axis, axis + 1)


def gpt_oss(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, **_):
    return {
        "experts.gate_up_proj": alternate(gate_weight, up_weight, 1).swapaxes(1, 2),
        "experts.down_proj": down_weight.swapaxes(1, 2),
        "experts.gate_up_proj_bias": alternate(gate_bias, up_bias, 1),
        "experts.down_proj_bias": down_bias,
    }


def gpt_oss_mxfp4(gate_weight, up_weight, down_weight, gate_scales, up_scales, down_scales, **rest):
    def blocks(w):
        return w.view(mx.uint8).reshape(*w.shape[:2], -1, 16)

    return {
        "experts.gate_up_proj_blocks": blocks(alternate(gate_weight, up_weight, 1)),
        "experts.down_proj_blocks": blocks(down_weight),
        "experts.gate_up_proj_scales": alternate(gate_scales, up_scales, 1),
        "experts.down_proj_scales": down_scales,
        "experts.gate_up_proj_bias": alternate(rest["gate_bias"], rest["up_bias"], 1),
        "experts.down_proj_bias": rest["down_bias"],
    }


def halves_turned(gate_weight, up_weight, down_weight, **_):
    both = mx.concatenate([gate_weight, up_weight], axis=1)
    return {
        "experts.gate_up_proj": both.swapaxes(1, 2),
        "experts.down_proj": down_weight.swapaxes(1, 2),
    }


def halves(gate_weight, up_weight, down_weight, **_):
    both = mx.concatenate([gate_weight, up_weight], axis=1)
    return {"experts.gate_up_proj": both, "experts.down_proj": down_weight}


def granite(gate_weight, up_weight, down_weight, **_):
    return {
        "input_linear.weight": mx.concatenate([gate_weight, up_weight], axis=1),
        "output_linear.weight": down_weight,
    }


FORMS = {
    "gpt_oss": gpt_oss,
    "gpt_oss mxfp4": gpt_oss_mxfp4,
    "qwen3_vl_moe": halves_turned,
    "llama4": halves_turned,
    "qwen3_5_moe": halves,
    "mistral4": halves,
    "granitemoe": granite,
}


def form(tmp_path: Path, name: str) -> Path:
    family, _, mode = name.partition(" ")
    quantized = {"quantize": 4, "group_size": 32, "mode": mode} if mode else None
    return rewritten(tmp_path, family, FORMS[name], quantized)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5_moe"])
def test_fused_experts_as_wide_as_the_model(tmp_path, family):
    """As the real gpt-oss: of the down projection only the gate's shape tells the direction."""
    config = tiny_config(family)
    text = config.get("text_config", config)
    width = "moe_intermediate_size" if "moe_intermediate_size" in text else "intermediate_size"
    text[width] = text["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    rewritten(tmp_path / "model", None, FORMS[family], {"config": tmp_path / "config.json"})
    plan = Plan.sliced(read_model_spec(Checkpoint.open(tmp_path / "model")), 2)
    assert understood(tmp_path / "model", plan)
    assert_slices_make_the_whole(tmp_path / "model", plan)


def parameters(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_slices_make_the_whole(folder: Path, plan: Plan) -> None:
    whole = parameters(build_model(Checkpoint.open(folder), None, 0))
    ranks = [parameters(build_model(Checkpoint.open(folder), plan, r)) for r in range(plan.nodes)]
    cut = 0
    for name, value in whole.items():
        parts = [rank[name] for rank in ranks]
        if all(p.shape == value.shape for p in parts):
            assert all(mx.array_equal(p, value) for p in parts), name
            continue
        cut += 1
        axis = next(i for i, n in enumerate(parts[0].shape) if n != value.shape[i])
        assert mx.array_equal(mx.concatenate(parts, axis=axis), value), name
    assert cut >= 3 * len(plan.layers)


def understood(folder: Path, plan: Plan) -> bool:
    """Whether experts are sliced as they are in the file, not after mlx-lm's conversion."""
    slices = slices_for(plan, 0, ModelLayout.read(Checkpoint.open(folder)))
    return slices.unread.keys() < slices.modules.keys()


@pytest.mark.parametrize("name", FORMS)
def test_fused_experts(tmp_path, name):
    folder = form(tmp_path, name)
    plan = Plan.sliced(read_model_spec(Checkpoint.open(folder)), 3, (1, 2, 1))
    assert understood(folder, plan)
    assert_slices_make_the_whole(folder, plan)


@pytest.mark.parametrize("name", ["dbrx", "mixtral", "qwen3_moe"])
def test_hub_checkpoints(name):
    """As transformers saved them: DBRX with all experts on one axis, the others one by one."""
    folder = VECTORS / name
    plan = Plan.sliced(read_model_spec(Checkpoint.open(folder)), 4)
    assert understood(folder, plan)
    assert_slices_make_the_whole(folder, plan)


def test_shapes_that_do_not_tell(tmp_path):
    """d_model = 2 * width: which axis is which? Then tensors are cut after conversion."""
    config = tiny_config("qwen3_5_moe")
    config["text_config"]["moe_intermediate_size"] = config["text_config"]["hidden_size"] // 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"config": tmp_path / "config.json"}
    folder = rewritten(tmp_path / "model", None, FORMS["qwen3_5_moe"], options)
    plan = Plan.sliced(read_model_spec(Checkpoint.open(folder)), 2)
    assert not understood(folder, plan)
    assert_slices_make_the_whole(folder, plan)


# The trunk


@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("name", ["dbrx", "mixtral", "qwen3_moe"])
def test_sharded_trunk(name, nodes):
    """Against one rank; of many positions only the last one's logits are made."""
    folder = VECTORS / name
    spec = read_model_spec(Checkpoint.open(folder))
    plan = Plan.sliced(spec, nodes, range(1, nodes + 1) if nodes < 4 else None, trunk="sharded")
    few, many = mx.array([[3, 1, 4, 1, 5]]), mx.arange(MAX_VERIFIED_POSITIONS + 1)[None]
    whole = load_rank(folder, Plan.whole(spec, 1), SingleRank())
    expected = [whole(few), whole(many)[:, -1:]]

    def run(collective):
        model = load_rank(folder, plan, collective)
        held = sum(v.nbytes for _, v in tree_flatten(model.parameters()))
        got = [model(few)]
        calls = collective.traffic.calls
        return [*got, model(many)], held, calls

    for rank, (got, held, calls) in enumerate(in_threads(nodes, run)):
        for have, must in zip(got, expected, strict=True):
            assert have.shape == must.shape
            assert mx.abs(have - must).max() <= 1e-5 * mx.abs(must).max()
        assert held == plan.bytes_of(rank)["total"]
        assert calls == plan.all_reduces == spec.layers * 2 + 1


def test_quantized_heads_inside_a_group_are_assigned_by_key_head(tmp_path):
    """Heads of 32 in groups of 64: only two query heads together end at a border."""
    folder = synth(tmp_path, family="qwen3_moe", quantize=4, group_size=64).path
    part = next(
        p for p in read_model_spec(Checkpoint.open(folder)).dense_modules if p.kind == "attention"
    )
    assert (part.units, part.groups) == (2, 2)


def test_plan_with_another_trunk():
    spec = read_model_spec(Checkpoint.open(VECTORS / "mixtral"))
    parts = tuple(replace(p, path=p.path.replace("self_attn", "attn")) for p in spec.dense_modules)
    plan = Plan.whole(replace(spec, dense_modules=parts), 2, trunk="sharded")
    with pytest.raises(PlanError, match=r"it has no model\.layers\.0\.attn"):
        build_model(Checkpoint.open(VECTORS / "mixtral"), plan, 0)


def test_bytes_of_the_dense_modules_are_the_models():
    spec = read_model_spec(Checkpoint.open(VECTORS / "mixtral"))
    kinds = [p.kind for p in spec.dense_modules]
    assert sorted(kinds) == ["attention", "attention", "head"]
    names = {"attention": "self_attn", "head": "lm_head"}
    tensors = Checkpoint.open(VECTORS / "mixtral").tensors.values()
    for kind, name in names.items():
        held = sum(4 * math.prod(t.shape) for t in tensors if name in t.name)
        assert sum(p.bytes for p in spec.dense_modules if p.kind == kind) == held
    assert spec.embedding_bytes == 4 * 256 * 64


TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory):
    """A family's checkpoint, its spec, and the last logits of one rank; each made once."""
    made, computed = {}, {}

    def get(family, options, kernels):
        form = family, tuple(options.items())
        if form not in made:
            folder = synth(tmp_path_factory.mktemp("synth"), family=family, **options).path
            made[form] = folder, read_model_spec(Checkpoint.open(folder))
        folder, spec = made[form]
        if (form, kernels) not in computed:
            alone = load_rank(folder, Plan.whole(spec, 1), SingleRank(), kernels=kernels)
            computed[form, kernels] = np.array(alone(TOKENS)[:, -1:].astype(mx.float32))
        return folder, spec, computed[form, kernels]

    return get


UNEVEN = (
    ("qwen3_moe", {"quantize": 4, "group_size": 32}, 2, (3, 1)),
    ("qwen3_moe", {"quantize": 4, "group_size": 64}, 2, (5, 1)),
    ("gpt_oss", {"quantize": 4, "group_size": 32, "mode": "mxfp4"}, 3, (1, 2, 1)),
    ("qwen2_moe", {}, 4, (4, 1, 2, 9)),
    ("phixtral", {}, 4, (1, 2, 3, 4)),
)
# Each case has both trunks and both kernels, but not both kernels with each trunk.
CASES = [
    (*case, trunk, kernels)
    for number, case in enumerate(UNEVEN)
    for other, trunk in enumerate(("replicated", "sharded"))
    for kernels in in_turn(("mlx", "native"), number + other)
]


@pytest.mark.parametrize(("family", "options", "nodes", "shares", "trunk", "kernels"), CASES)
def test_uneven_slices(on_one_rank, family, options, nodes, shares, trunk, kernels):
    """Against one rank, through the same kernels; biases (gpt_oss, phixtral) are added once."""
    if kernels == "native" and not native.is_available():
        pytest.skip(native.unavailable_reason())
    folder, spec, expected = on_one_rank(family, options, kernels)
    plan = Plan.sliced(spec, nodes, shares, trunk=trunk)

    def run(collective):
        logits = load_rank(folder, plan, collective, kernels=kernels)(TOKENS)[:, -1:]
        return np.array(logits.astype(mx.float32))

    results = in_threads(nodes, run)
    tolerance = 1e-3 if kernels == "native" and options else 1e-5  # 16 bits, in other groups
    for got in results:
        assert (got == results[0]).all()
        assert abs(got - expected).max() <= tolerance * abs(expected).max()
