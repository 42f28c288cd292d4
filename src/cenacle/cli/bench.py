"""The commands `cenacle bench` and `cenacle bench ablation`.

Owns: their options and output.
Does not know: what is measured (`bench`, `research`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from .. import paths
from ..core.emulation import EmulatedMachines, parse_emulation
from ..extras import import_extra
from .command import command, expand_dataclasses, format_example, option
from .console import print_json, report, wide_console
from .early_checks import check_model, check_output
from .help import Group
from .options import (
    BACKEND_HELP,
    KERNELS_HELP,
    MODEL_HELP,
    NODES_HELP,
    Backend,
    JsonOutput,
    Kernels,
    LoadArguments,
    parse_float_list,
    parse_int_list,
)

app = typer.Typer(cls=Group, invoke_without_command=True)
THREADS_HELP = "CPU threads per node. Default: an equal share of the cores."


@dataclass(frozen=True)
class BenchmarkModelArguments:
    """Which model to measure."""

    model: str | None = option(None, MODEL_HELP, "--model", "-m", metavar="MODEL")
    synth: str | None = option(
        None, "Random model of this name or family instead (see `synth --list`)."
    )
    quantize: int = option(4, "Bits per weight of the --synth model; 0: not quantized.")
    cache_dir: Path | None = option(
        None, "Folder for random models and models of peers. Default: the user's cache folder."
    )

    @property
    def cache_folder(self) -> Path:
        """The folder that `cache_dir` names."""
        return self.cache_dir.expanduser() if self.cache_dir is not None else paths.cache_dir()

    def check(self) -> None:
        """Refuse a model that does not exist.

        Raises:
            CenacleError: see `check_model`; the catalog has no such model.
        """
        if self.model is not None:
            check_model(self.model)
        if self.synth is not None:
            from ..model import config_catalog

            if self.synth not in config_catalog.family_names():
                config_catalog.full_config(self.synth, field="synth")

    def prepare(self) -> str:
        """The model to measure; a random model is written if it is not in the cache."""
        from ..bench import measure

        return measure.prepare_model(
            self.model, self.synth, self.quantize, self.cache_folder, report
        )


@dataclass(frozen=True)
class WorkloadArguments:
    """What to measure."""

    contexts: str = option(
        "32,2048,8192", "Context lengths at which decoding is measured.", metavar="N,N,..."
    )
    concurrency: str = option("1,2,4,8", "Numbers of concurrent requests.", metavar="N,N,...")
    tokens: int = option(64, "Tokens to decode per measurement.", min=2)
    prompt_tokens: int = option(512, "Length of the measured prompt.", min=1)
    repeat: int = option(3, "Number of rounds, alternating with those of the peers.", min=1)
    threads: int | None = option(None, THREADS_HELP, min=1)
    peer: list[str] | None = option(
        None,
        "Also measure llama.cpp=PATH, ik_llama.cpp=PATH, dllama=PATH or mlx-lm on the same model; "
        "repeatable.",
        metavar="PEER",
    )
    emulate: list[str] | None = option(
        None,
        "Decode on emulated machines: ranks wait as long as these would take to read weights. "
        "Repeatable; speeds are compared with the first. Several nodes need a link. slow=10 runs "
        "ten times slower and multiplies the speeds by ten.",
        metavar="MACHINES",
    )
    peer_timeout_s: float = option(300.0, "Seconds after which a run of a peer is stopped.", min=1)


@dataclass(frozen=True)
class AblationArguments:
    """What to compare."""

    nodes: int = option(2, NODES_HELP, "--nodes", "-n", min=1)
    threads: int | None = option(None, THREADS_HELP, min=1)
    backend: Backend = option("auto", BACKEND_HELP, metavar="NAME")
    kernels: Kernels = option("auto", KERNELS_HELP)
    latencies_ms: str = option(
        "1,0.3,0.05,0", "Latencies of the emulated links.", metavar="MS,MS,..."
    )
    tokens: int = option(16, "Tokens to decode per row and round.", min=2)
    repeat: int = option(2, "Number of rounds over all rows.", min=1)


@app.callback(epilog=format_example("cenacle bench --synth moe-2b --nodes 2 --threads 1 --json"))
@expand_dataclasses
def bench(
    context: typer.Context,
    model: BenchmarkModelArguments,
    workload: WorkloadArguments,
    load: LoadArguments,
    json_output: JsonOutput = False,
) -> None:
    """Measure prompt and decoding speed, where the time goes, and the limits of the hardware."""
    if context.invoked_subcommand is not None:
        return
    contexts = parse_int_list(workload.contexts, "contexts")
    concurrency = parse_int_list(workload.concurrency, "concurrency")
    keywords = load.to_keywords()
    machines = tuple(parse_emulation(text) for text in workload.emulate or ())
    model.check()
    if machines:
        _emulate(model, workload, load, machines, json_output)
        return
    from ..bench import measure
    from ..bench.peers import peers
    from ..bench.report import show_bench
    from ..load_options import LoadOptions

    compared = [peers.parse_peer(peer) for peer in workload.peer or ()]  # before a model is written
    config = measure.BenchConfig(
        LoadOptions(model.prepare(), load.nodes, threads=workload.threads, **keywords),
        contexts=contexts,
        concurrency=concurrency,
        tokens=workload.tokens,
        repeat=workload.repeat,
        prompt_tokens=workload.prompt_tokens,
        cache_dir=model.cache_folder,
        peer_timeout_s=workload.peer_timeout_s,
    )
    result = measure.run_bench(config, compared, report)
    if json_output:
        print_json(result)
    else:
        show_bench(result, wide_console())


def _emulate(
    model: BenchmarkModelArguments,
    workload: WorkloadArguments,
    load: LoadArguments,
    machines: tuple[EmulatedMachines, ...],
    json_output: bool,
) -> None:
    from ..bench.emulation import EmulationConfig, run_emulation
    from ..bench.report import show_emulation
    from ..load_options import LoadOptions

    config = EmulationConfig(
        LoadOptions("", load.nodes, threads=workload.threads, **load.to_keywords()),
        machines,
        parse_int_list(workload.contexts, "contexts")[0],
        parse_int_list(workload.concurrency, "concurrency"),
        workload.tokens,
        workload.repeat,
    )
    config = replace(config, load=replace(config.load, model=model.prepare()))
    result = run_emulation(config, report)
    if json_output:
        print_json(result)
    else:
        show_emulation(result, wide_console())


@command(app, example="cenacle bench ablation --synth dbrx-2l --nodes 2 --out DIR")
def ablation(
    model: BenchmarkModelArguments,
    arguments: AblationArguments,
    out: Annotated[Path | None, typer.Option(help="Folder for a plot as PNG and SVG.")] = None,
    json_output: JsonOutput = False,
) -> None:
    """Compare the schedules of the DBRX paper with Cenacle's over emulated links."""
    latencies_ms = tuple(parse_float_list(arguments.latencies_ms, "latencies-ms") or ())
    model.check()
    from ..bench.report import show_ablation
    from ..research import plot, schedule_ablation

    if model.model is None and model.synth is None:
        model = replace(model, synth="dbrx-2l")
    request = schedule_ablation.AblationConfig(
        model.prepare(),
        arguments.nodes,
        arguments.threads,
        arguments.backend,
        arguments.kernels,
        latencies_ms,
        arguments.tokens,
        arguments.repeat,
    )
    if out is not None:
        import_extra("matplotlib", "plots")  # before minutes of measuring
        check_output(out / "plot", "out")
    result = schedule_ablation.run_ablation(request, report)
    if out is not None:
        result["plots"] = [str(path) for path in plot.save_figure(result, out)]
    if json_output:
        print_json(result)
    else:
        show_ablation(result, wide_console())
