"""What a verification compares: sums of weights whatever the placement, answers, links."""

import contextlib
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from one_process import VECTORS

import cenacle
from cenacle import verification
from cenacle.cluster.head import GroupMembership
from cenacle.cluster.membership import Node
from cenacle.cluster.messages import UNKNOWN_NODE
from cenacle.core.link import Link
from cenacle.core.plan import Plan
from cenacle.errors import ClusterError, PlanError
from cenacle.load_options import LoadOptions
from cenacle.model import checksums
from cenacle.model.architecture import named_parameters
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.checksums import compare_checksums, weight_checksums
from cenacle.model.loader import load_rank_model
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth
from cenacle.runtime import Deployment, resolve
from cenacle.verification import (
    Answer,
    ReferenceAnswers,
    Verification,
    describe_difference,
    find_bad_links,
    logprob_distance,
    tolerance_for,
    verification_prompts,
)
from support.products import in_turn

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"


def loaded(checkpoint, plan, rank=0):
    return load_rank_model(checkpoint, plan, rank, lambda done, total: None)


def slow_sum(array) -> int:
    """Word by word."""
    words = np.array(array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size])).reshape(-1)
    return sum(int(w) for w in words) % checksums.MODULUS


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint32])
def test_a_sum_is_that_of_the_words(dtype, monkeypatch):
    monkeypatch.setattr(checksums, "_CHUNK_ELEMENTS", 1000)
    array = mx.random.randint(-(2**30), 2**30, (37, 101)).astype(dtype)
    assert checksums._sum(array) == slow_sum(array)
    assert checksums._sum(array.T) == slow_sum(mx.contiguous(array.T))
    assert checksums._sum(mx.array([True, False, True])) == 2
    assert checksums._sum(mx.array([2**40 + 5, -1])) == (2**8 + 5 + 2 * (2**32 - 1)) % 2**32


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Shared experts, a dense first layer, latent attention, four bits."""
    folder = tmp_path_factory.mktemp("synth")
    synth(folder, family="qwen2_moe", quantize=4, dtype="bfloat16", overwrite=True)
    return folder


CHECKPOINTS = ("mixtral", "qwen3_moe", "quantized")
PLANS = {
    "whole": lambda spec, n, trunk: Plan.whole(spec, n, None, trunk),
    "uneven": lambda spec, n, trunk: Plan.whole(spec, n, (3, 2, 2)[:n], trunk),
    "sliced": lambda spec, n, trunk: Plan.sliced(spec, n, None, trunk),
    "replicated": lambda spec, n, trunk: Plan.replicated(spec, n, None, None, trunk),
}


def cases_of(name):
    """Ways to make a plan, numbers of nodes and trunks of a checkpoint."""
    for number, make in enumerate(PLANS):
        for nodes in (2, 3):
            turn = CHECKPOINTS.index(name) + number + nodes
            for trunk in in_turn(("replicated", "sharded"), turn):
                yield make, nodes, trunk


def test_every_two_of_checkpoint_plan_nodes_and_trunk_occur_together():
    cases = [(name, *case) for name in CHECKPOINTS for case in cases_of(name)]
    for pair in itertools.combinations(range(4), 2):
        found = {tuple(case[i] for i in pair) for case in cases}
        assert len(found) == math.prod(len({case[i] for case in cases}) for i in pair)


def plans_of(spec, name):
    for make, nodes, trunk in cases_of(name):
        with contextlib.suppress(PlanError):
            yield PLANS[make](spec, nodes, trunk)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parts_are_found_to_be_those_of_the_whole(name, quantized):
    checkpoint = Checkpoint.open(quantized if name == "quantized" else VECTORS / name)
    spec = read_model_spec(checkpoint)
    whole = weight_checksums(loaded(checkpoint, Plan.whole(spec, 1)))
    tried = 0
    for plan in plans_of(spec, name):
        ranks = [weight_checksums(loaded(checkpoint, plan, r)) for r in range(plan.nodes)]
        found = compare_checksums(whole, ranks)
        assert not found.mismatches, (plan.placement, plan.nodes, plan.trunk)
        # Key heads that two ranks share are the only parts that overlap.
        assert found.incomparable <= (0.2 * found.matching if plan.trunk == "sharded" else 0)
        tried += 1
        last = plan.layers[0].experts_of(1)[-1]
        expert = next(n for n in whole if n.endswith(f"[{last}]"))
        size, sum_ = ranks[1][expert]
        wrong = {**ranks[1], "x": [1, 1], expert: [size, (sum_ + 1) % checksums.MODULUS]}
        ((bad, blamed),) = compare_checksums(whole, [ranks[0], wrong, *ranks[2:]]).mismatches
        assert bad == expert
        assert 1 in blamed
        if plan.placement != "sliced":
            assert blamed == (1,)
    assert tried >= 4


def test_every_byte_counts(tmp_path):
    """One bit of one weight in a file: the sum that is not the same is that tensor's."""
    folder = tmp_path / "model"
    shutil.copytree(VECTORS / "mixtral", folder)
    checkpoint = Checkpoint.open(folder)
    plan = Plan.whole(read_model_spec(checkpoint), 1)
    before = weight_checksums(loaded(checkpoint, plan))
    tensor = next(t for n, t in checkpoint.tensors.items() if "experts.1" in n)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start + 40)
        byte = file.read(1)[0]
        file.seek(tensor.start + 40)
        file.write(bytes([byte ^ 1]))
    ((name, ranks),) = compare_checksums(
        before, [weight_checksums(loaded(checkpoint, plan))]
    ).mismatches
    assert name.endswith("[1]")
    assert ranks == (0,)
    assert "experts" in name or "switch_mlp" in name


def test_ranks_that_hold_the_same_are_compared_without_the_whole():
    checkpoint = Checkpoint.open(DEMO)
    plan = Plan.sliced(read_model_spec(checkpoint), 2)
    model = loaded(checkpoint, plan)
    ranks = [weight_checksums(model), weight_checksums(loaded(checkpoint, plan, 1))]
    assert verification._differing_parameters(plan, ranks) == []
    name = next(n for n, _ in named_parameters(model) if "norm" in n)
    ranks[1][name] = [ranks[1][name][0], 7]
    assert verification._differing_parameters(plan, ranks) == [name]
    assert verification._differing_parameters(replace(plan, trunk="sharded"), ranks) == []


def test_prompts_are_the_same_always_and_fit():
    assert verification_prompts(1000, None) == verification_prompts(1000, 10**6)
    assert [len(p) for p in verification_prompts(1000, None)] == [8] * 16 + [2304]
    assert len(verification_prompts(384, 1024)[-1]) + 8 < 1024
    assert {t for p in verification_prompts(384, None) for t in p} == set(range(384))


TOP = ({7: -0.1, 8: -2.5}, {3: -0.5, 4: -0.505}, {5: -1.0})
EXPECTED = Answer((7, 3, 5), TOP)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (EXPECTED, ""),
        (Answer((7, 3, 5), ({7: -0.11, 8: -2.49, 9: -9.0}, *TOP[1:])), ""),
        (Answer((7, 3, 5), ({7: -0.13, 8: -2.5}, *TOP[1:])), "id 7 was -0.100, is -0.130"),
        (Answer((7, 3, 5), (*TOP[:2], {5: math.nan})), "token 2 the log-probability of id 5"),
        # As probable as each other: from there on anything may follow.
        (Answer((7, 4, 9), (TOP[0], {3: -0.505, 4: -0.5}, {9: -4.0})), ""),
        (Answer((8, 3, 5), TOP), "token 0 was 7, is 8"),
        (Answer((7, 3), TOP[:2]), "the answer had 3 tokens, now 2"),
    ],
)
def test_answers_may_differ_by_rounding_and_no_more(got, message):
    assert Answer.from_json(json.loads(json.dumps(got.to_json()))).tokens == got.tokens
    found = describe_difference(EXPECTED, got, verification.FULL_PRECISION)
    assert message in found
    assert bool(message) == bool(found)


def test_in_few_bits_one_may_differ_by_much_but_not_most():
    far = Answer((7, 3, 5), ({7: -0.1, 8: -1.5}, *TOP[1:]))
    assert describe_difference(EXPECTED, far, verification.FULL_PRECISION)
    assert not describe_difference(EXPECTED, far, verification.REDUCED_PRECISION)
    assert logprob_distance([EXPECTED] * 20, [EXPECTED] * 19 + [far]) == 0
    assert (
        logprob_distance([EXPECTED] * 20, [far] * 20) == 1 > verification.REDUCED_PRECISION.typical
    )
    assert logprob_distance([], []) == math.inf, "nothing to compare is no agreement"


def test_what_computes_in_few_bits_may_differ_more():
    native, mlx = "Device(cpu, 0), AVX-512 kernels, 1 thread", "Device(gpu, 0)"
    assert tolerance_for("bfloat16", [native, native]) == verification.FULL_PRECISION
    assert tolerance_for("float32", [mlx, native]) == verification.FULL_PRECISION
    assert tolerance_for("bfloat16", [mlx, native]) == verification.REDUCED_PRECISION
    assert (
        tolerance_for("bfloat16", [native + ", int8 activations"]) == verification.REDUCED_PRECISION
    )


GOOD = {(0, 1): Link(50e-6, 1.1e9), (0, 2): Link(60e-6, 1e9), (1, 2): Link(55e-6, 1.2e9)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({(0, 1): Link(120e-6, 0.5e9)}, None),
        ({(0, 1): Link(50e-6, 11e6)}, "a and b carries 11 MB/s, a sound gigabit cable 110"),
        ({(0, 2): Link(9e-3, 1e9)}, "a and c takes 9.0 ms one way: Wi-Fi"),
        ({(1, 2): Link(50e-6, 0.3e9)}, "b and c carries 300 MB/s, and carried 1200"),
        ({(1, 2): Link(600e-6, 1e9)}, "b and c takes 600 us one way, and took 55"),
    ],
)
def test_links_that_are_not_what_they_were(changed, message):
    bad = find_bad_links("abc", {**GOOD, **changed}, GOOD)
    assert ([] if message is None else list(changed)) == list(bad)
    assert message is None or message in bad[next(iter(changed))]


def test_a_link_is_compared_with_the_others_where_nothing_is_known():
    slow = {**GOOD, (0, 1): Link(50e-6, 110e6)}
    assert list(find_bad_links("abc", slow, {})) == [(0, 1)]
    assert not find_bad_links("ab", {(0, 1): Link(50e-6, 110e6)}, {}), (
        "a gigabit between two is sound"
    )


def formed(link):
    members = tuple(Node(n, n, True, "", info=replace(UNKNOWN_NODE, processor="p")) for n in "ab")
    return SimpleNamespace(group=GroupMembership(1, members), links={(0, 1): link}, backend="mesh")


def test_a_bad_cable_is_found_before_anything_is_loaded(tmp_path):
    checkpoint = Checkpoint.open(DEMO)
    plan = Plan.whole(read_model_spec(checkpoint), 2)
    slow, messages = Link(50e-6, 10e6), []

    def no() -> ReferenceAnswers:
        raise AssertionError("nothing is to be loaded")

    tried = []

    def measure():
        tried.append(1)
        return {(0, 1): slow}

    test = Verification(tmp_path, False, messages.append)
    with pytest.raises(ClusterError, match=r"between a and b carries 10 MB/s.*--no-verify"):
        test.prepare(checkpoint, plan, {}, no, formed(slow), measure)
    assert len(tried) == 2, "it is measured again before it is believed"
    # Another time somebody else had used it.
    nothing = ReferenceAnswers((), (), (), 0.0)
    quick = {(0, 1): Link(50e-6, 1e9)}
    assert test.prepare(checkpoint, plan, {}, lambda: nothing, formed(slow), lambda: quick)
    # What has passed before is not kept from serving, but said.
    record = {"format": verification.RECORD_FORMAT, "passed": [test._key]}
    (tmp_path / test._record_name).write_text(json.dumps(record))
    messages.clear()
    assert not test.prepare(checkpoint, plan, {}, no, formed(slow), measure)
    assert "carries 10 MB/s" in messages[0]
    # Another plan has not passed.
    assert test.prepare(
        checkpoint, Plan.sliced(plan.spec, 2), {}, lambda: nothing, formed(quick[0, 1])
    )


def test_where_the_whole_does_not_fit_there_is_nothing_to_compare_with(tmp_path):
    checkpoint = Checkpoint.open(DEMO)
    messages = []

    def no() -> ReferenceAnswers:
        raise PlanError("rank 0 needs too much")

    test = Verification(tmp_path, True, messages.append)
    assert test.prepare(checkpoint, Plan.whole(read_model_spec(checkpoint), 2), {}, no)
    assert "nothing to compare with yet: the model does not fit" in messages[-1]


def test_every_option_that_changes_answers_is_part_of_what_passed(tmp_path):
    """A group with another all-reduce data type, kernel or cache has not passed yet."""
    checkpoint = Checkpoint.open(DEMO)
    plan = Plan.whole(read_model_spec(checkpoint), 2)

    def key(**options):
        load_options = LoadOptions(str(DEMO), 2, **options)
        deployment = Deployment(load_options, "demo", checkpoint, None, None, plan, "")
        test = Verification(tmp_path, False)
        test.prepare(
            checkpoint,
            plan,
            deployment.verification_settings(),
            lambda: ReferenceAnswers((), (), (), 0.0),
        )
        return test._key

    plain = key()
    assert key() == plain == key(recover=False, measure_every=1)
    changed = {
        **{"comm_dtype": "bf16", "backend": "ring", "kernels": "mlx", "activations": "int8"},
        **{
            "kv_dtype": "float16",
            "kv_bits": 8,
            "max_kv_size": 64,
            "prefill_chunk_size": 64,
            "max_batch_size": 2,
        },
        **{"speculative": "off", "latency_s": 0.01},
    }
    keys = [key(**{name: value}) for name, value in changed.items()]
    assert len({plain, *keys}) == len(changed) + 1


def test_the_ranks_of_a_cluster_are_ordered_what_was_verified(tmp_path):
    """One value decides how a cluster sends vectors, what is verified and what ranks are told."""
    formed = []

    class Nodes:
        def locate(self, model):
            return DEMO

        def form(self, model, cancel=None):
            formed.append(model)
            plan = Plan.whole(read_model_spec(model.checkpoint), 2)
            return SimpleNamespace(plan=plan, plan_reason="why")

    deployment = resolve(LoadOptions(str(DEMO), comm_dtype="bf16", kernels="mlx"), Nodes())
    order = deployment.load_order()
    assert formed[0].placement.comm_dtype == order.comm_dtype == "bf16"
    assert deployment.verification_settings()["comm_dtype"] == "bf16"
    assert deployment.rank_source(order).order == order
