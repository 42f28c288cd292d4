"""The paper's schedules: mlx-lm's logits under each, and exactly the experts that each runs."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from one_process import in_threads

from cenacle.core.plan import Plan
from cenacle.errors import PlanError
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.loader import load_rank_model
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.step_timer import StepTimer
from cenacle.model.synth import synth
from cenacle.research.paper_schedules import CENTRALIZED_SCHEDULES, SCHEDULES, install_schedule

PROMPT = [(37 * i + 11) % 251 for i in range(12)]
DECODED = [17, 200, 3, 90]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("schedules")
    synth(root / "dbrx", family="dbrx")
    synth(root / "qwen3_moe", family="qwen3_moe")
    synth(root / "quantized", family="dbrx", quantize=8, group_size=32)
    synth(root / "deepseek_v3", family="deepseek_v3")
    return root


@cache
def expected(folder):
    """mlx-lm's own logits of the last prompt token and of each that follows."""
    model, _ = load_model(folder)
    return steps(lambda ids, cache: model(ids, cache=cache), model)


def steps(run, model):
    cache = make_prompt_cache(model)
    found = []
    for ids in ([*PROMPT], *([t] for t in DECODED)):
        found.append(run(mx.array([ids]), cache)[0, -1].astype(mx.float32))
    return np.stack([np.array(f) for f in found])


def on_ranks(folder, nodes, name, kernels):
    """Rank 0's logits, the layers of each rank, and each rank's number of exchanges."""
    spec = read_model_spec(Checkpoint.open(folder))
    plan = Plan.whole(spec, nodes)

    def rank(collective):
        model = load_rank_model(Checkpoint.open(folder), plan, collective.rank, lambda *_: None)
        layers = install_schedule(model, spec.family, plan, collective, StepTimer(), kernels, name)
        if name in CENTRALIZED_SCHEDULES and collective.rank:
            for length in (len(PROMPT), *(1 for _ in DECODED)):
                for layer in layers:
                    layer.serve(1, length, spec.top_k)
            return None, layers, collective.traffic.calls
        logits = steps(lambda ids, cache: model(ids, cache=cache), model)
        return logits, layers, collective.traffic.calls

    return in_threads(nodes, rank)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("family", "nodes", "kernels"),
    [
        ("dbrx", 2, "mlx"),
        ("qwen3_moe", 3, "mlx"),
        ("dbrx", 2, "native"),
        ("quantized", 2, "native"),
    ],
)
def test_every_schedule_gives_mlx_lms_logits(folders, name, family, nodes, kernels):
    want = expected(folders / family)
    results = on_ranks(folders / family, nodes, name, kernels)
    error = np.abs(results[0][0] - want).max() / np.abs(want).max()
    assert error <= (5e-4 if family == "quantized" else 1e-4)
    layers = len(results[0][1])
    per_layer = 2 if name in CENTRALIZED_SCHEDULES else 1
    assert [r[2] for r in results] == [per_layer * layers * (1 + len(DECODED))] * nodes


def test_what_each_schedule_runs(folders):
    """Of 4 tokens of one layer: the chosen experts first, and what is on top of them."""
    ran = {}
    for name in SCHEDULES:
        results = on_ranks(folders / "dbrx", 2, name, "mlx")
        layers = [r[1][0] for r in results]
        ran[name] = [[layer.computed_experts(np.array(ids)) for layer in layers] for ids in CHOSEN]
    held = [set(range(4)), set(range(4, 8))]
    for tokens in ran.values():
        for ids, both in zip(CHOSEN, tokens, strict=True):
            for rank, run in enumerate(both):
                own = held[rank] & set(ids)
                assert set(run) >= own
                assert set(run) <= held[rank]
                assert len(set(run)) == len(run)
                assert set(run[: len(own)]) == own
    assert [[len(r) for r in both] for both in ran["naive"]] == [[2, 0], [1, 1], [0, 2], [2, 0]]
    assert [[len(r) for r in both] for both in ran["P-LB"]] == [[4, 4]] * 4
    for name in ("P-LR", "P-LR-D"):
        assert [[len(r) for r in both] for both in ran[name]] == [[2, 2], [1, 1], [2, 2], [2, 2]]


CHOSEN = ([0, 1], [2, 4], [5, 6], [0, 3])


def test_the_least_recently_used_expert_is_run_on_top(folders):
    layer = on_ranks(folders / "dbrx", 2, "P-LR-D", "mlx")[0][1][0]
    layer._recent = [3, 1, 0, 2]
    assert layer.computed_experts(np.array([5, 6])) == [3, 1]  # none of its own, two on top
    assert layer.computed_experts(np.array([0, 5])) == [0]
    assert layer.computed_experts(np.array([4, 7])) == [2, 3]
    assert layer._recent == [1, 0, 2, 3]


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "P-LB"), ("dbrx", "nonsense")])
def test_what_cannot_be_scheduled_is_refused(folders, family, name):
    with pytest.raises(PlanError, match="schedule"):
        on_ranks(folders / family, 2, name, "mlx")
