"""Results of benchmarks as tables for people.

Owns: what is shown, and how it is rounded.
Does not know: how anything is measured.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

PHASES = ("trunk", "experts", "all_reduce", "waiting", "rest", "total")


def show_bench(result: dict[str, Any], console: Console) -> None:
    """Print the result of `measure.run_bench`."""
    conditions = result["conditions"]
    console.print(
        f"{result['model']}: {result['family']}, {result['quantization'] or result['dtype']}; "
        f"{conditions['nodes']} nodes of {conditions['threads']} threads on {conditions['cores']} "
        f"cores{'' if conditions['pinned'] else ' (not pinned)'}, {conditions['kernels']}, "
        f"{conditions['backend']}, experts {conditions['placement']}, trunk {conditions['trunk']}; "
        f"load before {conditions['load_before']}"
    )
    table = Table("", "tok/s", "", box=None)
    for row in result["prefill"]:
        table.add_row(f"prompt of {row['tokens']}", f"{row['tok_per_s']:.1f}", _range(row))
    for row in result["decode"]:
        table.add_row(f"decoding at {row['context']}", f"{row['tok_per_s']:.2f}", _range(row))
    for row in result["concurrency"]:
        ratio = f"{row['ratio']:.2f} times one" if row["ratio"] else ""
        table.add_row(f"{row['requests']} requests", f"{row['tok_per_s']:.2f}", ratio)
    console.print(table)
    _show_ranks(result["ranks"], console)
    _show_limits(result["hardware_limits"], console)
    if result["peers"]:
        _show_peers(result["peers"], console)


def show_emulation(result: dict[str, Any], console: Console) -> None:
    """Print the result of `emulation.run_emulation`."""
    names = list(dict.fromkeys(row["machines"] for row in result["rows"]))
    for index, name in enumerate(names):
        row = next(row for row in result["rows"] if row["machines"] == name)
        console.print(f"{index + 1}: {name}, experts {row['placement']}, trunk {row['trunk']}")
    table = Table(
        *("", "requests", "tok/s", "ratio", "predicted", "ratio"),
        *("read", "wait", "link", "late", "ms a pass", "late passes"),
        box=None,
    )
    for row in result["rows"]:
        busiest = max(row["ranks"], key=lambda rank: rank["pass_ms"]["read"])
        pass_ms = busiest["pass_ms"]
        predicted = row["predicted_tok_per_s"]
        table.add_row(
            str(names.index(row["machines"]) + 1),
            str(row["requests"]),
            f"{row['tok_per_s']:.2f}",
            f"{row['ratio']:.2f}",
            "" if predicted is None else f"{predicted:.2f}",
            "" if predicted is None else f"{row['predicted_ratio']:.2f}",
            *(f"{pass_ms[part]:.2f}" for part in ("read", "wait", "link", "late", "total")),
            f"{row['late_percent']:.0f} %",
        )
    console.print(table)
    latest = max(result["rows"], key=lambda row: row["late_time_percent"])
    if latest["late_percent"] > 0:
        console.print(
            f"this computer could not keep up in every pass (group "
            f"{names.index(latest['machines']) + 1}: {latest['late_percent']:.0f} % of passes, "
            f"{latest['late_time_percent']:.1f} % of their time): the machines would be faster; "
            f"use a larger slow=FACTOR, or a smaller model and bandwidth"
        )


def _show_ranks(ranks: list[dict[str, Any]], console: Console) -> None:
    table = Table("ms per token", *PHASES, "reads", "memory", box=None)
    for row in ranks:
        timings_ms = row.get("step_timings_ms", {})
        table.add_row(
            f"rank {row['rank']}",
            *(f"{timings_ms[phase]:.2f}" if timings_ms else "" for phase in PHASES),
            f"{row['token_bytes'] / 1e6:.0f} MB",
            f"{row['read_gb_s']:.1f} GB/s",
        )
    console.print(table)


def _show_limits(limits: dict[str, Any], console: Console) -> None:
    token = limits["token"]
    reads = ", ".join(f"{v:.1f} with {t} threads" for t, v in limits["read_gb_s"].items())
    console.print(f"memory reads, GB/s: {reads}")
    for row in limits["all_reduce_us"]:
        one, chain = f"{row['one']:.0f} us", f"{row['chain']:.0f} us"
        console.print(f"all-reduce of {row['bytes']:,} bytes: {one}, in a chain {chain}")
    console.print(
        f"a token reads {token['bytes'] / 1e6:.0f} MB on the busiest rank: {token['read_ms']:.2f} "
        f"ms at the bandwidth of that rank; it takes {token['token_ms']:.2f} ms, "
        f"{token['percent']:.0f} % of the limit"
    )
    if token["kernels_ms"] is not None:
        console.print(
            f"its matrices alone take {token['kernels_ms']:.2f} ms; "
            f"{token['outside_percent']:.0f} % of a token is neither matrices nor all-reduce"
        )


def _show_peers(peers: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        "peer", "decode", "ours / theirs", "prompt", "ours / theirs", "requests", box=None
    )
    for row in peers:
        if "failed" in row:
            table.add_row(row["name"], "failed")
            console.print(f"{row['name']} failed: {row['failed']}", markup=False)
            continue
        cells = []
        for phase in ("decode", "prefill"):
            cells += [f"{row[f'{phase}_tok_per_s']:.2f}", f"{row[f'{phase}_ratio']:.2f}"]
        requests = ", ".join(
            f"{cell['requests']}: {cell['tok_per_s']:.1f} ({cell['ratio']:.2f})"
            for cell in row["concurrency"]
        )
        table.add_row(row["name"], *cells, requests)
    console.print(table)


def _range(row: dict[str, Any]) -> str:
    low, high = min(row["all"]), max(row["all"])
    return f"{low:.1f} to {high:.1f}" if len(row["all"]) > 1 else ""


def show_ablation(result: dict[str, Any], console: Console) -> None:
    """Print the result of `schedule_ablation.run_ablation`."""
    console.print(
        f"{result['model']}: {result['family']}, {result['layers']} layers, "
        f"{result['conditions']['nodes']} nodes; milliseconds per token of rank 0"
    )
    speedups = {(c["latency_ms"], c["row"], c["over"]): c for c in result["compared"]}
    phases = ("experts", "all_reduce", "waiting", "trunk", "rest")
    over = ("/ naive", "layers", "/ P-LR-D", "layers")
    table = Table("link", "row", "tok/s", *phases, *over, box=None)
    for row in result["rows"]:
        cells = []
        for base in ("naive", "P-LR-D"):
            speedup = speedups[row["latency_ms"], row["row"], base]
            cells += [f"{speedup['token']:.2f}", f"{speedup['layers']:.2f}"]
        table.add_row(
            f"{row['latency_ms']:g} ms",
            row["row"],
            f"{row['tok_per_s']:.2f}",
            *(f"{row['step_timings_ms'][phase]:.2f}" for phase in phases),
            *cells,
        )
    console.print(table)
    if result["depth"] is not None:
        console.print(f"calculated for all {result['depth']} layers, tok/s:")
        table = Table("link", *dict.fromkeys(r["row"] for r in result["rows"]), box=None)
        for latency_ms in dict.fromkeys(r["latency_ms"] for r in result["rows"]):
            deep = [c for c in result["compared"] if c["latency_ms"] == latency_ms]
            cells = [f"{c['depth_tok_per_s']:.2f}" for c in deep if c["over"] == "naive"]
            table.add_row(f"{latency_ms:g} ms", *cells)
        console.print(table)
