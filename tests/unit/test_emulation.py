"""Emulated machines as text, and the bytes that a rank reads on them."""

from dataclasses import replace

import pytest
from test_plan import spec_of

from cenacle.core.emulation import parse_emulation
from cenacle.core.plan import Plan
from cenacle.errors import InputError
from cenacle.planning import plan_cost
from cenacle.planning.model_shapes import shape_from_config
from cenacle.planning.plan_cost import RankReads, dense_bytes, token_read_bytes

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "num_hidden_layers": 10,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def test_like_and_unlike_machines():
    alike = parse_emulation("4x(bandwidth=80GB/s),link=0.3ms")
    assert alike.bytes_per_s == (80e9,) * 4
    assert (alike.link_s, alike.node_weights) == (pytest.approx(0.3e-3), None)
    unlike = parse_emulation(" 2x(bandwidth=80GB/s) + 1x(bandwidth=0.2TB/s), link=50us, slow=10 ")
    assert unlike.node_weights == pytest.approx((0.4, 0.4, 1))
    assert unlike.run_bytes_per_s == pytest.approx((8e9, 8e9, 20e9))
    assert unlike.run_link_s == pytest.approx(0.5e-3)


def test_a_machine_alone_has_no_link():
    assert parse_emulation("1x(bandwidth=500MB/s),link=3ms,slow=2").run_link_s == 0


@pytest.mark.parametrize(
    ("text", "expected", "got"),
    [
        ("4(bandwidth=80GB/s)", "nodes such as 2x", "4(bandwidth=80GB/s)"),
        ("0x(bandwidth=80GB/s)", "1 to 64 nodes", "0"),
        ("40x(bandwidth=1GB/s)+40x(bandwidth=1GB/s),link=1ms", "1 to 64 nodes", "80"),
        ("2x(speed=80GB/s)", "the key bandwidth", "speed=80GB/s"),
        ("2x(bandwidth=80)", "in MB/s, GB/s, TB/s", "80"),
        ("2x(bandwidth=-1GB/s)", "a positive number", "-1GB/s"),
        ("2x(bandwidth=nanGB/s)", "a positive number", "nanGB/s"),
        ("2x(bandwidth=80GB/s)", "link=TIME for several nodes", "2x("),
        ("2x(bandwidth=80GB/s),link=0.3", "in us, ms, s", "0.3"),
        ("2x(bandwidth=80GB/s),link=1ms,link=2ms", "each once", "link=2ms"),
        ("2x(bandwidth=80GB/s),link=1ms,fast=2", "link=TIME or slow=FACTOR", "fast=2"),
        ("1x(bandwidth=80GB/s),slow=0.5", "slow of at least 1", "0.5"),
        ("", "nodes such as 2x", ""),
    ],
)
def test_what_cannot_be_read_is_named(text, expected, got):
    with pytest.raises(InputError) as raised:
        parse_emulation(text)
    message = str(raised.value)
    assert message.startswith("emulate: expected ")
    assert expected in message
    assert f"got {got!r}"[:-1] in message


def model():
    return replace(spec_of(experts=4, units=4), top_k=2)


@pytest.mark.parametrize("plan", [Plan.whole(model(), 2), Plan.sliced(model(), 2)])
def test_a_pass_reads_what_the_cost_model_counts_for_a_token(plan):
    shape = shape_from_config("tiny", {**CONFIG, "num_hidden_layers": plan.spec.layers})
    pairs = [(i, j) for i in range(4) for j in range(i)]  # all choices of two experts
    for rank in range(2):
        reads = RankReads(plan, rank, shape)
        assert reads.trunk + reads.head == dense_bytes(plan, rank) - plan.bytes_of(rank)["shared"]
        layers = range(reads.moe_layers)
        mean = sum(
            reads.expert_bytes(index, dict.fromkeys(pair, 1)) for pair in pairs for index in layers
        ) / len(pairs)
        expected, _ = token_read_bytes(plan)
        assert reads.trunk + reads.head + mean == pytest.approx(expected[rank], rel=1e-6)


def test_an_expert_is_read_once_for_all_tokens_and_by_one_of_its_replicas():
    plan = Plan.replicated(model(), 2, node_memory_bytes=[10**12, 10**12])
    shape = shape_from_config("tiny", {**CONFIG, "num_hidden_layers": plan.spec.layers})
    ranks = [RankReads(plan, rank, shape) for rank in range(2)]
    without = sum(reads.expert_bytes(0, {}) for reads in ranks)
    total = sum(reads.expert_bytes(0, {0: 3, 2: 1}) for reads in ranks) - without
    assert total == pytest.approx(2 * plan.spec.moe[0].expert_bytes)


def test_a_rank_reads_its_heads_part_of_the_cache():
    plan = Plan.whole(model(), 2)
    shape = shape_from_config("tiny", {**CONFIG, "num_hidden_layers": plan.spec.layers})
    assert RankReads(plan, 0, shape).cache_bytes(100) == shape.kv_read(100) > 0


def test_emulated_machines_take_only_their_reads_and_links():
    plan = Plan.sliced(model(), 2)
    config = {**CONFIG, "num_hidden_layers": plan.spec.layers}
    slow, fast, linked = (
        plan_cost.token_s(plan, plan_cost.emulated_machines(config, (rate, rate), link_s))
        for rate, link_s in ((1e9, 0.0), (2e9, 0.0), (1e9, 1.0))
    )
    assert slow == pytest.approx(2 * fast)
    assert linked - slow == pytest.approx(round(linked - slow))
