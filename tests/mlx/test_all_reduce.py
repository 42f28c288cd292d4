"""All-reduces: one per MoE layer, the expected bytes, the same bits on every rank."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import VECTORS, in_threads, run_ranks

from cenacle.collective.base import Collective, RoutingDecision
from cenacle.collective.delayed import DelayedCollective, WrappedCollective
from cenacle.collective.single import SingleRank

WIDTH, LAYERS = 64, 2  # of every recorded model
FAMILIES = ("dbrx", "mixtral", "qwen3_moe")
PROMPT = [[3, 141, 59, 26, 53, 58, 97]]


class RecordingCollective(WrappedCollective):
    """Records the shape and dtype of every all-reduce, in order, in `calls`."""

    def __init__(self, inner: Collective) -> None:
        super().__init__(inner)
        self.calls: list[tuple[tuple[int, ...], mx.Dtype]] = []

    def _all_sum(self, x: mx.array, routing: RoutingDecision | None) -> mx.array:
        self.calls.append((tuple(x.shape), x.dtype))
        return self._inner.all_sum(x, routing)


def prefill_and_decode(model, collective):
    """Logits of a prompt and of two more tokens, with the all-reduces of each."""
    cache = make_prompt_cache(model)
    results = []
    for tokens in (PROMPT, [[93]], [[23]]):
        before = len(getattr(collective, "calls", [])), collective.traffic.bytes
        logits = model(mx.array(tokens), cache=cache)
        mx.eval(logits)
        calls = getattr(collective, "calls", [])[before[0] :]
        results.append((np.array(logits), calls, collective.traffic.bytes - before[1]))
    return results


@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_all_reduce_per_layer_and_the_same_bits_everywhere(family, nodes):
    ranks = run_ranks(VECTORS / family, nodes, prefill_and_decode, RecordingCollective)
    (single,) = run_ranks(VECTORS / family, 1, prefill_and_decode)
    for rank in ranks:
        for (logits, calls, nbytes), length, first, (expected, _, _) in zip(
            rank, (7, 1, 1), ranks[0], single, strict=True
        ):
            assert calls == [((1, length, WIDTH), mx.float32)] * LAYERS
            assert nbytes == LAYERS * length * WIDTH * 4
            assert np.array_equal(logits, first[0]), "ranks differ in their bits"
            np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_uneven_weights_and_ranks_of_one_expert():
    uneven = run_ranks(VECTORS / "mixtral", 2, prefill_and_decode, shares=(7, 1))
    each = run_ranks(VECTORS / "mixtral", 8, prefill_and_decode)
    (single,) = run_ranks(VECTORS / "mixtral", 1, prefill_and_decode)
    for ranks in (uneven, each):
        for rank in ranks:
            for (logits, _, _), (expected, _, _) in zip(rank, single, strict=True):
                np.testing.assert_allclose(
                    logits, expected, rtol=0, atol=5e-6 * np.abs(expected).max()
                )


def test_delay_once_per_all_reduce():
    delays = [[], []]

    def delayed(collective):
        return DelayedCollective(collective, 0.25, delays[collective.rank].append)

    ranks = run_ranks(VECTORS / "mixtral", 2, prefill_and_decode, delayed)
    plain = run_ranks(VECTORS / "mixtral", 2, prefill_and_decode)
    assert delays == [[0.25] * 3 * LAYERS] * 2
    for rank, other in zip(ranks, plain, strict=True):
        for (logits, _, nbytes), (same, _, _) in zip(rank, other, strict=True):
            assert np.array_equal(logits, same)
            assert nbytes > 0


def test_delay_comes_after_the_all_reduce():
    order = []

    class Logged(SingleRank):
        def _all_sum(self, x, routing):
            order.append("all-reduce")
            return x

    DelayedCollective(Logged(), 1.0, lambda s: order.append(f"sleep {s:g}")).all_sum(mx.ones(3))
    assert order == ["all-reduce", "sleep 1"]


def test_broadcast_gives_every_rank_the_source_s_token():
    def broadcast(collective):
        return collective.broadcast_from(
            0, mx.array([10 + collective.rank, 20 - collective.rank])
        ).tolist()

    assert in_threads(3, broadcast) == [[10, 20]] * 3


def test_broadcast_keeps_the_type_of_token_ids():
    def broadcast(collective):
        return collective.broadcast_from(0, mx.argmax(mx.random.normal((2, 9)), axis=-1)).dtype

    assert in_threads(2, broadcast) == [mx.uint32] * 2


def test_all_sum_adds_and_counts():
    def add(collective):
        y = collective.all_sum(mx.full((3,), float(collective.rank + 1)))
        collective.barrier()
        return y.tolist(), collective.traffic.calls, collective.traffic.bytes

    assert in_threads(3, add) == [([6.0, 6.0, 6.0], 2, 16)] * 3


def test_a_single_rank_returns_its_input():
    collective = SingleRank()
    x = mx.array([1.5, -2.0])
    assert collective.all_sum(x) is x
    assert collective.broadcast_from(0, x) is x
    collective.barrier()
    collective.close()
    assert (collective.rank, collective.size) == (0, 1)


def test_rank_that_fails_ends_the_others():
    def fail(collective):
        if collective.rank == 1:
            raise ValueError("rank 1 has enough")
        collective.barrier()

    with pytest.raises(ValueError, match="enough"):
        in_threads(2, fail)
