"""The verbs of the performance model: `cenacle plan`, `calibrate`, `validate`, `trace`.

Owns: their arguments and what is printed; `cli.py` puts them beside the others.
Invariant: as `cli.py`: answers to stdout, everything else to stderr, with --json one object last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..calibration import validate as validation
from ..core.model_spec import ModelSpec
from ..core.units import format_bytes
from ..errors import CenacleError, CheckpointError, InputError, PlanError
from ..paths import catalog_dir
from ..planning import catalog as names
from ..planning import planner
from ..planning.catalog import Catalogue
from ..planning.perf_model import Job
from ..planning.routing_stats import Trace, contiguous

if TYPE_CHECKING:
    from ..planning.model_shapes import Shape
    from ..planning.planner import Result

err = Console(stderr=True, highlight=False)

Files = Annotated[
    list[Path] | None,
    typer.Option("--catalog", help="A file of your own machines and links (TOML); repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


def plan(
    model: Annotated[
        str, typer.Argument(help="A name, a hub repository's name, a folder, or a config.json.")
    ],
    machines: Annotated[
        str, typer.Option(help="Such as 4xm3-ultra-512, or 1xm3-ultra-256,2xm4-max-128; this.")
    ],
    link: Annotated[
        str | None, typer.Option(help="Between them: tb5-rdma, 10gbe, ...; measured.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(help="Bits: 4, 4.5, 8, 16, mxfp4, 2.5/8.5. Default: 4, or as read."),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache, per user.")] = 4096,
    users: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    prompt: Annotated[
        int, typer.Option(min=1, help="Prompt tokens for the first token's time.")
    ] = 512,
    wired: Annotated[
        float | None,
        typer.Option(min=0.05, max=1, help="Share of memory for the model; a Mac's default: 0.75."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Other machines to compare with per dollar, such as 8xh100.")
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(help="nodes=1..8, latency=3us..1ms or price=2000..10000; repeatable."),
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="A recording of `cenacle trace`.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report, one file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the first curve, or the terms.")] = None,
    svg: Annotated[Path | None, typer.Option(help="The same as SVG.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the best plan, for `serve --plan`.")
    ] = None,
    catalog: Files = None,
    as_json: AsJson = False,
) -> None:
    """What a model will do on given machines, which placement to take, and when not to buy.

    Example: [bold]cenacle plan qwen3-235b-a22b --machines 4xm3-ultra-512 --link tb5-rdma[/]
    """
    from ..planning import report

    known = names.load(catalog or ())
    job, spec = _job(known, model, quant, context, users, prompt)
    found, between, study = planner.from_catalogue(known, machines, link, wired)
    recorded = Trace.load(trace) if trace is not None else None
    if recorded is not None:
        job = _traced(job, recorded, len(found))
    result = planner.plan(job, found, between, study)
    comparison = None
    if compare is not None and result.best is not None:
        # Several machines of the other kind talk over the same link.
        others = known.machines_of(compare)
        comparison = planner.compare(result, others, between, study)
    curves = [planner.what_if(text, job, found, between, study) for text in what_if or ()]
    for path in (png, svg):
        if path is not None:
            figure = (
                report.curve_figure(curves[0]) if curves else report.terms_figure(result.options)
            )
            report.save(figure, path)
    if html is not None:
        _write(html, report.html(result, curves, comparison))
    if save is not None:
        dealt, note = planner.plan_file(result, spec or _spec(job), recorded)
        try:
            dealt.save(save)
        except OSError as error:
            raise InputError(f"cannot write {save}: {error}", "save") from error
        err.print(
            f"{save}: {dealt.placement} experts on {dealt.nodes} nodes. {note}", soft_wrap=True
        )
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        _show(result, report.describe(job.shape, result))
        if comparison is not None:
            print(comparison.sentence())
        for curve in curves:
            print()
            print(report.terminal(curve))
        _unverified(result)
    if result.best is None:
        raise PlanError(result.advice)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}", "file") from error


def _job(
    known: Catalogue, model: str, quant: str | None, context: int, users: int, prompt: int
) -> tuple[Job, ModelSpec | None]:
    """The job, and the checkpoint's facts where the model is a folder."""
    from ..planning.model_shapes import from_config

    path = Path(model).expanduser()
    if not path.exists():
        if path.suffix == ".json" or model.startswith((".", "/", "~")):
            raise CheckpointError(f"{model}: no such file or folder")
        shape = known.model(model)
        return Job(shape, names.quant(quant or 4), context, users, prompt), None
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a config.json: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        name = config.get("_name_or_path") or path.resolve().parent.name
        bits = names.quant(quant or _bits_of(config))
        shape = _counted(from_config(str(name), config), config)
        return Job(shape, bits, context, users, prompt), None
    from ..model.checkpoint import Checkpoint
    from ..model.loader import read_model_spec

    checkpoint = Checkpoint.open(path)
    spec = read_model_spec(checkpoint)
    shape = from_config(path.resolve().name, checkpoint.config, str(path))
    shape = _counted(shape, checkpoint.config)
    if quant is not None:
        return Job(shape, names.quant(quant), context, users, prompt), None
    read = (float(spec.trunk_bytes), float(spec.expert_bytes), float(spec.shared_bytes))
    each = 8 * spec.expert_bytes / shape.routed
    stated = names.Quant(f"{each:.3g} (read)", each, 8 * spec.trunk_bytes / shape.trunk)
    return Job(shape, stated, context, users, prompt, read), spec


def _counted(shape: Shape, config: dict[str, Any]) -> Shape:
    """The shape with its parameters counted in the model that mlx-lm builds of the config.

    What a config says of its attention is read; how many parameters each part has need not be
    derived where mlx-lm knows the family.
    """
    from dataclasses import replace

    from mlx.utils import tree_flatten

    from ..model import architecture, synth

    plain = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    try:
        model = synth.build_lazy_model(architecture.complete_config(plain))
    except CenacleError as error:
        err.print(f"parameters are derived from the config: {error}", markup=False)
        return shape
    architecture.stack_dbrx_experts(model)
    blocks = architecture.find_blocks(model)
    if not blocks:
        return shape

    def size(module: Any) -> int:
        found: Any = tree_flatten(module.parameters())
        return sum(v.size for _, v in found)

    routed = sum(size(m) for b in blocks for m in b.linears.values())
    shared = sum(size(b.module[n]) for b in blocks for n in b.shared)
    return replace(
        shape,
        moe_layers=len(blocks),
        moe_ids=tuple(b.layer for b in blocks),
        experts=blocks[0].count,
        expert=routed // (len(blocks) * blocks[0].count),
        shared=shared // len(blocks),
        trunk=size(model) - routed - shared,
    )


def _spec(job: Job) -> ModelSpec:
    from ..model import architecture

    known = job.shape.family
    return planner.spec_of(job, architecture.resolve_family({"model_type": known}) if known else "")


def _bits_of(config: dict[str, Any]) -> str:
    """What config.json says of quantisation, or 16 bits."""
    for key in ("quantization", "quantization_config"):
        table = config.get(key)
        if isinstance(table, dict):
            if "mxfp4" in (table.get("mode"), table.get("quant_method")):
                return "mxfp4"
            if isinstance(table.get("bits"), int):
                return str(table["bits"])
            if table.get("quant_method") == "fp8":
                return "fp8"
    return "16"


def _traced(job: Job, trace: Trace, nodes: int) -> Job:
    from dataclasses import replace

    from ..planning.routing_stats import Group, busiest, even

    s = job.shape
    if (trace.experts, trace.top_k) != (s.experts, s.top_k):
        raise InputError(
            f"trace: it was recorded with {trace.top_k} of {trace.experts} experts a token, "
            f"{s.name} has {s.top_k} of {s.experts}",
            "trace",
        )
    if nodes == 1 or nodes > s.experts:
        return job
    uniform = busiest([Group(n) for n in even(s.experts, nodes)], s.top_k)
    return replace(job, skew=trace.busiest(contiguous(trace, nodes)) / uniform)


def _show(result: Result, question: str) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("scheme", "placement", "trunk"):
        table.add_column(column, no_wrap=True)
    for column in (
        "nodes",
        "tok/s",
        "all users",
        "first s",
        "binds",
        "GB/node",
        "USD",
        "USD/(tok/s)",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("W", justify="right", no_wrap=True)
    for o in result.options:
        p = o.prediction
        if p is None or not o.fits:
            continue
        mark = "*" if any(m.facts["usd"].confidence == "D" for m in o.machines) else ""
        each = [b / 1e9 for b in dict.fromkeys(p.bytes_per_node)]
        table.add_row(
            *(o.scheme, o.placement, o.trunk, str(len(o.machines))),
            *(f"{p.tok_per_s:.1f}", f"{p.tok_per_s_all_users:.1f}", f"{p.ttft_s:.1f}", p.binding),
            "/".join(f"{b:.0f}" for b in each),
            f"{o.usd:,.0f}{mark}" if o.usd is not None else "?",
            f"{o.usd / p.tok_per_s:,.0f}" if o.usd is not None else "?",
            f"{p.watts:.0f}",
        )
    out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    out.print(question, soft_wrap=True)
    out.print(table)
    for o in result.options:
        title = f"{o.scheme} {o.placement} {o.trunk} x{len(o.machines)}"
        out.print(f"  {title:<38} {o.why}", soft_wrap=True, markup=False)
    out.print(result.advice, soft_wrap=True, markup=False)


def _unverified(result: Result) -> None:
    """Name the inputs that are only recalled."""
    from ..planning.perf_model import inputs

    p = result.options[0].prediction
    if p is None:
        return
    recalled = [name for name, fact in inputs(p, result.job) if fact.confidence == "D"]
    if recalled:
        print(f"unverified (*, recalled) inputs: {', '.join(recalled)}")


def validate(
    rows: Annotated[
        Path | None,
        typer.Option(help=f"Your own measurements, a CSV with {','.join(validation.COLUMNS)}."),
    ] = None,
    refit: Annotated[
        bool, typer.Option(help="Fit on the rows marked so, show it, and leave-one-out as well.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="With --refit: write fits.toml here.")] = None,
    run: Annotated[
        bool, typer.Option(help="Measure clusters of local processes first (minutes).")
    ] = False,
    catalog: Files = None,
    as_json: AsJson = False,
) -> None:
    """Predicted against measured: clusters run here, published speeds, the paper, your own rows.

    Example: [bold]cenacle validate --rows mine.csv[/]
    """
    known = names.load(catalog or ())
    report: dict[str, Any] = {}
    if rows is not None:
        found, problems = validation.read_csv(rows, known)
        checked = [validation.check(r, known) for r in found]
        report = {**_section(f"{rows}", checked, as_json), "errors": problems}
    else:
        problems = []
        _validate_all(known, refit, save, run, report, as_json)
    if as_json:
        print(json.dumps(report))
    if problems:
        total = len(problems) + len(report["rows"])
        raise InputError(
            f"rows: {rows}: {len(problems)} of {total} rows cannot be predicted; "
            + "; ".join(problems),
            "rows",
        )


def _validate_all(
    known: Catalogue,
    refit: bool,
    save: Path | None,
    run: bool,
    report: dict[str, Any],
    as_json: bool,
) -> None:
    from ..calibration import local_fit

    if run:
        from ..calibration.local_runs import measure

        measure(local_fit.STORE, lambda text: err.print(text))
    if local_fit.STORE.exists():
        stored = local_fit.load(local_fit.STORE)
        text, report["here"] = local_fit.table(stored, *local_fit.judge(stored))
        if not as_json:
            print(text + "\n")
    rows = [r for r in validation.published() if not r.skip]
    if refit:
        marked = [r for r in rows if r.fit]
        known = validation.fit(marked, known)
        others = validation.leave_one_out(marked, known)
        report["leave_one_out"] = _section("leave-one-out over the fitted rows", others, as_json)
        if save is not None:
            old = (names.FOLDER / "fits.toml").read_text()
            _write(save, validation.fits_toml(known, old))
    everything = validation.check_all(rows, known)
    report["published"] = {
        "fitted": _section("published, fitted", [c for c in everything if c.row.fit], as_json),
        "unfitted": _section(
            "published, not fitted", [c for c in everything if not c.row.fit], as_json
        ),
        "skipped": [
            {"model": r.model, "machines": r.machines, "tok_per_s": r.tok_per_s, "why": r.skip}
            for r in validation.published()
            if r.skip
        ],
    }
    paper = validation.paper_section(known)
    report["paper"] = [
        {"what": what, "stated": stated, "ours": ours, "remark": remark}
        for what, stated, ours, remark in paper
    ]
    if as_json:
        return
    wrong = [c for c in everything if not c.row.fit and c.error > 0.25]
    print("\nrows that are wrong by more than 25 %, and why:")
    for c in wrong:
        reason = c.row.reason or "no reason known"
        print(f"  {c.row.model} on {c.row.machines}: {c.error:.0%}; {reason}")
    print("not predicted:")
    for r in validation.published():
        if r.skip:
            print(f"  {r.model} on {r.machines}, {r.tok_per_s:g} tok/s: {r.skip}")
    print("\nthe paper")
    for what, stated, ours, remark in paper:
        print(f"  {what:<44}{stated:>9.4g}{ours:>9.4g}  {remark}")


def _section(title: str, checked: list[validation.Checked], as_json: bool) -> dict[str, Any]:
    """Print a table of rows, and give it as JSON."""
    summary = validation.Summary.of(checked)
    if summary is None:
        return {"rows": [], "median": None, "worst": None}
    if not as_json:
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        for column in ("model", "quant", "machines", "link", "scheme"):
            table.add_column(column, no_wrap=True)
        for column in ("context", "measured", "predicted", "error"):
            table.add_column(column, justify="right")
        for c in checked:
            r = c.row
            table.add_row(
                *(r.model, r.quant, r.machines, r.link or "", r.scheme, str(r.context)),
                f"{r.tok_per_s:.4g}",
                f"{c.predicted.tok_per_s:.4g}" + ("" if c.predicted.fits else " !"),
                f"{c.predicted.tok_per_s / r.tok_per_s - 1:+.0%}",
            )
        out = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        out.print(table)
        print(
            f"{summary.rows} rows, median error {summary.median:.1%}, worst {summary.worst:.1%}"
            + (
                " (!: beyond the default memory limit)"
                if any(not c.predicted.fits for c in checked)
                else ""
            )
            + "\n"
        )
    return {
        "rows": [c.to_json() for c in checked],
        "median": summary.median,
        "worst": summary.worst,
    }


def calibrate(
    out: Annotated[
        Path | None,
        typer.Option(help="Where to save; default: the folder of your own machines and links."),
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="Local processes between which to measure.")
    ] = 2,
    name: Annotated[str, typer.Option(help="The machine's name.")] = "this",
    quick: Annotated[bool, typer.Option(help="Seconds instead of a minute; less sure.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine and, between local nodes, the exchange; `plan --machines this,this
    --link measured` then uses it.

    Example: [bold]cenacle calibrate[/]
    """
    from ..calibration import calibrate as measuring

    result = measuring.calibrate(name, nodes, quick, lambda text: err.print(text))
    path = out or catalog_dir() / f"{name}.toml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}", "out") from error
    _write(path, measuring.as_toml(result))
    names.load([path])  # what was written must read back
    if as_json:
        print(json.dumps({"file": str(path), **result.to_json()}))
    else:
        print(result.table())
        print(f"saved as {path}")


def trace(
    model: Annotated[str, typer.Option("--model", "-m", help="A folder or a hub name.")],
    prompts: Annotated[Path, typer.Option(help="A text file: one prompt per line.")],
    out: Annotated[Path, typer.Option(help="The recording to write.")] = Path("trace.npz"),
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to answer each with.")] = 64,
    nodes: Annotated[int, typer.Option(min=2, help="For how many nodes to simulate.")] = 2,
    copies: Annotated[int, typer.Option(min=0, help="Extra experts per node and layer.")] = 2,
    memory_mb: Annotated[
        float | None, typer.Option(min=0, help="Or: spare memory per node for copies, in MB.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Record which experts each token chooses, and what that costs on several nodes.

    Example: [bold]cenacle trace -m DIR --prompts questions.txt --out trace.npz[/]
    """
    from ..calibration.routing_trace import record
    from ..planning.routing_stats import simulate

    try:
        lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts: cannot read {prompts}: {error}", "prompts") from error
    if not lines:
        raise InputError(f"prompts: {prompts} has no line", "prompts")
    recorded = record(model, lines, max_tokens)
    recorded.save(out)
    each = float(recorded.facts["expert_bytes"]) * len(recorded.layers)  # one of every layer
    if memory_mb is not None:
        copies = min(recorded.experts, int(memory_mb * 1e6 / each))
    result = simulate(recorded, nodes, copies)
    result |= {"copies": copies, "copies_bytes": round(copies * each)}
    if as_json:
        print(json.dumps({"file": str(out), **result}))
        return
    print(
        f"{out}: {recorded.tokens} tokens, {len(recorded.layers)} layers, "
        f"{recorded.top_k} of {recorded.experts} experts a token, "
        f"{format_bytes(out.stat().st_size)}"
    )
    skew = result["skew"]
    print(
        f"routing: entropy {skew['entropy']:.3f} of uniform's, the hottest expert "
        f"{skew['hottest']:.2f}x its share, {skew['unused']:.1%} never chosen, the pair most often "
        f"together {skew['pairs']:.2f}x as often as by chance"
    )
    print(
        f"experts a layer on the busiest of {nodes} nodes, on the half of the tokens that nothing "
        f"was chosen by ({copies} copies are {format_bytes(copies * each)} a node):"
    )
    for what, value in result["busiest"].items():
        print(f"  {what:<34}{value:.4f}")


def register(app: typer.Typer) -> None:
    """Put these verbs beside the others."""
    for verb in (plan, calibrate, validate, trace):
        app.command()(verb)


__all__ = ["CenacleError", "register"]
