"""The demonstration: a small model answers on a few nodes, and shows how.

Owns: which questions are asked, and the output.
Does not know: how answers are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..api import Completion, Model, load
from ..core.plan import Plan
from ..errors import CenacleError
from ..ranks.step_timings import StepTimings
from .smollm import prepare_smollm
from .tasks import KINDS, Task, held_out, is_correct

DEMO_MODEL_DIR = Path(__file__).parent / "demo_model"
COMPONENTS = ("trunk", "experts", "all_reduce", "waiting", "rest")  # of a step's time
RANK_COLORS = (
    *("cyan", "magenta", "yellow", "green", "blue", "red"),
    *("bright_cyan", "bright_magenta"),
)
SMOLLM_QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colors of the rainbow.",
    "What do bees make?",
)
SHADES = " ▁▂▃▄▅▆▇█"


def run_demo(
    nodes: int,
    questions: int,
    seed: int,
    console: Console,
    progress: Callable[[], AbstractContextManager[Any]],
    placement: dict[str, Any],
) -> dict[str, Any]:
    """Answer held-out questions, and print answers, routing and timings.

    Args:
        nodes: number of local processes.
        questions: number of questions, of all kinds in turn.
        seed: selects the questions.
        console: where to print.
        progress: a context manager that gives the progress callback of `api.load`.
        placement: options of `api.load` that place the model.

    Returns:
        A JSON object: "questions", "correct", "answers", "nodes", "tok_per_s", "step_timings_ms",
        "routed".
    """
    if not (DEMO_MODEL_DIR / "config.json").exists():
        raise CenacleError(f"{DEMO_MODEL_DIR}: the demo model is missing; reinstall the package")
    tasks = _choose_tasks(questions, seed)
    with progress() as show:
        model = load(str(DEMO_MODEL_DIR), nodes, measure_every=2, progress=show, **placement)
    with model:
        console.print(
            f"A DBRX of {model.spec.layers} layers, {model.spec.moe[0].experts} experts each, "
            f"{model.spec.top_k} per token, on {nodes} nodes:"
        )
        console.print(model.plan.table(), highlight=False, end="\n\n")
        answers = _answer(model, tasks, console)
        timings = model.group.step_timings
        tokens = sum(len(a.tokens) - 1 for a in answers)
        seconds = sum((len(a.tokens) - 1) / a.tok_per_s for a in answers if a.tok_per_s)
        tok_per_s = tokens / seconds if seconds else 0.0
        correct = sum(is_correct(t, a.text) for t, a in zip(tasks, answers, strict=True))
        console.print(
            f"\n{correct} of {len(answers)} correct, {tok_per_s:.0f} tokens per second\n",
            highlight=False,
        )
        _print_routing(console, model.plan, timings.routed)
        _print_step_timings(console, timings.per_token_ms(), nodes)
        return {
            "questions": len(answers),
            "correct": correct,
            "answers": [
                {"question": t.question, "expected": t.answer, "answer": a.text}
                for t, a in zip(tasks, answers, strict=True)
            ],
            "nodes": nodes,
            "tok_per_s": tok_per_s,
            "step_timings_ms": timings.per_token_ms(),
            "routed": timings.routed,
        }


def run_smollm_demo(
    nodes: int,
    questions: int,
    console: Console,
    progress: Callable[[], AbstractContextManager[Any]],
    placement: dict[str, Any],
) -> dict[str, Any]:
    """Answer questions in English with SmolLM2-135M, and print answers and timings.

    Args and result: as `run_demo`, without "correct"; "answers" have no "expected".
    """
    folder = prepare_smollm(lambda message: console.print(message, highlight=False))
    with progress() as show:
        model = load(str(folder), nodes, measure_every=2, progress=show, **placement)
    with model:
        console.print(
            f"SmolLM2-135M, its {model.spec.layers} feed-forward layers cut into "
            f"{model.spec.moe[0].experts} experts each, all of them chosen, on {nodes} nodes:\n"
        )
        answers = []
        for question in (SMOLLM_QUESTIONS * -(-questions // len(SMOLLM_QUESTIONS)))[:questions]:
            answer = model.generate(question, max_tokens=80, keep_timings=True)
            answers.append((question, answer))
            console.print(Text(question), Text(f"{answer.text}\n", "bold"))
        timings = model.group.step_timings
        _print_step_timings(console, timings.per_token_ms(), nodes)
        tokens = sum(len(a.tokens) - 1 for _, a in answers)
        seconds = sum((len(a.tokens) - 1) / a.tok_per_s for _, a in answers if a.tok_per_s)
        return {
            "questions": len(answers),
            "answers": [{"question": q, "answer": a.text} for q, a in answers],
            "nodes": nodes,
            "tok_per_s": tokens / seconds if seconds else 0.0,
            "step_timings_ms": timings.per_token_ms(),
            "routed": timings.routed,
        }


def _choose_tasks(questions: int, seed: int) -> list[Task]:
    per_kind = -(-questions // len(KINDS))
    columns = [held_out(kind, per_kind, seed) for kind in KINDS]
    return [task for row in zip(*columns, strict=True) for task in row][:questions]


def _answer(model: Model, tasks: list[Task], console: Console) -> list[Completion]:
    model.generate(tasks[0].question, max_tokens=2)  # the first answer includes start-up
    model.group.step_timings = StepTimings()
    answers = []
    for task in tasks:
        answer = model.generate(task.question, max_tokens=64, keep_timings=True)
        answers.append(answer)
        if is_correct(task, answer.text):
            mark = Text("correct", "green")
        else:
            mark = Text(f"wrong: {task.answer}", "red")
        console.print(Text(f"{task.question:<44}"), Text(f"{answer.text:<16}", "bold"), mark)
    return answers


def _print_routing(console: Console, plan: Plan, routed: dict[int, dict[int, int]]) -> None:
    console.print("Use of experts (one column per expert, in the color of its node):")
    table = Table(box=None, show_header=False, padding=(0, 1))
    highest = max((times for layer in routed.values() for times in layer.values()), default=1)
    for layer in plan.layers:
        line, load_per_rank = Text(), [0.0] * plan.nodes
        for expert, slices in enumerate(layer.experts):
            times = routed.get(layer.layer, {}).get(expert, 0)
            for part in slices:  # slices and replicas share an expert's tokens
                load_per_rank[part.rank] += times / len(slices)
            shade = SHADES[min(len(SHADES) - 1, -(-times * (len(SHADES) - 1) // highest))]
            line.append(shade * 2, _rank_color(slices[0].rank))
        total = max(1, sum(load_per_rank))
        shares = Text("  ").join(
            Text(f"node {rank} {100 * load / total:.0f} %", _rank_color(rank))
            for rank, load in enumerate(load_per_rank)
        )
        table.add_row(f"layer {layer.layer}", line, shares)
    console.print(table)


def _rank_color(rank: int) -> str:
    return RANK_COLORS[rank % len(RANK_COLORS)]


def _print_step_timings(console: Console, timings_ms: dict[str, float], nodes: int) -> None:
    console.print(f"\nTime per token (milliseconds, mean of {nodes} nodes):")
    table = Table(box=None, show_header=False, padding=(0, 1))
    total = timings_ms["total"]
    for name in COMPONENTS:
        ms = timings_ms[name]
        share = ms / total if total else 0.0
        label = name.replace("_", "-")
        table.add_row(label, f"{ms:7.2f}", "█" * round(40 * share), f"{100 * share:.0f} %")
    table.add_row("total", f"{total:7.2f}")
    console.print(table)
