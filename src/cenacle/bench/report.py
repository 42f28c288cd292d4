"""Results of benchmarks as tables for people; the JSON object is for programs.

Owns: what is shown and how it is rounded.
Does not know: how anything is measured.
Next: nothing.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

TERMS = ("trunk", "experts", "all_reduce", "waiting", "rest", "total")


def show_bench(result: dict[str, Any], console: Console) -> None:
    """Print what `measure.run` found."""
    on, token = result["conditions"], result["ceilings"]["token"]
    console.print(
        f"{result['model']}: {result['family']}, {result['quantization'] or result['dtype']}; "
        f"{on['nodes']} nodes of {on['threads']} threads on {on['cores']} cores"
        f"{'' if on['pinned'] else ' (not pinned)'}, {on['kernels']}, {on['backend']}, "
        f"experts {on['placement']}, trunk {on['trunk']}; load before {on['load_before']}"
    )
    table = Table("what", "tok/s", "", box=None)
    for row in result["prefill"]:
        table.add_row(f"prompt of {row['tokens']}", f"{row['tok_s']:.1f}", _spread(row))
    for row in result["decode"]:
        table.add_row(f"decode at {row['context']}", f"{row['tok_s']:.2f}", _spread(row))
    for row in result["streams"]:
        ratio = f"{row['ratio']:.2f} times one" if row["ratio"] else ""
        table.add_row(f"{row['streams']} streams", f"{row['tok_s']:.2f}", ratio)
    console.print(table)

    table = Table("ms per token", *TERMS, "reads", "memory", box=None)
    for row in result["ranks"]:
        terms = row.get("terms_ms", {})
        table.add_row(
            f"rank {row['rank']}",
            *(f"{terms[t]:.2f}" if terms else "" for t in TERMS),
            f"{row['token_bytes'] / 1e6:.0f} MB",
            f"{row['read_gb_s']:.1f} GB/s",
        )
    console.print(table)
    reads = ", ".join(f"{t} threads {v:.1f}" for t, v in result["ceilings"]["read_gb_s"].items())
    console.print(f"reading memory, GB/s: {reads}")
    for row in result["ceilings"]["exchange_us"]:
        one, chain = f"{row['one']:.0f} us", f"{row['chain']:.0f}"
        console.print(f"exchange of {row['bytes']:,} bytes: {one}, in a chain {chain}")
    console.print(
        f"a token reads {token['bytes'] / 1e6:.0f} MB on the busiest rank: {token['read_ms']:.2f} "
        f"ms at that rank's bandwidth; it takes {token['token_ms']:.2f} ms, "
        f"{token['percent']:.0f} % of the ceiling"
    )
    if token["kernels_ms"] is not None:
        console.print(
            f"its matrices alone take {token['kernels_ms']:.2f} ms; "
            f"{token['outside_percent']:.0f} % of a token is neither they nor an exchange"
        )
    if result["peers"]:
        table = Table("peer", "decode", "ours / theirs", "prompt", "ours / theirs", box=None)
        for row in result["peers"]:
            if "failed" in row:
                table.add_row(row["name"], "failed")
                console.print(f"{row['name']} failed: {row['failed']}", markup=False)
                continue
            cells = []
            for what in ("decode", "prefill"):
                cells += [f"{row[f'{what}_tok_s']:.2f}", f"{row[f'{what}_ratio']:.2f}"]
            table.add_row(row["name"], *cells)
        console.print(table)


def _spread(row: dict[str, Any]) -> str:
    low, high = min(row["all"]), max(row["all"])
    return f"{low:.1f} to {high:.1f}" if len(row["all"]) > 1 else ""


def show_ablation(result: dict[str, Any], console: Console) -> None:
    """Print what `ablation.run` found."""
    console.print(
        f"{result['model']}: {result['family']}, {result['layers']} layers, "
        f"{result['conditions']['nodes']} nodes; milliseconds per token as rank 0 sees them"
    )
    base = {(c["latency_ms"], c["row"], c["over"]): c for c in result["compared"]}
    columns = ("experts", "all_reduce", "waiting", "trunk", "rest")
    over = ("/ naive", "layers", "/ P-LR-D", "layers")
    table = Table("link", "row", "tok/s", *columns, *over, box=None)
    for row in result["rows"]:
        cells = []
        for of in ("naive", "P-LR-D"):
            one = base[row["latency_ms"], row["row"], of]
            cells += [f"{one['token']:.2f}", f"{one['layers']:.2f}"]
        table.add_row(
            f"{row['latency_ms']:g} ms",
            row["row"],
            f"{row['tok_s']:.2f}",
            *(f"{row['terms_ms'][t]:.2f}" for t in columns),
            *cells,
        )
    console.print(table)
    if result["depth"] is not None:
        console.print(f"calculated for all {result['depth']} layers, tok/s:")
        table = Table("link", *dict.fromkeys(r["row"] for r in result["rows"]), box=None)
        for latency in dict.fromkeys(r["latency_ms"] for r in result["rows"]):
            deep = [c for c in result["compared"] if c["latency_ms"] == latency]
            cells = [f"{c['depth_tok_s']:.2f}" for c in deep if c["over"] == "naive"]
            table.add_row(f"{latency:g} ms", *cells)
        console.print(table)
