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
from .command import command, expand_dataclasses, format_example
from .console import print_json, report, wide_console
from .options import (
    MODEL_HELP,
    Backend,
    JsonOutput,
    Kernels,
    LoadArguments,
    PlacementArguments,
    parse_float_list,
    parse_int_list,
)

app = typer.Typer(invoke_without_command=True)


@dataclass(frozen=True)
class BenchmarkModelArguments:
    """Which model to measure."""

    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)
    ] = None
    synth: Annotated[
        str | None,
        typer.Option(help="Random model of this name or family instead (see `synth --list`)."),
    ] = None
    quantize: Annotated[
        int, typer.Option(help="Bits per weight of the --synth model; 0: not quantized.")
    ] = 4
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for random models and models of peers. Default: the user's cache folder."
        ),
    ] = None

    @property
    def cache_folder(self) -> Path:
        """The folder that `cache_dir` names."""
        return self.cache_dir.expanduser() if self.cache_dir is not None else paths.cache_dir()

    def prepare(self) -> str:
        """The model to measure; a random model is written if it is not in the cache."""
        from ..bench import measure

        return measure.prepare_model(
            self.model, self.synth, self.quantize, self.cache_folder, report
        )


Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="CPU threads per node. Default: an equal share of the cores."
    ),
]


@dataclass(frozen=True)
class WorkloadArguments:
    """What to measure."""

    contexts: Annotated[
        str, typer.Option(metavar="N,N,...", help="Context lengths at which decoding is measured.")
    ] = "32,2048,8192"
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of concurrent requests.")
    ] = "1,2,4,8"
    tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens to decode per measurement.")
    ] = 64
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Length of the measured prompt.")
    ] = 512
    repeat: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of rounds, in turn with the peers.")
    ] = 3


@app.callback(epilog=format_example("cenacle bench --synth moe-2b --nodes 2 --threads 1 --json"))
@expand_dataclasses
def bench(
    context: typer.Context,
    model: BenchmarkModelArguments,
    workload: WorkloadArguments,
    threads: Threads = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER",
            help="Also measure llama.cpp=PATH, dllama=PATH or mlx-lm on the same model; "
            "repeatable.",
        ),
    ] = None,
    peer_timeout_s: Annotated[
        float, typer.Option(min=1, help="Seconds after which a run of a peer is stopped.")
    ] = 300.0,
    json_output: JsonOutput = False,
    *,
    load: LoadArguments,
) -> None:
    """Measure prompt and decoding speed, where the time goes, and the limits of the hardware."""
    if context.invoked_subcommand is not None:
        return
    from ..bench import measure
    from ..bench.peers import peers
    from ..bench.report import show_bench

    placed = PlacementArguments.to_keywords(load)
    options = {k: v for k, v in load.to_keywords().items() if k not in placed}
    options["latency_s"] = placed.pop("latency_s")
    request = measure.BenchConfig(
        model=model.prepare(),
        nodes=load.nodes,
        threads=threads,
        contexts=parse_int_list(workload.contexts, "contexts"),
        streams=parse_int_list(workload.concurrency, "concurrency"),
        tokens=workload.tokens,
        repeat=workload.repeat,
        prompt=workload.prompt_tokens,
        placed=placed,
        options=options,
        cache=model.cache_folder,
        deadline_s=peer_timeout_s,
    )
    result = measure.run_bench(request, [peers.parse_peer(p) for p in peer or ()], report)
    if json_output:
        print_json(result)
    else:
        show_bench(result, wide_console())


@command(app, name="ablation", example="cenacle bench ablation --synth dbrx-2l --nodes 2 --out DIR")
def ablation(
    model: BenchmarkModelArguments,
    nodes: Annotated[
        int,
        typer.Option(
            "--nodes", "-n", metavar="N", min=1, help="Number of local processes (ranks)."
        ),
    ] = 2,
    threads: Threads = None,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    latencies_ms: Annotated[
        str, typer.Option(metavar="MS,MS,...", help="Latencies of the emulated links.")
    ] = "1,0.3,0.05,0",
    tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens to decode per row and round.")
    ] = 16,
    repeat: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of rounds over all rows.")
    ] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder for a plot as PNG and SVG.")] = None,
    json_output: JsonOutput = False,
) -> None:
    """Compare the schedules of the DBRX paper with Cenacle's over emulated links."""
    from ..bench.report import show_ablation
    from ..research import plot, schedule_ablation

    if model.model is None and model.synth is None:
        model = replace(model, synth="dbrx-2l")
    request = schedule_ablation.AblationConfig(
        model.prepare(),
        nodes,
        threads,
        backend,
        kernels,
        tuple(parse_float_list(latencies_ms, "latencies-ms") or ()),
        tokens,
        repeat,
    )
    result = schedule_ablation.run_ablation(request, report)
    if out is not None:
        result["plots"] = [str(path) for path in plot.save_figure(result, out)]
    if json_output:
        print_json(result)
    else:
        show_ablation(result, wide_console())
