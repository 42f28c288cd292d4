"""The verb `cenacle doctor`.

Owns: its arguments and what is printed. Invariant: as `cli.py`; status 1 if anything is bad.
Next: `cluster/doctor.py` finds it.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from . import cluster as cluster_commands

Head = Annotated[
    str | None,
    typer.Option(metavar="HOST[:PORT]", help="Another node: the way to it, and its clock."),
]
Cluster = Annotated[
    bool, typer.Option("--cluster", help="Every machine of this machine's cluster, by its agent.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]

CLUSTER_S = 75.0  # longer than the head waits for a machine
MARKS = {"bad": "[red]✗[/]", "warning": "[yellow]![/]", "good": "[green]✓[/]"}


def doctor(head: Head = None, cluster: Cluster = False, as_json: AsJson = False) -> None:
    """What is wrong with this machine, or with all of its cluster, and what to do about it.

    Example: cenacle doctor --head 192.168.1.10:8080
    """
    from ..cluster.doctor import Finding, examine, gather

    if cluster:
        identity, where = cluster_commands.cluster()
        answer = cluster_commands.ask(identity, where, "doctor", deadline_s=CLUSTER_S)
        machines = {n: [Finding(**f) for f in said] for n, said in answer["machines"].items()}
    else:
        machines = {"": examine(gather(head))}
    every = [f for found in machines.values() for f in found]
    bad = any(f.level == "bad" for f in every)
    if as_json:
        said = {n: [f.to_json() for f in found] for n, found in machines.items()}
        kept = {"machines": said} if cluster else {"findings": said[""]}
        print(json.dumps({"healthy": not bad, **kept}))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for name, found in machines.items():
            if name:
                console.print(name, style="bold", markup=False)
            for f in found:
                console.print(f"{MARKS[f.level]} ", end="")
                console.print(f.what, markup=False)
                if f.fix:
                    console.print(f"  {f.fix}", style="dim", markup=False)
        if all(f.level == "good" for f in every):
            console.print("Nothing is wrong that can be seen from here.")
    if bad:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(doctor)
