"""The verb `cenacle doctor`.

Owns: its arguments and what is printed. Invariant: as `cli.py`; status 1 if anything is bad.
Next: `cluster/doctor.py` finds it.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

Head = Annotated[
    str | None,
    typer.Option(metavar="HOST[:PORT]", help="Another node: the way to it, and its clock."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]

MARKS = {"bad": "[red]✗[/]", "warning": "[yellow]![/]", "good": "[green]✓[/]"}


def doctor(head: Head = None, as_json: AsJson = False) -> None:
    """What is wrong with this machine, and what to do about it.

    Example: cenacle doctor --head 192.168.1.10:8080
    """
    from .cluster.doctor import examine, gather

    found = examine(gather(head))
    bad = any(f.level == "bad" for f in found)
    if as_json:
        print(json.dumps({"healthy": not bad, "findings": [f.to_json() for f in found]}))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for f in found:
            console.print(f"{MARKS[f.level]} ", end="")
            console.print(f.what, markup=False)
            if f.fix:
                console.print(f"  {f.fix}", style="dim", markup=False)
        if all(f.level == "good" for f in found):
            console.print("Nothing is wrong that can be seen from here.")
    if bad:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(doctor)
