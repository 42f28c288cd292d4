"""The predicted speed that is shown beside the measured one."""

import json
from pathlib import Path

import pytest

import cenacle
from cenacle.calibration.calibrate import Calibration, Kernel, Measured
from cenacle.core.model_spec import ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.planning.choose_plan import choose_plan
from cenacle.planning.plan_cost import local_measurements
from cenacle.server.expected_speed import SpeedPrediction, predict_speed

CONFIG = json.loads(
    (Path(cenacle.__file__).parent / "demo" / "demo_model" / "config.json").read_text()
)
LAYERS, EXPERTS = CONFIG["n_layers"], CONFIG["ffn_config"]["moe_num_experts"]
SPEC = ModelSpec(
    "dbrx", LAYERS, tuple(MoELayer(n, EXPERTS, 200_000, units=4) for n in range(LAYERS)),
    CONFIG["ffn_config"]["moe_top_k"], 4_000_000, 512, CONFIG["vocab_size"], "float32",
)  # fmt: skip
FACTS = {
    "date": "2026-11-23", "cenacle": "0", "mlx": "0", "processor": "some", "device": "cpu",
    "backend": "mesh", "threads": 1,
}  # fmt: skip


@pytest.fixture
def catalog(tmp_path, monkeypatch):
    """The user's catalog, empty."""
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    folder = tmp_path / "catalog"
    folder.mkdir()
    return folder


def calibrated(folder, gb_s, all_reduce_us=100.0, nodes=2, alone_gb_s=None):
    times = {1000: Measured(all_reduce_us, 0.1), 100_000: Measured(2 * all_reduce_us, 0.1)}
    calibration = Calibration(
        "this", nodes, {512: Measured(gb_s, 0.01)}, {"a": Kernel(gb_s, 0.0, 50.0)},
        {"a": alone_gb_s} if alone_gb_s else None, Measured(0.0, 0.0), Measured(20.0, 0.1), None,
        times if nodes > 1 else {}, Measured(all_reduce_us, 0.1) if nodes > 1 else None, 16.0,
        FACTS,
    )  # fmt: skip
    (folder / "this.toml").write_text(calibration.to_toml())


def test_without_a_calibration_there_is_only_a_reason(catalog):
    assert "cenacle calibrate" in predict_speed(Plan.whole(SPEC, 1), CONFIG, "demo")
    calibrated(catalog, 10.0, nodes=1)
    assert isinstance(predict_speed(Plan.whole(SPEC, 1), CONFIG, "demo"), SpeedPrediction)
    reason = predict_speed(Plan.whole(SPEC, 2), CONFIG, "demo")
    assert "link" in reason
    assert "cenacle calibrate --nodes 2" in reason


def test_an_incomplete_config_is_a_reason(catalog):
    calibrated(catalog, 10.0)
    assert "cannot predict" in predict_speed(Plan.whole(SPEC, 2), {"model_type": "dbrx"}, "demo")


@pytest.mark.parametrize("plan", [
    Plan.whole(SPEC, 1), Plan.whole(SPEC, 2), Plan.sliced(SPEC, 2), Plan.replicated(SPEC, 4),
    Plan.sliced(SPEC, 2, (3, 1)),
])  # fmt: skip
def test_timings_add_up_and_follow_the_calibration(catalog, plan):
    calibrated(catalog, 10.0)
    slow = predict_speed(plan, CONFIG, "demo")
    assert isinstance(slow, SpeedPrediction), slow
    assert set(slow.step_timings_ms) == {
        "trunk",
        "experts",
        "all_reduce",
        "waiting",
        "rest",
        "total",
    }
    parts = sum(v for k, v in slow.step_timings_ms.items() if k != "total")
    assert (
        parts
        == pytest.approx(slow.step_timings_ms["total"])
        == pytest.approx(1000 / slow.tok_per_s)
    )
    calibrated(catalog, 20.0)
    fast = predict_speed(plan, CONFIG, "demo")
    assert fast.step_timings_ms["experts"] == pytest.approx(slow.step_timings_ms["experts"] / 2)
    # What one process reads while the others are idle concerns nobody but a single one.
    calibrated(catalog, 10.0, alone_gb_s=20.0)
    alone = predict_speed(plan, CONFIG, "demo")
    same = slow if plan.nodes > 1 else fast
    assert alone.step_timings_ms == pytest.approx(same.step_timings_ms)
    if plan.nodes > 1:
        calibrated(catalog, 20.0, all_reduce_us=200.0)
        late = predict_speed(plan, CONFIG, "demo")
        assert late.step_timings_ms["all_reduce"] > 1.5 * fast.step_timings_ms["all_reduce"] > 0
    else:
        assert fast.step_timings_ms["all_reduce"] == 0


def test_the_placement_is_chosen_by_the_calibration(catalog):
    """Not by assumed numbers: with a slow all-reduce, sharding the trunk does not pay."""
    assert "not calibrated" in local_measurements(CONFIG, 2)
    calibrated(catalog, 10.0)
    measured = local_measurements(CONFIG, 2, latency_s=0.001)
    assert measured.bytes_per_s == 10e9
    assert measured.latency_s == pytest.approx(1.1e-3, rel=0.05)
    assert "calibrated" in choose_plan(SPEC, 2, measured=measured)[1]
    (catalog / "this.toml").write_text("nonsense")
    assert "cannot predict" in local_measurements(CONFIG, 2)
