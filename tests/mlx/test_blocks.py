"""Whole parts of a layer as one node, against mlx-lm's own classes and against small steps."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache
from mlx_lm.utils import load_model
from one_process import load_rank
from test_native import normal

from cenacle import native
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.model import native_blocks
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.config_catalog import tiny_config
from cenacle.model.expert_parallel import ExpertParallel
from cenacle.model.native_layers import native_weights
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason())


def close(got: mx.array, expected: mx.array, tolerance: float = 5e-6) -> bool:
    assert got.shape == expected.shape
    return float(mx.abs(got - expected).max()) <= tolerance * max(
        float(mx.abs(expected).max()), 1e-6
    )


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (16, 4), (32, 32), (513, 8)])
def test_routing(kernels, experts, k, normalized):
    scores = normal(3, 5, experts) * 4
    gates = mx.softmax(scores, axis=-1, precise=True)
    expected = mx.argsort(-gates, axis=-1)[..., :k]
    weight = mx.take_along_axis(gates, expected, axis=-1)
    if normalized:
        weight = weight / weight.sum(axis=-1, keepdims=True)
    for route_scores in (scores, mx.contiguous(scores.swapaxes(0, 2)).swapaxes(0, 2)):
        ids, got = kernels.route(route_scores, k, normalized)
        assert mx.array_equal(ids, expected.astype(mx.uint32))
        assert close(got, weight, 1e-6)


def test_invalid_routing_is_rejected(kernels):
    for scores, k in ((normal(2, 4), 5), (normal(2, 4), 0), (normal(2, 4).astype(mx.float16), 2)):
        with pytest.raises(ValueError, match="route"):
            kernels.route(scores, k, True)


@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_weighted_sum_of_experts(kernels, tokens):
    """Experts that another rank holds add nothing, whatever their weights."""
    stacked = [
        kernels.Weights(
            *(mx.unflatten(a, 0, (6, -1)) for a in mx.quantize(w, 32, 4)), None, 4, 32, "affine"
        )
        for w in (normal(6 * 32, 64, seed=1), normal(6 * 32, 64, seed=2))
    ]
    down = kernels.Weights(
        *(mx.unflatten(a, 0, (6, -1)) for a in mx.quantize(normal(6 * 64, 32, seed=3), 32, 4)),
        None,
        4,
        32,
        "affine",
    )
    rows = mx.array(np.array([0, -1, 1, 2, 3, -1, 4, 5], np.int32))
    stack = kernels.Stack(stacked, down, rows, 0, 0.0, 0.0)
    x = normal(tokens, 64)
    ids = mx.array(np.random.default_rng(tokens).integers(0, 8, (tokens, 3)))
    route_scores = mx.where(rows[ids] < 0, mx.nan, normal(tokens, 3, seed=9))
    each = kernels.experts(x, ids, stack)
    expected = (each * mx.where(rows[ids] < 0, 0, route_scores)[..., None]).sum(axis=-2)
    assert close(kernels.experts(x, ids, stack, route_scores), expected)
    with pytest.raises(ValueError, match="weight for each"):
        kernels.experts(x, ids, stack, route_scores[:, :2])


@pytest.mark.parametrize("held", [6, 0])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_a_norm_before_and_an_addition_after_experts_give_the_bits_of_each_alone(
    kernels, threads, tokens, held
):
    stacked = [nn.QuantizedLinear(64, 6 * 32, False, 32, 4) for _ in range(2)]
    stacked.append(nn.QuantizedLinear(32, 6 * 64, False, 32, 4))
    shapes = [
        [mx.unflatten(a, 0, (6, -1)) for a in layer.parameters().values()] for layer in stacked
    ]
    *inputs, down = (kernels.Weights(*arrays, None, 4, 32, "affine") for arrays in shapes)
    rows = mx.array([*range(held), *(-1 for _ in range(held, 7))], dtype=mx.int32)
    stack = kernels.Stack(inputs, down, rows, 0, 0.0, 0.0)
    x, norm = normal(tokens, 64), 1 + normal(64, seed=2) / 4
    normed = kernels.rms_norm(x, norm, 1e-5)
    for router in (nn.Linear(64, 6, bias=False), nn.QuantizedLinear(64, 6, False, 32, 4)):
        gate = native_weights(router)
        ids, weights = kernels.route(kernels.linear(normed, gate), 2, True)
        expected = kernels.experts(normed, ids, stack, weights)
        for n in (1, 2, 3):
            threads(n)
            got, chosen = kernels.moe(x, gate, stack, 2, True, norm, 1e-5)
            assert mx.array_equal(chosen, ids)
            assert mx.array_equal(got, expected)
            assert mx.array_equal(kernels.moe(normed, gate, stack, 2, True)[0], expected)
            added = kernels.moe(x, gate, stack, 2, True, norm, 1e-5, add=True)[0]
            assert mx.array_equal(added, x + expected)
    with pytest.raises(ValueError, match="width 64"):
        kernels.moe(x, gate, stack, 2, True, norm[:32], 1e-5)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dims", [16, 32])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (3, 1), (2, 40)])
@pytest.mark.parametrize("offset", [0, 1000, "each"])
def test_queries_keys_and_values(kernels, batch, length, offset, dims, normed):
    layers = [nn.Linear(64, rows, bias=True) for rows in (6 * 32, 2 * 32, 2 * 32)]
    made = [native_weights(layer) for layer in layers]
    norms = [1 + normal(32, seed=n) / 4 if normed else None for n in (1, 2)]
    x = normal(batch, length, 64)
    at = mx.arange(batch) * 7 - 3 if offset == "each" else offset
    got = kernels.qkv(
        x,
        *made,
        width=32,
        q_norm=norms[0],
        k_norm=norms[1],
        q_eps=1e-6,
        k_eps=1e-5,
        dims=dims,
        traditional=False,
        base=1e4,
        scale=0.5,
        offset=at,
    )
    for i, layer in enumerate(layers):
        expected = mx.unflatten(layer(x), -1, (-1, 32))
        if i < 2 and normed:
            expected = mx.fast.rms_norm(expected, norms[i], (1e-6, 1e-5)[i])
        expected = expected.swapaxes(1, 2)
        if i < 2:
            expected = mx.fast.rope(
                expected, dims, traditional=False, base=1e4, scale=0.5, offset=at
            )
        assert close(got[i], expected, 1e-5)
        # Its layout must be what it says: a cache copies it.
        assert mx.array_equal(mx.contiguous(got[i]), mx.array(np.array(got[i])))


def test_attention_laid_out_for_the_projection_after_it(kernels):
    q, k, v = normal(2, 6, 5, 32), normal(2, 2, 30, 32), normal(2, 2, 30, 32)
    for mask in (None, "causal"):
        expected = kernels.scaled_dot_product_attention(q, k, v, scale=0.2, mask=mask)
        got = kernels.attend(q, k, v, 0.2, mask)
        assert mx.array_equal(got, expected.swapaxes(1, 2).flatten(2))
    half = [a.astype(mx.float16) for a in (q, k, v)]
    assert kernels.attend(*half, 0.2).shape == (2, 5, 192)


BLOCKS = ["dbrx", "jamba", "mixtral", "qwen3_moe"]
ATTENTION = [
    "Klear",
    "dots1",
    "ernie4_5_moe",
    "granitemoe",
    "mellum",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder and mlx-lm's own model for each family."""
    made = {}
    for family in {*BLOCKS, *ATTENTION}:
        folder = tmp_path_factory.mktemp("models") / family
        synth(folder, family=family)
        made[family] = folder, load_model(folder)[0]
    return made


def swapped(folder):
    plan = Plan.whole(read_model_spec(Checkpoint.open(folder)), 1)
    return load_rank(folder, plan, SingleRank(), kernels="native")


@pytest.mark.parametrize("family", BLOCKS)
def test_native_blocks_match_mlx_lm(models, family):
    folder, theirs = models[family]
    ours = swapped(folder)
    found = [m for _, m in ours.named_modules() if isinstance(m, ExpertParallel)]
    assert found
    assert all(type(m.block) is native_blocks.NativeBlock for m in found)
    ids = mx.array([[5, 9, 2, 77, 1]])
    assert close(ours(ids), theirs(ids).astype(mx.float32), 1e-4)


def test_unnormalized_routing_weights(tmp_path):
    config = tiny_config("qwen3_moe") | {"norm_topk_prob": False}
    synth(tmp_path / "as-they-are", config=config, dtype="float32")
    theirs, ours = load_model(tmp_path / "as-they-are")[0], swapped(tmp_path / "as-they-are")
    ids = mx.array([[5, 9, 2, 77, 1]])
    assert close(ours(ids), theirs(ids), 1e-4)


@pytest.mark.parametrize("family", ATTENTION)
def test_native_attention_matches_mlx_lm_with_every_cache(models, family):
    folder, theirs = models[family]
    ours = swapped(folder)
    layers = len(theirs.layers)
    assert any(type(m) is native_blocks.NativeAttention for _, m in ours.named_modules())
    ids = mx.array([[5, 9, 2, 77, 1, 8], [0, 0, 3, 4, 6, 7]])
    makers = {
        "plain": lambda: [KVCache() for _ in range(layers)],
        "batched": lambda: [BatchKVCache([0, 2]) for _ in range(layers)],
    }
    for name, make in makers.items():
        mine, others = make(), make()
        for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
            got, expected = ours(part, cache=mine), theirs(part, cache=others).astype(mx.float32)
            assert close(got, expected, 1e-4), name


def test_attention_over_a_quantized_cache(tmp_path):
    config = tiny_config("qwen3_moe") | {"head_dim": 32}
    synth(tmp_path / "wide", config=config, dtype="float32")
    theirs, ours = load_model(tmp_path / "wide")[0], swapped(tmp_path / "wide")
    mine, others = ([KVCache().to_quantized(32, 8) for _ in theirs.layers] for _ in range(2))
    for part in ([[5, 9, 2, 77]], [[1]]):
        got, expected = ours(mx.array(part), cache=mine), theirs(mx.array(part), cache=others)
        assert close(got, expected, 2e-3)
