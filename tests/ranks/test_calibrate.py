"""`cenacle calibrate`, as it is run."""

import pytest
from typer.testing import CliRunner

from cenacle.calibration.calibrate import calibrate
from cenacle.cli.main import app
from cenacle.errors import InputError
from cenacle.planning import catalog


def test_two_nodes_of_this_machine_become_a_machine_and_a_link(tmp_path):
    file = tmp_path / "this.toml"
    command = ["calibrate", "--quick", "--nodes", "2", "--out", str(file)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    known = catalog.load_catalog([file])
    here, link = known.machine("this"), known.link("measured")
    assert here["overhead_us"] >= here.alone["overhead_us"] > 0
    assert 0 <= here.expert_s < 0.01
    assert 0 < link["latency_us"] < 1e6
    assert here.bytes_per_s > 0


def test_more_nodes_than_can_be_measured_are_refused():
    with pytest.raises(InputError, match="nodes: expected 1 to 8, got 9"):
        calibrate("this", 9, quick=True)
