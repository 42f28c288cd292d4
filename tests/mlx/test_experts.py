"""What ranks compute of a layer's experts, against `reference_experts`."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from cenacle import native
from cenacle.model.expert_parallel import (
    CompactedExperts,
    LoopedGatherLinear,
    MaskedExperts,
    NativeExperts,
    ReplicaPlacement,
    reference_experts,
)
from cenacle.model.step_timer import StepTimer
from cenacle.planning.load_balancer import assign_replicas

WIDTH, HIDDEN, COUNT = 64, 32, 6
LOCAL = [MaskedExperts, CompactedExperts]
KINDS = [(SwitchGLU, False, False), (SwitchGLU, True, False), (SwitchMLP, False, False)]
KINDS += [(SwitchMLP, True, False), (SwitchGLU, False, True), (SwitchGLU, True, True)]
SHAPES = [(1, 1), (3, 1), (1, 5), (2, 37)]  # the last is a prefill: over 64 pairs from k = 1 on
HELD = [(0, 1), (2, 3, 4), (5,)]  # uneven on purpose


def names(experts: nn.Module) -> list[str]:
    return [n for n in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2") if n in experts]


def stack(kind, bias: bool, quantized: bool, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A random stack of COUNT experts; biases too are random."""
    mx.random.seed(7)
    experts = kind(WIDTH, HIDDEN, COUNT, bias=bias)
    if bias:
        for name in names(experts):
            experts[name].bias = mx.random.normal(experts[name].bias.shape)
    experts.set_dtype(dtype)
    if quantized:
        nn.quantize(experts, group_size=32, bits=4)
    mx.eval(experts.parameters())
    return experts


def rows_of(experts: nn.Module, held) -> nn.Module:
    """The rows of a stack that one rank holds."""
    part = type(experts)(WIDTH, HIDDEN, COUNT, bias="bias" in experts[names(experts)[0]])
    for name in names(experts):
        if "scales" in experts[name]:
            part[name] = part[name].to_quantized(group_size=32, bits=4)
        for key, value in experts[name].parameters().items():
            part[name][key] = value[mx.array(list(held))]
    return part


def local_experts(cls, experts: nn.Module, held, count: int = COUNT) -> nn.Module:
    return cls(rows_of(experts, held), held, count, 0, StepTimer())


def random_inputs(shape, k: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    """Random x [*shape, WIDTH] and k different experts for each."""
    random = np.random.default_rng(k)
    chosen = [random.permutation(COUNT)[:k] for _ in range(shape[0] * shape[1])]
    ids = mx.array(np.stack(chosen).reshape(*shape, k).astype(np.uint32))
    return mx.random.normal((*shape, WIDTH)).astype(dtype), ids


def assert_close(got: mx.array, expected: mx.array, tolerance: float = 2e-6) -> None:
    assert got.shape == expected.shape
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    scale = max(mx.abs(expected).max().item(), 1e-6)
    assert mx.abs(got - expected).max().item() <= tolerance * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "bias", "quantized"), KINDS)
@pytest.mark.parametrize("cls", LOCAL)
def test_ranks_add_up_to_the_whole(cls, kind, bias, quantized, k, shape):
    experts = stack(kind, bias, quantized)
    x, ids = random_inputs(shape, k)
    total = mx.zeros((*shape, k, WIDTH))
    for held in HELD:
        part = local_experts(cls, experts, held)(x, ids)
        assert_close(part, reference_experts(experts, x, ids, held))
        elsewhere = ~np.isin(np.array(ids), held)
        assert not np.array(part)[elsewhere].any(), "not exactly zero where another rank computes"
        total = total + part
    assert_close(total, experts(x, ids))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cls", [*LOCAL, NativeExperts])
def test_replicas_are_computed_once(cls, shape):
    """Every chosen expert by exactly one rank, the one that `balance.deal` says."""
    if cls is NativeExperts and not native.is_available():
        pytest.skip(native.unavailable_reason())
    experts = stack(SwitchGLU, True, False)
    x, ids = random_inputs(shape, 3)
    holders = ((0, 1), (1, 2), (0, 2), (0, 1, 2), (2,), (0,))
    speeds = (3, 2, 1)
    counts = np.bincount(np.array(ids).reshape(-1), minlength=COUNT)
    assigned = np.array(assign_replicas(counts.tolist(), holders, speeds))
    total = mx.zeros((*shape, 3, WIDTH))
    for rank in range(3):
        held = [e for e in range(COUNT) if rank in holders[e]]
        part = cls(
            rows_of(experts, held),
            held,
            COUNT,
            0,
            StepTimer(),
            ReplicaPlacement(holders, speeds, rank),
        )(x, ids)
        mine = np.flatnonzero(assigned == rank).tolist()
        assert_close(part, reference_experts(experts, x, ids, mine))
        total = total + part
    assert_close(total, experts(x, ids))


@pytest.mark.parametrize("cls", LOCAL)
def test_one_rank_computes_the_whole(cls):
    experts = stack(SwitchGLU, False, False)
    x, ids = random_inputs((2, 5), 2)
    assert_close(local_experts(cls, experts, range(COUNT))(x, ids), experts(x, ids))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cls", LOCAL)
def test_rank_without_work(cls, shape, quantized):
    experts = stack(SwitchGLU, True, quantized)
    x = mx.random.normal((*shape, WIDTH))
    ids = mx.zeros((*shape, 2), mx.uint32) + mx.array([0, 1], mx.uint32)
    part = local_experts(cls, experts, (3, 4))(x, ids)
    assert part.shape == (*shape, 2, WIDTH)
    assert not np.array(part).any()


@pytest.mark.parametrize("cls", LOCAL)
def test_rows_need_not_be_neighbors(cls):
    experts = stack(SwitchGLU, False, False)
    x, ids = random_inputs((2, 5), 3)
    assert_close(
        local_experts(cls, experts, (0, 2, 5))(x, ids),
        reference_experts(experts, x, ids, (0, 2, 5)),
    )


@pytest.mark.parametrize("cls", LOCAL)
def test_id_that_no_rank_holds(cls):
    """LongCat gives tokens to id `count`: no rank computes them."""
    experts = stack(SwitchGLU, True, False)
    x, ids = random_inputs((1, 4), 2)
    some = mx.array(np.array([[[1, 0], [0, 0], [1, 1], [0, 1]]], dtype=bool))
    masked_ids = mx.where(some, COUNT, ids)
    for held in [*HELD, tuple(range(COUNT))]:
        expected = mx.where(some[..., None], 0, reference_experts(experts, x, ids, held))
        assert_close(local_experts(cls, experts, held)(x, masked_ids), expected)


@pytest.mark.parametrize("cls", LOCAL)
def test_nan_of_an_expert_stays_with_its_tokens(cls):
    """Absent experts are computed as row 0 by `MaskedExperts`: its NaN must not get out."""
    experts = stack(SwitchGLU, False, False)
    weight = np.array(experts.down_proj.weight)
    weight[0] = np.nan
    experts.down_proj.weight = mx.array(weight)
    x, ids = random_inputs((1, 20), 2)
    part = np.array(local_experts(cls, experts, (0, 1))(x, ids))
    assert np.array_equal(np.isnan(part).all(axis=-1), np.array(ids) == 0)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_type_is_the_same_with_and_without_work(dtype, quantized):
    """Ranks that put different types into an exchange would hang."""
    experts = stack(SwitchGLU, False, quantized, dtype)
    x, ids = random_inputs((1, 1), 1, dtype)
    types = set()
    for held in [(0, 1), (2, 3), (4, 5)]:
        part = local_experts(CompactedExperts, experts, held)
        for name in names(part.experts):
            if not quantized and dtype != mx.float32:
                part.experts[name] = LoopedGatherLinear(part.experts[name])
        y = part(x, ids)
        mx.eval(y)
        types.add((y.dtype, y.shape))
    assert types == {(dtype, (1, 1, 1, WIDTH))}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 80)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.bfloat16, 8e-3), (mx.float16, 1e-3)])
def test_looped_linear_is_a_float32_gather(dtype, tolerance, shape, bias):
    linear = stack(SwitchGLU, bias, False, dtype).gate_proj
    x, ids = random_inputs(shape, 2, dtype)
    x = mx.expand_dims(x, (-2, -3))
    got = LoopedGatherLinear(linear)(x, ids)
    weight = linear.weight.astype(mx.float32).swapaxes(-1, -2)
    expected = mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=ids)
    if bias:
        expected = expected + linear.bias.astype(mx.float32)[ids][..., None, :]
    assert got.dtype == dtype
    assert_close(got, expected, tolerance)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
def test_looped_stack_is_the_float32_stack(kind, k):
    """Through mlx-lm's own stack, sorted (over 64 pairs) and not."""
    experts, exact = stack(kind, True, False, mx.bfloat16), stack(kind, True, False, mx.bfloat16)
    exact.set_dtype(mx.float32)
    for name in names(experts):
        experts[name] = LoopedGatherLinear(experts[name])
    for shape in SHAPES:
        x, ids = random_inputs(shape, k, mx.bfloat16)
        assert_close(experts(x, ids), exact(x.astype(mx.float32), ids), 2e-2)


def test_router_ids_of_any_integer_type():
    experts = stack(SwitchGLU, False, False)
    x, ids = random_inputs((1, 3), 2)
    expected = reference_experts(experts, x, ids, (0, 1))
    for dtype in (mx.int32, mx.uint32, mx.int64):
        for cls in LOCAL:
            assert_close(local_experts(cls, experts, (0, 1))(x, ids.astype(dtype)), expected)
