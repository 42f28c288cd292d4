"""Packages of the extras: nothing needs them until they are used; then a sentence names them."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import mlx.core as mx
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
EXTRAS = {
    "plots": ("matplotlib", "plotille"),
    "peers": ("gguf",),
    "otel": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
    "vlm": ("mlx-vlm",),
}

PROGRAM = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"matplotlib", "plotille", "gguf", "mlx_vlm", "opentelemetry"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from cenacle.cli.main import main

sys.argv = ["cenacle", *sys.argv[1:]]
main()
"""

PLAN = ("plan", "dbrx", "--machines", "2xm3-ultra-512", "--link", "tb5-rdma")


def run_without_extras(folder, *arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        ((*PLAN, "--png", "plot.png"), "matplotlib", "plots"),
        ((*PLAN, "--svg", "plot.svg"), "matplotlib", "plots"),
        ((*PLAN, "--html", "report.html"), "matplotlib", "plots"),
        ((*PLAN, "--what-if", "nodes=1..3"), "plotille", "plots"),
        (("bench", "ablation", "-m", "{model}", "--out", "plots"), "matplotlib", "plots"),
        (
            (
                "bench",
                "-m",
                "{model}",
                "--peer",
                "llama.cpp={bench}",
                "--contexts",
                "8",
                "--cache-dir",
                ".",
            ),
            "gguf",
            "peers",
        ),
    ],
)
def test_a_command_names_the_extra_that_it_needs(tmp_path, arguments, package, extra):
    from cenacle.model.synth import synth

    model = synth(tmp_path / "model", family="dbrx").path
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    filled = [a.format(model=model, bench=program) for a in arguments]
    done = run_without_extras(
        tmp_path, *filled, *(("--cache-dir", ".") if extra == "peers" else ())
    )
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, message
    assert f"needs the package {package}, which is not installed" in message
    assert f"`pip install 'cenacle[{extra}]'`" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "command",
    [("synth", "--family", "cohere2_moe", "--out", "model"), ("inspect", "-m", "published")],
)
def test_a_family_of_mlx_vlm_names_the_extra_that_it_needs(tmp_path, command):
    """Also under the name that its makers publish it with."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "cohere2moe"}')
    mx.save_safetensors(str(folder / "model.safetensors"), {"x": mx.zeros(1)})
    done = run_without_extras(tmp_path, *command)
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, message
    assert "needs the package mlx_vlm, which is not installed" in message
    assert "`pip install 'cenacle[vlm]'`" in message
    assert "Traceback" not in message


def test_families_without_the_extra_say_that_they_need_it(tmp_path):
    done = run_without_extras(tmp_path, "families", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["mixtral"]["refused"] is None
    assert "pip install 'cenacle[vlm]'" in rows["cohere2_moe"]["refused"]


@pytest.mark.parametrize(
    "arguments", [PLAN, (*PLAN, "--json"), ("serve", "--help"), ("bench", "--help")]
)
def test_everything_else_works_without_extras(tmp_path, arguments):
    done = run_without_extras(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr


def test_a_server_does_not_install_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    names = {extra: [Requirement(r).name for r in optional[extra]] for extra in EXTRAS}
    assert names == {extra: list(packages) for extra, packages in EXTRAS.items()}
    required = " ".join(project["dependencies"])
    assert not any(p in required for packages in EXTRAS.values() for p in packages)
    own = next(r for r in map(Requirement, optional["dev"]) if r.name == "cenacle")
    assert own.extras == EXTRAS.keys()
