"""A recording of the demo model, and the calibration's own file."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from cenacle.calibration.calibrate import Calibration, Kernel, Measured
from cenacle.demo.run import DEMO_MODEL_DIR
from cenacle.planning import catalog
from cenacle.planning.routing_stats import RoutingTrace


def test_a_recording_of_the_demo_model(tmp_path):
    from cenacle.cli.main import make_app

    (tmp_path / "questions.txt").write_text("What is 12 + 30?\n\nSpell otter backwards.\n")
    out = tmp_path / "trace.npz"
    arguments = [
        "record-routing",
        "-m",
        str(DEMO_MODEL_DIR),
        "--prompts",
        str(tmp_path / "questions.txt"),
    ]
    arguments += ["--out", str(out), "--max-tokens", "12", "--replicas", "1", "--json"]
    result = CliRunner().invoke(make_app(), arguments, catch_exceptions=False)
    data = json.loads(result.output.splitlines()[-1])
    trace = RoutingTrace.load(out)
    assert trace.ids.shape[0] == 4
    assert trace.ids.shape[2] == 4
    assert trace.tokens == data["tokens"] > 20
    # Every token has four different experts of sixteen.
    ordered = np.sort(trace.ids, axis=2)
    assert (np.diff(ordered, axis=2) > 0).all()
    assert ordered.min() >= 0
    assert ordered.max() <= 15
    assert data["max_load"]["sliced: a fair share"] == 2
    plan = [
        "plan",
        str(DEMO_MODEL_DIR),
        "--machines",
        "2xm4-32",
        "--link",
        "10gbe",
        "--routing-trace",
        str(out),
    ]
    saved = tmp_path / "plan.json"
    result = CliRunner().invoke(make_app(), [*plan, "--save", str(saved)], catch_exceptions=False)
    assert result.exit_code == 0
    assert saved.exists()


def test_a_calibration_is_a_catalog_entry(tmp_path):
    calibration = Calibration(
        name="this",
        nodes=2,
        reads={1: Measured(50.0, 0.1), 256: Measured(20.0, 0.05)},
        kernels={"a": Kernel(10.0, 0.1, 70.0), "b": Kernel(12.0, 0.1, 90.0)},
        alone={"a": 17.0, "b": 19.0},
        expert_us=Measured(7.0, 0.3),
        overhead_us=Measured(500.0, 0.02),
        alone_overhead_us=400.0,
        all_reduces={64: Measured(40.0, 0.1), 1_000_064: Measured(540.0, 0.1)},
        model_all_reduce_us=Measured(100.0, 0.2),
        memory_gib=16.0,
        facts={
            "date": "2026-11-23",
            "cenacle": "0.1.0",
            "mlx": "0.32.4",
            "processor": 'a "fast" one',
            "device": "Device(cpu, 0)",
            "backend": "mesh",
        },
    )
    file = tmp_path / "this.toml"
    file.write_text(calibration.to_toml())
    known = catalog.load_catalog([file])
    machine, link = known.machine("this"), known.link("measured")
    assert machine["bandwidth_gb_s"] == 20
    assert machine.bytes_per_s == pytest.approx(11e9)
    assert machine.alone.bytes_per_s == pytest.approx(18e9)
    assert machine["efficiency"] == 0.55
    assert machine["overhead_us"] == 500
    assert machine.expert_s == pytest.approx(7e-6)
    assert machine.facts["overhead_us"].confidence == "M"
    assert link["latency_us"] == 100
    assert machine.alone["overhead_us"] == 400
    assert link["gb_s"] == 2.0
