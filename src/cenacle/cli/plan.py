"""The commands of the performance model: `cenacle plan`, `calibrate`, `validate`, `record-routing`.

Owns: their options and output.
Does not know: how speeds are predicted (`planning`) or measured (`calibration`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..core.units import format_bytes
from ..errors import CheckpointError, InputError, PlanError
from ..paths import catalog_dir, resolve_model
from .command import command, option
from .console import print_json, report, wide_console, write_text
from .early_checks import check_model, check_output
from .options import JsonOutput, ModelName

if TYPE_CHECKING:
    from ..calibration.validate import Measurement, Validation
    from ..core.model_spec import ModelSpec
    from ..planning.catalog import Catalog
    from ..planning.perf_model import Workload
    from ..planning.planner import Comparison, Curve, PlannerResult
    from ..planning.routing_stats import RoutingTrace

app = typer.Typer()
PANEL = "Planning and measurement"
SECTION_TITLES = {
    "leave_one_out": "leave-one-out over the fitted rows",
    "fitted": "published, fitted",
    "unfitted": "published, not fitted",
}

CatalogFiles = Annotated[
    list[Path] | None,
    typer.Option("--catalog", help="TOML file with your own machines and links; repeatable."),
]


@dataclass(frozen=True)
class WorkloadArguments:
    """How the model is used."""

    quant: str | None = option(
        None,
        "Bits per weight: 4, 4.5, 8, 16, mxfp4, or 2.5/8.5 for experts and the rest. Default: as "
        "stored, or 4 for a name.",
        metavar="BITS",
    )
    context: int = option(4096, "Context length per user, in tokens.", min=1)
    users: int = option(1, "Number of concurrent requests.", min=1)
    prompt_tokens: int = option(512, "Length of the prompt for the time to first token.", min=1)
    routing_trace: Path | None = option(
        None, "Expert routing recorded by `cenacle record-routing`."
    )


@dataclass(frozen=True)
class HardwareArguments:
    """What runs the model, and what to compare it with."""

    link: str | None = option(
        None,
        "Network between the machines, such as tb5-rdma or 10gbe; `measured` is the calibrated "
        "one.",
    )
    memory_fraction: float | None = option(
        None, "Fraction of memory for the model. Default: 0.75 on a Mac.", min=0.05, max=1
    )
    compare: str | None = option(
        None, "Compare speed per dollar with these machines.", metavar="MACHINES"
    )
    what_if: list[str] | None = option(
        None,
        "Plot speed over nodes=1..8, latency=3us..1ms or price=2000..10000; repeatable.",
        metavar="RANGE",
    )


@dataclass(frozen=True)
class OutputFiles:
    """Where to write the results of `plan`."""

    html: Path | None = option(None, "Write a report as one HTML file.")
    png: Path | None = option(
        None, "Plot the first --what-if curve, or else the step timings, as PNG."
    )
    svg: Path | None = option(None, "Write the same plot as SVG.")
    save: Path | None = option(None, "Write the best placement, for `serve --plan`.")


@command(
    app,
    example="cenacle plan qwen3-235b-a22b --machines 4xm3-ultra-512 --link tb5-rdma",
    panel=PANEL,
)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Name in the catalog, Hugging Face repository, folder, config.json, or demo."
        ),
    ],
    machines: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Machines, such as 4xm3-ultra-512 or 1xm3-ultra-256,2xm4-max-128; `this` is the "
            "calibrated one.",
        ),
    ],
    hardware: HardwareArguments,
    usage: WorkloadArguments,
    files: OutputFiles,
    catalog_files: CatalogFiles = None,
    json_output: JsonOutput = False,
) -> None:
    """Predict speed, memory and cost of a model on given machines, and recommend a placement."""
    from ..planning import planner
    from ..planning.catalog import load_catalog
    from ..planning.report import describe_workload, render_terminal
    from ..planning.routing_stats import RoutingTrace

    catalog = load_catalog(catalog_files or ())
    workload, spec = _read_workload(catalog, model, usage)
    nodes, network, constants = planner.resolve_cluster(
        catalog, machines, hardware.link, hardware.memory_fraction
    )
    trace = RoutingTrace.load(usage.routing_trace) if usage.routing_trace is not None else None
    if trace is not None:
        workload = _apply_routing(workload, trace, len(nodes))
    result = planner.evaluate_options(workload, nodes, network, constants)
    comparison = None
    if hardware.compare is not None and result.best is not None:
        # Several machines of the other kind are connected by the same link.
        others = catalog.parse_machines(hardware.compare)
        comparison = planner.compare_per_dollar(result, others, network, constants)
    curves = [
        planner.what_if_curve(text, workload, nodes, network, constants)
        for text in hardware.what_if or ()
    ]
    _write_report(files, result, curves, comparison)
    if files.save is not None:
        _save_plan(files.save, result, spec, trace)
    if json_output:
        print_json(result.to_json())
    else:
        _print_result(result, describe_workload(result.workload))
        if comparison is not None:
            print(comparison.sentence())
        for curve in curves:
            print()
            print(render_terminal(curve))
        _print_unverified_inputs(result)
    if result.best is None:
        raise PlanError(result.advice)


def _read_workload(
    catalog: Catalog, model: str, usage: WorkloadArguments
) -> tuple[Workload, ModelSpec | None]:
    from ..planning.catalog import parse_quantization
    from ..planning.perf_model import Workload

    path = Path(resolve_model(model)).expanduser()
    sizes = (usage.context, usage.users, usage.prompt_tokens)
    if path.exists():
        from ..model.workload import read_workload

        return read_workload(path, usage.quant, *sizes, report)
    if path.suffix == ".json" or model.startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: no such file or folder")
    quantization = parse_quantization(usage.quant or 4)
    return Workload(catalog.model(model), quantization, *sizes), None


def _apply_routing(workload: Workload, trace: RoutingTrace, nodes: int) -> Workload:
    """The workload with the expert load of a recording instead of uniform routing."""
    shape = workload.shape
    if (trace.experts, trace.top_k) != (shape.experts, shape.top_k):
        raise InputError(
            f"--routing-trace: expected {shape.top_k} of {shape.experts} experts per token, as "
            f"{shape.name} has, got {trace.top_k} of {trace.experts}",
            "routing-trace",
        )
    if nodes == 1 or nodes > shape.experts:
        return workload
    return replace(workload, skew=trace.relative_max_load(nodes))


def _write_report(
    files: OutputFiles, result: PlannerResult, curves: list[Curve], comparison: Comparison | None
) -> None:
    from ..planning import report as reports

    for path in (files.png, files.svg):
        if path is not None:
            curve = reports.curve_figure(curves[0]) if curves else None
            reports.save_figure(curve or reports.timings_figure(result.options), path)
    if files.html is not None:
        write_text(files.html, reports.render_html(result, curves, comparison), "html")


def _save_plan(
    path: Path, result: PlannerResult, spec: ModelSpec | None, trace: RoutingTrace | None
) -> None:
    from ..planning import planner

    if spec is None:
        from ..model.workload import estimate_spec

        spec = estimate_spec(result.workload)
    saved_plan, note = planner.best_plan(result, spec, trace)
    saved_plan.save(path)
    report(f"{path}: {saved_plan.placement} experts on {saved_plan.nodes} nodes. {note}")


def _print_result(result: PlannerResult, question: str) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("scheme", "placement", "trunk"):
        table.add_column(column, no_wrap=True)
    numbers = ("nodes", "tok/s", "all users", "first s", "bound by", "GB/node", "USD")
    for column in (*numbers, "USD/(tok/s)", "W"):
        table.add_column(column, justify="right", no_wrap=True)
    for candidate in result.options:
        prediction = candidate.prediction
        if prediction is None or not candidate.fits:
            continue
        recalled = any(m.facts["usd"].confidence == "D" for m in candidate.machines)
        gigabytes = [size / 1e9 for size in dict.fromkeys(prediction.bytes_per_node)]
        table.add_row(
            *(candidate.scheme, candidate.placement, candidate.trunk, str(len(candidate.machines))),
            f"{prediction.tok_per_s:.1f}",
            f"{prediction.tok_per_s_all_users:.1f}",
            f"{prediction.ttft_s:.1f}",
            prediction.bound_by,
            "/".join(f"{gb:.0f}" for gb in gigabytes),
            f"{candidate.usd:,.0f}{'*' if recalled else ''}" if candidate.usd is not None else "?",
            f"{candidate.usd / prediction.tok_per_s:,.0f}" if candidate.usd is not None else "?",
            f"{prediction.watts:.0f}",
        )
    console = wide_console()
    console.print(question, soft_wrap=True)
    console.print(table)
    for candidate in result.options:
        title = (
            f"{candidate.scheme} {candidate.placement} {candidate.trunk} x{len(candidate.machines)}"
        )
        console.print(f"  {title:<38} {candidate.reason}", soft_wrap=True, markup=False)
    console.print(result.advice, soft_wrap=True, markup=False)


def _print_unverified_inputs(result: PlannerResult) -> None:
    from ..planning.perf_model import prediction_inputs

    prediction = result.options[0].prediction
    if prediction is None:
        return
    recalled = [
        name
        for name, fact in prediction_inputs(prediction, result.workload)
        if fact.confidence == "D"
    ]
    if recalled:
        print(f"unverified inputs (*, from memory): {', '.join(recalled)}")


@command(app, example="cenacle calibrate --nodes 2", panel=PANEL)
def calibrate(
    out: Annotated[
        Path | None, typer.Option(help="File to write. Default: NAME.toml in the user's catalog.")
    ] = None,
    nodes: Annotated[
        int,
        typer.Option(
            "--nodes", "-n", metavar="N", min=1, help="Number of local processes to measure."
        ),
    ] = 2,
    name: Annotated[str, typer.Option(help="Name of this machine in the catalog.")] = "this",
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure for seconds only, which is less accurate.")
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Measure this machine and the all-reduce between local processes, for `plan` to use.

    The machine is then known as `this` and the link as `measured`.
    """
    from ..calibration import calibrate as calibration
    from ..planning.catalog import load_catalog

    path = out or catalog_dir() / f"{name}.toml"
    check_output(path, "out")
    result = calibration.calibrate(name, nodes, quick, report)
    write_text(path, result.to_toml(), "out")
    load_catalog([path])  # what was written must be readable
    if json_output:
        print_json({"file": str(path), **result.to_json()})
    else:
        print(result.table())
        print(f"saved as {path}")


@command(app, example="cenacle validate --rows measurements.csv", panel=PANEL)
def validate(
    rows: Annotated[
        Path | None,
        typer.Option(
            help="CSV file of your own measurements, with the columns model, quant_bits, machine, "
            "nodes, link, scheme, context, tok_per_s and source."
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit", help="Refit the constants on the rows for fitting, and cross-validate."
        ),
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="With --refit: write the constants to this file.")
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="First measure local processes; takes several minutes.")
    ] = False,
    catalog_files: CatalogFiles = None,
    json_output: JsonOutput = False,
) -> None:
    """Compare predicted speeds with local, published or your own measurements."""
    from ..calibration import validate as validation
    from ..planning.catalog import CATALOG_DIR, load_catalog

    catalog = load_catalog(catalog_files or ())
    check_output(save, "save")
    if rows is not None:
        measured, errors = validation.read_csv(rows, catalog)
        checks = [validation.validate_one(row, catalog) for row in measured]
        if json_output:
            print_json({**_section_json(checks), "errors": errors})
        else:
            _print_section(str(rows), checks)
        if errors:
            raise InputError(
                f"rows: {rows}: {len(errors)} of {len(errors) + len(measured)} rows cannot be "
                f"predicted; " + "; ".join(errors),
                "rows",
            )
        return
    if run:
        from ..calibration.local_fit import RUNS_FILE
        from ..calibration.local_runs import measure_local_runs

        measure_local_runs(RUNS_FILE, report)
    published = validation.load_published()
    sections: dict[str, list[Validation]] = {}
    if refit:
        rows_to_fit = [row for row in published if row.fit and not row.skip]
        catalog = validation.fit(rows_to_fit, catalog)
        sections["leave_one_out"] = validation.leave_one_out(rows_to_fit, catalog)
        if save is not None:
            old_constants = (CATALOG_DIR / "fits.toml").read_text()
            write_text(save, validation.format_fits(catalog, old_constants), "save")
    checks = validation.validate_all(published, catalog)
    sections["fitted"] = [check for check in checks if check.measurement.fit]
    sections["unfitted"] = [check for check in checks if not check.measurement.fit]
    _report_validation(catalog, sections, [row for row in published if row.skip], json_output)


def _report_validation(
    catalog: Catalog,
    sections: dict[str, list[Validation]],
    skipped: list[Measurement],
    json_output: bool,
) -> None:
    from ..calibration import local_fit
    from ..calibration.validate import compare_with_paper

    paper = compare_with_paper(catalog)
    local_text, local = "", None
    if local_fit.RUNS_FILE.exists():
        runs = local_fit.load_runs(local_fit.RUNS_FILE)
        local_text, local = local_fit.format_runs(runs, *local_fit.fit_runs(runs))
    if json_output:
        names = ("quantity", "stated", "predicted", "remark")
        print_json(
            {
                "local_runs": local,
                **{name: _section_json(checks) for name, checks in sections.items()},
                "skipped": [
                    {
                        "model": row.model,
                        "machines": row.machines,
                        "tok_per_s": row.tok_per_s,
                        "reason": row.skip,
                    }
                    for row in skipped
                ],
                "paper": [dict(zip(names, values, strict=True)) for values in paper],
            }
        )
        return
    if local is not None:
        print(local_text + "\n")
    for name, checks in sections.items():
        _print_section(SECTION_TITLES[name], checks)
    print("\nrows with an error above 25 %:")
    for check in sections["unfitted"]:
        if check.error > 0.25:
            row = check.measurement
            reason = row.reason or "no known reason"
            print(f"  {row.model} on {row.machines}: {check.error:.0%}; {reason}")
    print("not predicted:")
    for row in skipped:
        print(f"  {row.model} on {row.machines}, {row.tok_per_s:g} tok/s: {row.skip}")
    print("\nDBRX paper: stated, predicted")
    for quantity, stated, predicted, remark in paper:
        print(f"  {quantity:<44}{stated:>9.4g}{predicted:>9.4g}  {remark}")


def _section_json(checks: list[Validation]) -> dict[str, Any]:
    from ..calibration.validate import Summary

    summary = Summary.of(checks)
    return {
        "rows": [check.to_json() for check in checks],
        "median": summary.median if summary else None,
        "worst": summary.worst if summary else None,
    }


def _print_section(title: str, checks: list[Validation]) -> None:
    from ..calibration.validate import Summary

    summary = Summary.of(checks)
    if summary is None:
        return
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for column in ("model", "quant", "machines", "link", "scheme"):
        table.add_column(column, no_wrap=True)
    for column in ("context", "measured", "predicted", "error"):
        table.add_column(column, justify="right")
    for check in checks:
        row, predicted = check.measurement, check.prediction
        table.add_row(
            *(
                row.model,
                row.quant,
                row.machines,
                row.link or "",
                row.scheme,
                str(row.context),
            ),
            f"{row.tok_per_s:.4g}",
            f"{predicted.tok_per_s:.4g}" + ("" if predicted.fits else " !"),
            f"{predicted.tok_per_s / row.tok_per_s - 1:+.0%}",
        )
    wide_console().print(table)
    too_large = any(not check.prediction.fits for check in checks)
    print(
        f"{summary.rows} rows, median error {summary.median:.1%}, worst {summary.worst:.1%}"
        + (" (!: exceeds the default memory limit)" if too_large else "")
        + "\n"
    )


@command(
    app,
    name="record-routing",
    example="cenacle record-routing -m DIR --prompts questions.txt --out routing.npz",
    panel=PANEL,
)
def record_routing(
    model: ModelName,
    prompts: Annotated[Path, typer.Option(help="Text file with one prompt per line.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("routing.npz"),
    max_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Maximum number of tokens to generate per prompt."),
    ] = 64,
    nodes: Annotated[
        int, typer.Option("--nodes", "-n", metavar="N", min=2, help="Number of nodes to simulate.")
    ] = 2,
    replicas: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Additional experts per node and layer to simulate."),
    ] = 2,
    replica_memory_mb: Annotated[
        float | None,
        typer.Option(
            min=0, help="Memory per node for additional experts, in MB; overrides --replicas."
        ),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Record which experts each token is routed to, and simulate the load on several nodes."""
    model = check_model(model)
    check_output(out, "out")
    try:
        lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts: cannot read {prompts}: {error}", "prompts") from error
    if not lines:
        raise InputError(f"--prompts: expected at least one line in {prompts}, got none", "prompts")
    from ..calibration.routing_trace import record_routing as record
    from ..planning.routing_stats import simulate_placements

    trace = record(model, lines, max_tokens)
    trace.save(out)
    # One expert of every layer.
    replica_bytes = float(trace.facts["expert_bytes"]) * len(trace.layers)
    if replica_memory_mb is not None:
        replicas = min(trace.experts, int(replica_memory_mb * 1e6 / replica_bytes))
    result = simulate_placements(trace, nodes, replicas)
    result |= {"replicas": replicas, "replica_bytes": round(replicas * replica_bytes)}
    if json_output:
        print_json({"file": str(out), **result})
        return
    skew = result["skew"]
    print(
        f"{out}: {trace.tokens} tokens, {len(trace.layers)} layers, {trace.top_k} of "
        f"{trace.experts} experts per token, {format_bytes(out.stat().st_size)}"
    )
    print(
        f"routing: entropy {skew['entropy']:.3f} of the maximum; the most used expert has "
        f"{skew['hottest']:.2f} times its share, {skew['unused']:.1%} are never used; the most "
        f"frequent pair is {skew['pairs']:.2f} times as frequent as by chance"
    )
    print(
        f"experts per layer on the busiest of {nodes} nodes, on the half of the tokens that was "
        f"not used to place them ({replicas} additional experts take "
        f"{format_bytes(replicas * replica_bytes)} per node):"
    )
    for placement, busiest in result["max_load"].items():
        print(f"  {placement:<34}{busiest:.4f}")
