"""."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import InputError
from ..paths import cache_dir
from .options import (
    Activations,
    ActivationsName,
    AsJson,
    Backend,
    BackendName,
    Kernels,
    KernelsName,
    LatencyMs,
    Nodes,
    Placement,
    PlacementName,
    Trunk,
    TrunkName,
    _numbers,
    _saying,
)

bench_app = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")


BenchModel = Annotated[
    str | None, typer.Option("--model", "-m", help="A folder, or a hub repository's name.")
]


SynthName = Annotated[
    str | None,
    typer.Option("--synth", help="Or a random model of this name or family (see `synth --list`)."),
]


Quantize = Annotated[int, typer.Option(help="Bits of the --synth model; 0: not quantised.")]


Threads = Annotated[int | None, typer.Option(min=1, help="Per node. Default: an even share.")]


Cache = Annotated[
    Path | None,
    typer.Option(help="Random models and peers' models are kept here. Default: the user's cache."),
]


@bench_app.callback()
def bench(
    context: typer.Context,
    model: BenchModel = None,
    synth: SynthName = None,
    quantize: Quantize = 4,
    nodes: Nodes = 1,
    threads: Threads = None,
    backend: BackendName = Backend.auto,
    kernels: KernelsName = Kernels.auto,
    activations: ActivationsName = Activations.int16,
    placement: PlacementName = Placement.auto,
    trunk: TrunkName = Trunk.auto,
    latency_ms: LatencyMs = 0.0,
    contexts: Annotated[str, typer.Option(help="Tokens before the first.")] = "32,2048,8192",
    streams: Annotated[str, typer.Option(help="Numbers of requests at once.")] = "1,2,4,8",
    tokens: Annotated[int, typer.Option(min=2, help="Decoded per measurement.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds, in turn with the peers.")] = 3,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the timed prompt.")] = 512,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="llama.cpp=PATH, dllama=PATH or mlx-lm; may be given several times."),
    ] = None,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds for a peer's process.")] = 300.0,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """How fast a model runs here, where the time goes, and what the machine could give.

    Example: [bold]cenacle bench --synth moe-2b --nodes 2 --threads 1 --peer mlx-lm --json[/]
    """
    if context.invoked_subcommand is not None:
        return
    from ..bench import measure, report
    from ..bench.peers import peers

    said = _saying()
    others = [peers.parse(p) for p in peer or ()]
    kept = cache.expanduser() if cache is not None else cache_dir()
    asked = measure.Asked(
        measure.prepared(model, synth, quantize, kept, said),
        nodes,
        threads,
        _whole(contexts, "contexts"),
        _whole(streams, "streams"),
        tokens,
        repeat,
        prompt,
        {"placement": placement.value, "trunk": trunk.value},
        {
            "backend": backend.value,
            "kernels": kernels.value,
            "activations": activations.value,
            "latency_s": latency_ms / 1000,
        },
        kept,
        deadline,
    )
    result = measure.run(asked, others, said)
    if as_json:
        print(json.dumps(result))
    else:
        report.show_bench(result, _wide())


@bench_app.command()
def ablation(
    model: BenchModel = None,
    synth: SynthName = None,
    quantize: Quantize = 4,
    nodes: Nodes = 2,
    threads: Threads = None,
    backend: BackendName = Backend.auto,
    kernels: KernelsName = Kernels.auto,
    latencies: Annotated[str, typer.Option(help="Of the emulated links, in ms.")] = "1,0.3,0.05,0",
    tokens: Annotated[int, typer.Option(min=2, help="Decoded per number and round.")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds over all rows.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder for a PNG and an SVG.")] = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """The paper's schedules step by step, then ours, over emulated links.

    Example: [bold]cenacle bench ablation --synth dbrx-2l --nodes 2 --out DIR --json[/]
    """
    from ..bench import measure, report
    from ..research import plot
    from ..research import schedule_ablation as study

    said = _saying()
    if model is None and synth is None:
        synth = "dbrx-2l"
    kept = cache.expanduser() if cache is not None else cache_dir()
    asked = study.Asked(
        measure.prepared(model, synth, quantize, kept, said),
        nodes,
        threads,
        backend.value,
        kernels.value,
        tuple(_numbers("latencies", latencies) or ()),
        tokens,
        repeat,
    )
    result = study.run(asked, said)
    if out is not None:
        result["pictures"] = [str(p) for p in plot.draw(result, out)]
    if as_json:
        print(json.dumps(result))
    else:
        report.show_ablation(result, _wide())


def _wide() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _whole(text: str, option: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(n) for n in text.split(","))
        if min(numbers) < 1:
            raise ValueError
    except ValueError as error:
        raise InputError(
            f"--{option}: expected whole numbers from 1 such as 1,2,4, got {text!r}", option
        ) from error
    return numbers
