"""`cenacle calibrate`, as it is run, but with less to measure."""

import math
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cenacle.calibration import calibrate, rank_worker
from cenacle.calibration.calibrate import Calibration, Kernel, Measured
from cenacle.cli.main import make_app
from cenacle.errors import InputError
from cenacle.planning import catalog

SMALL = Path(__file__).parent / "small_measurements.py"


def test_two_nodes_of_this_machine_become_a_machine_and_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    monkeypatch.setattr(rank_worker, "PROGRAM", (sys.executable, str(SMALL), "--rank"))
    monkeypatch.setattr(calibrate, "TIMED_ROUNDS", 3)
    command = ["calibrate", "--quick", "--nodes", "2"]
    done = CliRunner().invoke(make_app(), command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "catalog" / "this.toml").exists()
    known = catalog.load_catalog()
    machine, link = known.machine("this"), known.link("measured")
    # Which of the figures is larger depends on what else runs.
    for figure in (machine["overhead_us"], machine.alone["overhead_us"], machine.expert_s):
        assert 0 <= figure < math.inf
    assert 0 < link["latency_us"] < 1e6
    assert machine.bytes_per_s > 0


def test_the_result_is_written_where_the_user_says(tmp_path, monkeypatch):
    facts = {"date": "2026-11-23", "cenacle": "0", "mlx": "0", "processor": "some"}
    facts |= {"device": "cpu", "backend": "alone"}
    numbers = (Measured(0.0, 0.0), Measured(20.0, 0.1), None, {}, None, 16.0, facts)
    result = Calibration(
        *("shed", 1, {512: Measured(10.0, 0.1)}, {"a": Kernel(9.0, 0.1, 50.0)}, None, *numbers)
    )
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: result)
    file = tmp_path / "new" / "shed.toml"
    command = ["calibrate", "--name", "shed", "--out", str(file)]
    done = CliRunner().invoke(make_app(), command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert str(file) in done.output
    assert catalog.load_catalog([file]).machine("shed")["bandwidth_gb_s"] == 10


def test_more_nodes_than_can_be_measured_are_refused():
    with pytest.raises(InputError, match="nodes: expected 1 to 8, got 9"):
        calibrate.calibrate("this", 9, quick=True)
