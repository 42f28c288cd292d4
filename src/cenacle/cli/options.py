"""."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..core.plan import Plan
from ..errors import InputError

if TYPE_CHECKING:
    from ..api import Model
    from ..verification import SelfTest


app = typer.Typer(
    name="cenacle",
    help="A private server for Mixture-of-Experts models: experts spread over several nodes, "
    "one exchange per layer.",
    no_args_is_help=True,
    epilog="Examples:\n\n"
    "  cenacle demo\n\n"
    "  cenacle inspect -m DIR -n 3\n\n"
    '  cenacle generate -m DIR -n 2 -p "What is 12 + 30?" --temp 0 --json\n\n'
    "  cenacle chat -m org/model -n 2\n\n"
    "  cenacle serve -m DIR -n 2 --port 8080\n\n"
    "  cenacle synth --name dbrx-132b --layers 2 --quantize 4 --out DIR\n\n"
    "  cenacle bench --synth moe-2b --nodes 2\n\n"
    "  cenacle families\n\n"
    "  cenacle plan qwen3-235b-a22b --machines 4xm3-ultra-512 --link tb5-rdma --quant 8",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


err = Console(stderr=True, highlight=False)


class Kernels(StrEnum):
    """What computes; see `api.load`."""

    auto = "auto"
    native = "native"
    mlx = "mlx"


class Activations(StrEnum):
    """What activations become inside quantised layers; see `api.load`."""

    int16 = "int16"
    int8 = "int8"


class Speculate(StrEnum):
    """When tokens are drafted; see `engine.engine.Options`."""

    auto = "auto"
    off = "off"
    always = "always"


class Wire(StrEnum):
    """How the mesh sends float32 vectors; see `collective.mesh.WIRES`."""

    f32 = "f32"
    bf16 = "bf16"


class Backend(StrEnum):
    """How ranks exchange; see `cluster.launcher.choose` and `collective.mlx.BACKENDS`."""

    auto = "auto"
    mesh = "mesh"
    ring = "ring"
    mpi = "mpi"
    jaccl = "jaccl"
    nccl = "nccl"


class Placement(StrEnum):
    """Who holds which expert; see `api.load`."""

    auto = "auto"
    whole = "whole"
    sliced = "sliced"
    replicated = "replicated"


class Trunk(StrEnum):
    """Who holds what is not an expert; see `api.load`."""

    auto = "auto"
    replicated = "replicated"
    sharded = "sharded"


ModelName = Annotated[
    str, typer.Option("--model", "-m", help="A folder, or a hub repository's name (org/model).")
]


Nodes = Annotated[int, typer.Option("--nodes", "-n", min=1, help="Number of local processes.")]


Shares = Annotated[
    str | None,
    typer.Option(help="Relative speeds of the nodes, such as 2,1,1. Default: even."),
]


PlacementName = Annotated[
    Placement,
    typer.Option(
        help="whole: each expert on one node. sliced: a part of each on every node. "
        "replicated: whole ones on several. auto: whole or sliced, by modelled time."
    ),
]


TrunkName = Annotated[
    Trunk,
    typer.Option(
        help="Attention, dense layers and head: replicated on every node, or sharded where the "
        "family allows it, one more exchange each."
    ),
]


BudgetsGB = Annotated[
    str | None,
    typer.Option(
        help="Gigabytes of weights per node, such as 24,24,16, for --placement replicated: "
        "as many copies as fit. Default: two of each expert."
    ),
]


PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="A plan saved by `inspect --save`; overrides --nodes.")
]


BackendName = Annotated[Backend, typer.Option(help="How nodes exchange.")]


WireName = Annotated[
    Wire, typer.Option(help="How the mesh sends vectors; bf16: half the bytes, rounded.")
]


KernelsName = Annotated[
    Kernels,
    typer.Option(
        help="native: ours for CPUs, many times faster. mlx: MLX's own. auto: native if it can be."
    ),
]


ActivationsName = Annotated[
    Activations,
    typer.Option(help="Inside native quantised layers; int8: quicker prompts, less exact."),
]


LatencyMs = Annotated[
    float, typer.Option(min=0, help="Milliseconds added to every exchange, to study a slow link.")
]


PrefillChunk = Annotated[int, typer.Option(min=1, help="Most prompt tokens per step.")]


Batch = Annotated[int, typer.Option(min=1, help="Most requests generated at once.")]


KVBits = Annotated[int | None, typer.Option(help="Quantise the KV cache to 4 or 8 bits.")]


MaxKV = Annotated[int | None, typer.Option(min=8, help="Keep at most this many positions.")]


SpeculateName = Annotated[
    Speculate,
    typer.Option("--speculate", help="Draft tokens and check several at once, if it pays."),
]


DraftName = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="A small model with the same tokenizer, whose guesses are checked several at once.",
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]


Temp = Annotated[float, typer.Option(help="Temperature; 0 is greedy.")]


TopP = Annotated[float, typer.Option(help="Nucleus sampling.")]


TopK = Annotated[int, typer.Option(help="Keep this many tokens; 0: all.")]


Seed = Annotated[int | None, typer.Option(help="Same seed, same text, on any number of nodes.")]


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _saying() -> Callable[[str], None]:
    return lambda text: err.print(_plain(text), soft_wrap=True)


@contextmanager
def _loaded(
    model: str,
    nodes: int,
    dealt: dict[str, Any],
    plan: Path | None,
    backend: Backend,
    wire: Wire,
    kernels: Kernels,
    activations: Activations,
    latency_ms: float,
    prefill_chunk: int,
    batch: int,
    kv_bits: int | None,
    max_kv_size: int | None,
    draft: str | None = None,
    selftest: SelfTest | None = None,
    **options: Any,
) -> Iterator[Model]:
    from ..api import Model
    from ..runtime import LoadOptions

    how = LoadOptions(
        model,
        nodes,
        **dealt,
        plan=Plan.load(plan) if plan else None,
        backend=backend.value,
        comm_dtype=wire.value,
        latency_s=latency_ms / 1000,
        kernels=kernels.value,
        activations=activations.value,
        draft_model=draft,
        max_batch_size=batch,
        prefill_chunk_size=prefill_chunk,
        kv_bits=kv_bits,
        max_kv_size=max_kv_size,
        **options,
    )
    with _progress() as progress:
        loaded = Model.load(how, progress=progress, selftest=selftest)
    with loaded:
        if loaded.ranks.backend_reason is not None:
            err.print(_plain(loaded.ranks.backend_reason), soft_wrap=True)
        if loaded.plan_reason:
            err.print(_plain(loaded.plan_reason), soft_wrap=True)
        if kernels is not Kernels.mlx:
            err.print(_plain(f"computing on {loaded.ranks.ready[0]['device']}"), soft_wrap=True)
        yield loaded


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar per rank on stderr, while weights are loaded."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("rank {task.fields[rank]}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks: dict[int, Any] = {}

        def show(rank: int, done: int, total: int) -> None:
            if rank not in tasks:
                tasks[rank] = bars.add_task("", total=total, rank=rank)
            bars.update(tasks[rank], completed=done)

        yield show


def _dealt(
    shares: str | None, placement: Placement, trunk: Trunk, budgets_gb: str | None
) -> dict[str, Any]:
    """The arguments of `api.load` that say how to deal."""
    budgets = _numbers("budgets-gb", budgets_gb)
    return {
        "node_weights": _numbers("shares", shares),
        "placement": placement.value,
        "trunk": trunk.value,
        "node_memory_bytes": [int(1e9 * b) for b in budgets] if budgets is not None else None,
    }


def _numbers(option: str, given: str | None) -> list[float] | None:
    if given is None:
        return None
    try:
        numbers = [float(s) for s in given.split(",")]
    except ValueError as error:
        raise InputError(
            f"--{option}: expected numbers such as 2,1,1, got {given!r}", option
        ) from error
    if not all(math.isfinite(n) for n in numbers):
        raise InputError(f"--{option}: expected finite numbers, got {given!r}", option)
    return numbers
