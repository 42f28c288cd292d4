"""The performance model: what must hold whatever the numbers are, and the paper's own."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from cenacle.errors import InputError, PlanError
from cenacle.planning import catalog
from cenacle.planning.perf_model import (
    PAPER_SCHEMES,
    PHASES,
    PaperConstants,
    Workload,
    all_reduce_s,
    predict,
)

KNOWN = catalog.load_catalog()
CONSTANTS = PaperConstants.from_fits(KNOWN.fits["paper"])
MACHINE = KNOWN.machine("m3-ultra-512")
MODELS = ("dbrx", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b", "qwen3.5-397b", "deepseek-v4-pro")
VARIANTS = (
    ("expert", "whole", "replicated"),
    ("expert", "sliced", "replicated"),
    ("expert", "replicated", "replicated"),
    ("expert", "sliced", "sharded"),
    ("tensor", "sliced", "sharded"),
    ("pipeline", "whole", "replicated"),
    *((scheme, "whole", "replicated") for scheme in PAPER_SCHEMES),
)
COUNTS = (2, 3, 4)


def run(workload, variant, count, machine=MACHINE, link=None):
    scheme, placement, trunk = variant
    link = link or KNOWN.link("tb5-rdma")
    return predict(workload, scheme, (machine,) * count, link, CONSTANTS, placement, trunk)


def is_possible(model, variant, count):
    try:
        return run(Workload(KNOWN.model(model), catalog.parse_quantization(4)), variant, count)
    except PlanError:
        return None


POSSIBLE = [case for case in product(MODELS, VARIANTS, COUNTS) if is_possible(*case)]


def workload_of(model, quantization, context, users):
    bits = catalog.parse_quantization(quantization)
    return Workload(KNOWN.model(model), bits, context, users, prompt_tokens=700)


quantizations = st.sampled_from(["2", "4", "4.5", "8", "16", "mxfp4"])
usages = (quantizations, st.integers(1, 60_000), st.integers(1, 8))
workloads = st.builds(workload_of, st.sampled_from(MODELS), *usages)
variants = st.sampled_from(VARIANTS)
counts = st.sampled_from(COUNTS)
cases = st.builds(
    lambda case, *usage: (workload_of(case[0], *usage), *case[1:]),
    st.sampled_from(POSSIBLE),
    *usages,
)


def run_or_reject(*arguments, **options):
    """A prediction; a case without memory for replicas is drawn again."""
    try:
        return run(*arguments, **options)
    except PlanError:
        reject()


def test_most_schemes_are_possible():
    assert len(POSSIBLE) > 0.75 * len(MODELS) * len(VARIANTS) * len(COUNTS)


@given(cases)
@settings(max_examples=30)
def test_timings_are_positive_and_add_up(case):
    p = run_or_reject(*case)
    assert set(p.step_timings) == set(PHASES)
    assert all(v >= 0 for v in p.step_timings.values())
    assert 1 / p.tok_per_s == pytest.approx(sum(p.step_timings.values()))
    assert p.step_timings[p.bound_by] == max(p.step_timings.values())
    assert p.ttft_s > sum(p.step_timings.values())
    assert len(p.bytes_per_node) == case[2]


@given(cases, st.floats(1, 10), st.sampled_from(["bandwidth_gb_s", "tflops"]))
@settings(max_examples=30)
def test_more_of_a_machine_never_slows(case, factor, key):
    slow = run_or_reject(*case)
    fast = run_or_reject(*case, MACHINE.with_fact(key, MACHINE[key] * factor, "test"))
    assert fast.tok_per_s >= slow.tok_per_s * (1 - 1e-9)
    assert fast.tok_per_s_all_users >= slow.tok_per_s_all_users * (1 - 1e-9)
    assert fast.ttft_s <= slow.ttft_s * (1 + 1e-9)


@given(cases, st.floats(1, 50))
@settings(max_examples=30)
def test_a_better_link_never_slows(case, factor):
    link = KNOWN.link("10gbe")
    base = run_or_reject(*case, link=link)
    for key, value in (
        ("gb_s", link["gb_s"] * factor),
        ("latency_us", link["latency_us"] / factor),
    ):
        better = run(*case, link=link.with_fact(key, value, "test"))
        assert better.tok_per_s >= base.tok_per_s * (1 - 1e-9)
        assert better.ttft_s <= base.ttft_s * (1 + 1e-9)


@given(workloads, variants)
@settings(max_examples=20)
def test_one_node_is_a_single_machine(workload, variant):
    one = run(workload, variant, 1)
    single = predict(workload, "single", (MACHINE,), None, CONSTANTS)
    assert one.step_timings == single.step_timings
    assert one.bytes_per_node == single.bytes_per_node


@given(workloads, counts)
@settings(max_examples=20)
def test_slices_and_layers_lose_no_bytes(workload, count):
    """Cut parts add up to the whole; what is on every node is counted on every node."""
    whole = predict(workload, "single", (MACHINE,), None, CONSTANTS)
    p = run(workload, ("pipeline", "whole", "replicated"), count)
    program = 1.5e9
    assert sum(p.bytes_per_node) - count * program == pytest.approx(
        whole.bytes_per_node[0] - program
    )
    sliced = run(workload, ("expert", "sliced", "replicated"), count)
    assert sum(sliced.bytes_per_node) >= sum(p.bytes_per_node) - 1


@given(workloads, st.integers(2, 6))
@settings(max_examples=20)
def test_slices_read_a_fair_share_and_whole_ones_no_less(workload, count):
    sliced = run(workload, ("expert", "sliced", "replicated"), count)
    whole = run(workload, ("expert", "whole", "replicated"), count)
    assert sliced.max_experts == pytest.approx(workload.shape.top_k / count)
    assert whole.max_experts >= sliced.max_experts - 1e-9
    assert whole.step_timings["experts"] >= sliced.step_timings["experts"] * (1 - 1e-9)


def test_units_by_hand():
    """One plain case from the definitions: DBRX in bf16 on one M2 Ultra."""
    machine = KNOWN.machine("m2-ultra-192")
    workload = Workload(KNOWN.model("dbrx"), catalog.parse_quantization(16), context=1)
    p = predict(workload, "single", (machine,), None, CONSTANTS)
    rate = 800e9 * machine["efficiency"]
    experts = 40 * 4 * 3 * 6144 * 10752 * 2
    assert p.step_timings["experts"] == pytest.approx(experts / rate)
    assert p.step_timings["head"] == pytest.approx(100352 * 6144 * 2 / rate)
    assert p.step_timings["overhead"] == pytest.approx(40 * machine["overhead_us"] / 1e6)
    assert p.bytes_per_node[0] == pytest.approx(131.6e9 * 2, rel=0.01)
    assert not p.fits
    assert p.missing_bytes == pytest.approx(p.bytes_per_node[0] - 0.75 * 192 * 2**30)


def test_every_slice_of_an_expert_is_begun_and_of_whole_ones_the_busiest_nodes():
    workload = Workload(KNOWN.model("dbrx"), catalog.parse_quantization(4))
    plain = MACHINE
    slow = plain.with_fact("expert_us", 10.0, "a test")
    for variant, begun in (
        (("single", "whole", "replicated"), 4),
        (("expert", "sliced", "replicated"), 4),
        (("expert", "whole", "replicated"), 2.6462),
        (("expert", "replicated", "replicated"), 2),
        (("pipeline", "whole", "replicated"), 4),
    ):
        count = 1 if variant[0] == "single" else 2
        prefill_s, free = (
            run(workload, variant, count, m).step_timings["experts"] for m in (slow, plain)
        )
        assert prefill_s - free == pytest.approx(40 * begun * 10e-6, rel=1e-3), variant


def test_a_layer_takes_longer_where_nodes_share_cores():
    workload = Workload(KNOWN.model("dbrx"), catalog.parse_quantization(4))
    machine = MACHINE.with_fact("overhead_us", 300.0, "a test")
    machine = machine.with_fact("alone_overhead_us", 100.0, "a test")
    for variant, count, each in (
        (("expert", "sliced", "sharded"), 2, 300e-6),
        (("pipeline", "whole", "replicated"), 2, 100e-6),
        (("expert", "sliced", "replicated"), 1, 100e-6),
    ):
        assert run(workload, variant, count, machine).step_timings["overhead"] == pytest.approx(
            40 * each
        ), variant


def test_the_cache_takes_memory_for_every_user():

    def held(users, context):
        workload = Workload(KNOWN.model("dbrx"), catalog.parse_quantization(4), context, users)
        return predict(workload, "single", (MACHINE,), None, CONSTANTS).bytes_per_node[0]

    each = 40 * 2 * 8 * 128 * 2  # layers, keys and values, heads, head_dim, 16 bits
    assert held(4, 8192) - held(1, 8192) == pytest.approx(3 * 8192 * each)
    assert held(1, 8192) - held(1, 4096) == pytest.approx(4096 * each)


def test_exchange_by_hand():
    link = KNOWN.link("10gbe")
    size = 12288
    latency, rate = link["latency_us"] / 1e6, link["gb_s"] * 1e9
    assert all_reduce_s(link, 1, size, CONSTANTS) == 0
    assert all_reduce_s(link, 2, size, CONSTANTS) == pytest.approx(latency + size / rate)
    ring = replace(link, topology="ring")
    assert all_reduce_s(ring, 4, size, CONSTANTS) == pytest.approx(3 * latency + 1.5 * size / rate)


def test_the_papers_setting():
    machines = KNOWN.parse_machines("2xm2-ultra-192")
    link = KNOWN.link("10gbe-grpc")
    workload = Workload(KNOWN.model("dbrx"), catalog.parse_quantization(16), context=192)
    of = {s: predict(workload, s, machines, link, CONSTANTS) for s in PAPER_SCHEMES}
    assert of["P-LR-D"].tok_per_s == pytest.approx(6.1, rel=0.2)
    assert of["P-LR-D"].tok_per_s >= 4 * of["naive"].tok_per_s
    speeds = [of[s].tok_per_s for s in PAPER_SCHEMES]
    assert speeds == sorted(speeds), "each of the paper's steps is an improvement"
    for placement in ("sliced", "replicated"):
        ours = predict(workload, "expert", machines, link, CONSTANTS, placement=placement)
        assert ours.fits
        assert ours.tok_per_s > of["P-LR-D"].tok_per_s
    # "tokens are processed one by one": the paper's prompt is as slow as its answer.
    assert of["P-LR-D"].ttft_s > 128 / of["P-LR-D"].tok_per_s


def test_unlike_machines_get_shares_by_bandwidth_within_memory():
    machines = KNOWN.parse_machines("1xm3-ultra-256,1xm4-max-64")
    workload = Workload(KNOWN.model("qwen3-235b-a22b"), catalog.parse_quantization(4))
    p = predict(
        workload, "expert", machines, KNOWN.link("tb5-rdma"), CONSTANTS, placement="weighted"
    )
    assert p.fits
    assert p.bytes_per_node[1] <= machines[1].usable_bytes
    assert p.bytes_per_node[0] > 1.5 * p.bytes_per_node[1]


def test_recorded_routing_makes_whole_experts_slower_and_slices_not():
    workload = Workload(KNOWN.model("dbrx"), catalog.parse_quantization(4))
    skewed = replace(workload, skew=1.3)
    for placement, slower in (("whole", True), ("sliced", False)):
        a = run(workload, ("expert", placement, "replicated"), 2)
        b = run(skewed, ("expert", placement, "replicated"), 2)
        assert (b.token_s > a.token_s) is slower


def test_long_contexts_cost_by_their_attention():

    def growth(model):
        trunk = [
            predict(
                Workload(KNOWN.model(model), catalog.parse_quantization(4), c),
                "single",
                (MACHINE,),
                None,
                CONSTANTS,
            )
            for c in (1024, 65536)
        ]
        return trunk[1].step_timings["trunk"] - trunk[0].step_timings["trunk"]

    # Three of four layers keep a state of fixed size; half of gpt-oss's keep 128 positions.
    assert growth("qwen3-next-80b-a3b") < growth("qwen3-30b-a3b")
    assert growth("gpt-oss-120b") < growth("qwen3-30b-a3b")
    assert growth("deepseek-v3.2") < growth("deepseek-v3")


@pytest.mark.parametrize("field", ["context", "users", "prompt_tokens"])
def test_a_workload_has_at_least_one_of_each(field):
    with pytest.raises(InputError, match=field):
        Workload(KNOWN.model("dbrx"), catalog.parse_quantization(4), **{field: 0})
