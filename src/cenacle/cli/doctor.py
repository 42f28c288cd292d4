"""The command `cenacle doctor`.

Owns: its options and output.
Does not know: what is checked.
Invariant: exits with status 1 if a finding is bad.
Next: `cluster/doctor.py` makes the findings.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .cluster import query_head
from .command import command
from .console import PipeConsole, print_json
from .options import JsonOutput

app = typer.Typer()

CLUSTER_TIMEOUT_S = 75.0  # longer than the head waits for a node
SYMBOLS = {"bad": "[red]✗[/]", "warning": "[yellow]![/]", "good": "[green]✓[/]"}


@command(app, example="cenacle doctor --head 192.168.1.10:8080", panel="Cluster")
def doctor(
    head: Annotated[
        str | None,
        typer.Option(
            metavar="HOST[:PORT]", help="Also check the network path to this node, and its clock."
        ),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Check every node of the cluster.")
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Check this machine or its cluster for problems, and suggest how to fix them."""
    from ..cluster.doctor import examine, gather
    from ..cluster.messages import Finding

    if cluster:
        answer = query_head("doctor", timeout_s=CLUSTER_TIMEOUT_S)
        findings_by_node = {
            node: [Finding.from_json(finding) for finding in findings]
            for node, findings in answer["nodes"].items()
        }
    else:
        findings_by_node = {"": examine(gather(head))}
    levels = {finding.level for findings in findings_by_node.values() for finding in findings}
    if json_output:
        rows = {
            node: [f.to_json() for f in findings] for node, findings in findings_by_node.items()
        }
        details = {"nodes": rows} if cluster else {"findings": rows[""]}
        print_json({"healthy": "bad" not in levels, **details})
    else:
        console = PipeConsole(highlight=False, soft_wrap=True)
        for node, findings in findings_by_node.items():
            if node:
                console.print(node, style="bold", markup=False)
            for finding in findings:
                console.print(f"{SYMBOLS[finding.level]} ", end="")
                console.print(finding.message, markup=False)
                if finding.fix:
                    console.print(f"  {finding.fix}", style="dim", markup=False)
        if levels <= {"good"}:
            console.print("No problems found.")
    if "bad" in levels:
        raise typer.Exit(1)
