"""The demonstration: a small trained DBRX on a few nodes answers, and shows how it did it.

Owns: what the demo asks and how the result is drawn.
Does not know: how anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..api import Completion, load
from ..core.plan import Plan
from ..errors import CenacleError
from ..ranks.step_timings import StepTimings
from .tasks import KINDS, Task, held_out, is_correct

DEMO_MODEL_DIR = Path(__file__).parent / "demo_model"
STEP_PHASES = ("trunk", "experts", "all_reduce", "waiting", "rest")
RANK_COLOURS = (
    "cyan",
    "magenta",
    "yellow",
    "green",
    "blue",
    "red",
    "bright_cyan",
    "bright_magenta",
)
SHADES = " ▁▂▃▄▅▆▇█"


def run_demo(
    nodes: int,
    questions: int,
    seed: int,
    console: Console,
    progress: Callable[[], AbstractContextManager[Any]],
    dealt: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask held-out questions and draw what happened.

    Args:
        nodes: local processes.
        questions: how many, over all kinds in turn.
        seed: which.
        console: where to draw.
        progress: gives the progress callback of `api.load`.
        dealt: arguments of `api.load` that say how to place the model; None: whole experts.

    Returns:
        A JSON object: "asked", "right", "answers", "tok_per_s", "terms_ms", "routed", "nodes".
    """
    if not (DEMO_MODEL_DIR / "config.json").exists():
        raise CenacleError(
            f"the demo model is missing from {DEMO_MODEL_DIR}; install the package again"
        )
    tasks = _choose_tasks(questions, seed)
    with progress() as show:
        dealt = dealt or {"placement": "whole", "trunk": "replicated"}
        model = load(str(DEMO_MODEL_DIR), nodes, measure_every=2, progress=show, **dealt)
    with model:
        console.print(
            f"A DBRX of {model.spec.layers} layers, {model.spec.moe[0].experts} experts each, "
            f"{model.spec.top_k} per token, on {nodes} nodes:"
        )
        console.print(model.plan.table(), highlight=False, end="\n\n")
        model.generate(tasks[0].question, max_tokens=2)  # the first answer would pay for start-up
        answers: list[tuple[Task, Completion]] = []
        model.group.step_timings = StepTimings()
        for task in tasks:
            answer = model.generate(task.question, max_tokens=64, keep_timings=True)
            answers.append((task, answer))
            ok = is_correct(task, answer.text)
            mark = Text("right", "green") if ok else Text(f"wrong: {task.answer}", "red")
            console.print(Text(f"{task.question:<44}"), Text(f"{answer.text:<16}", "bold"), mark)
        terms = model.group.step_timings
        total = sum(len(a.tokens) - 1 for _, a in answers)
        seconds = sum((len(a.tokens) - 1) / a.tok_per_s for _, a in answers if a.tok_per_s)
        rate = total / seconds if seconds else 0.0
        right = sum(is_correct(t, a.text) for t, a in answers)
        console.print(
            f"\n{right} of {len(answers)} right, {rate:.0f} tokens a second\n", highlight=False
        )
        _print_routing(console, model.plan, terms.routed)
        _print_step_timings(console, terms.per_token_ms(), nodes)
        return {
            "asked": len(answers),
            "right": right,
            "answers": [
                {"question": t.question, "expected": t.answer, "answer": a.text} for t, a in answers
            ],
            "nodes": nodes,
            "tok_per_s": rate,
            "terms_ms": terms.per_token_ms(),
            "routed": terms.routed,
        }


def _choose_tasks(questions: int, seed: int) -> list[Task]:
    per_kind = -(-questions // len(KINDS))
    columns = [held_out(kind, per_kind, seed) for kind in KINDS]
    return [task for row in zip(*columns, strict=True) for task in row][:questions]


def _print_routing(console: Console, plan: Plan, routed: dict[int, dict[int, int]]) -> None:
    console.print("Experts that worked (a column is an expert, its colour the node that has it):")
    table = Table(box=None, show_header=False, padding=(0, 1))
    most = max((times for seen in routed.values() for times in seen.values()), default=1)
    for layer in plan.layers:
        seen = routed.get(layer.layer, {})
        line = Text()
        counts = [0.0] * plan.nodes
        for expert, parts in enumerate(layer.experts):
            times = seen.get(expert, 0)
            rank = parts[0].rank
            for part in parts:  # of an expert in slices each has its width, of replicas each a part
                counts[part.rank] += times / len(parts)
            shade = SHADES[min(len(SHADES) - 1, -(-times * (len(SHADES) - 1) // most))]
            line.append(shade * 2, RANK_COLOURS[rank % len(RANK_COLOURS)])
        shares = Text("  ").join(
            Text(
                f"node {r} {100 * c / max(1, sum(counts)):.0f} %",
                RANK_COLOURS[r % len(RANK_COLOURS)],
            )
            for r, c in enumerate(counts)
        )
        table.add_row(f"layer {layer.layer}", line, shares)
    console.print(table)


def _print_step_timings(console: Console, terms: dict[str, float], nodes: int) -> None:
    console.print(f"\nWhere the time of a token went (mean of {nodes} nodes, milliseconds):")
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name in STEP_PHASES:
        share = terms[name] / terms["total"] if terms["total"] else 0.0
        table.add_row(name, f"{terms[name]:7.2f}", "█" * round(40 * share), f"{100 * share:.0f} %")
    table.add_row("total", f"{terms['total']:7.2f}")
    console.print(table)
