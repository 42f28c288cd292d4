"""The command `cenacle top`: the cluster view in a terminal.

Owns: what it shows and how; the keys; what changed while it watched.
Does not know: how a server measures (`server/cluster_view.py`).
Invariant: a line is never wider than the terminal, and what a server sends is shown as text, never
as markup or control characters.
Next: `render_view` draws one picture.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..core.units import format_bytes
from ..errors import CenacleError, ClusterError, printable
from .command import command
from .console import draw_bar, join_fitting, print_json, wide_console
from .options import JsonOutput
from .remote import RemoteServer

app = typer.Typer()

DEFAULT_URL = "http://127.0.0.1:8080"
MAX_NOTES = 50
HOT_EXPERTS = 6
FAULT_LINES = 4  # for which there is room before disks and links are shown
SPARKS = "▁▂▃▄▅▆▇█"
LABEL_WIDTH = 13
PARAGRAPH_LINES = 4
ACCOUNT_WIDTH = 60  # columns, for what memory is made of
WIDTH_IN_A_PIPE = 100
COMPONENTS = {
    "trunk": "trunk",
    "experts": "experts",
    "all_reduce": "all-reduce",
    "waiting": "waiting",
    "rest": "rest",
}


@command(app, example="cenacle top --url http://127.0.0.1:8080", panel="Run a model")
def top(
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"The server. Default: this machine's cluster, or else {DEFAULT_URL}.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Model to show. Default: the most recently used one.",
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="CENACLE_API_KEY", help="API key of the server.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate of the server (PEM), if it is self-signed.")
    ] = None,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.2, help="Time between two updates.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print the state once and exit, as in a pipe.")
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """Watch a server: nodes, memory, speed, requests, hot experts, faults. Press q to quit."""
    with contextlib.closing(RemoteServer(url or find_url(), key, certificate)) as server:
        watched = WatchedServer(server.get, model=model)
        watched.update()
        if json_output:
            print_json(watched.view)
        elif once or not (sys.stdout.isatty() and sys.stdin.isatty()):
            console = wide_console(WIDTH_IN_A_PIPE)
            console.print(render_view(watched, console.width))
        else:
            _watch(watched, interval)


def find_url() -> str:
    """The address of the server of this machine's cluster, or that of `cenacle serve`."""
    from .. import paths

    if (paths.cluster_dir() / "head").exists() or (paths.cluster_dir() / "node").exists():
        from .cluster import query_head

        with contextlib.suppress(CenacleError):
            return str(query_head("status").get("url") or DEFAULT_URL)
    return DEFAULT_URL


@dataclass
class WatchedServer:
    """A server's last state, and what happened since it is watched.

    Args:
        get: the JSON of a path with parameters.
        now: seconds since 1970.
        model: which of several; None: the one that was used last.
    """

    get: Callable[..., Any]
    now: Callable[[], float] = time.time
    model: str | None = None
    view: dict[str, Any] = field(default_factory=dict)
    notes: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MAX_NOTES))
    silence: str = ""  # why there is no newer state

    def update(self) -> None:
        """Ask for the present state.

        Raises:
            ClusterError: the server did not answer, and never has.
            InputError: it requires another key, or is no server of Cenacle.
        """
        known = self.view
        parameters = {
            **({"model": self.model} if self.model is not None else {}),
            "placement": str(known.get("placement", {}).get("id", "")),
            "steps": str(known.get("routing", {}).get("steps", "")),
            "timeline": str(known.get("timeline", {}).get("version", "")),
        }
        try:
            view = self.get("/cluster", parameters)
            if not isinstance(view, dict) or not {"ranks", "models"} & set(view):
                raise ClusterError("this is not a Cenacle server: its /cluster has no ranks")
        except ClusterError as error:
            if not known:
                raise
            if not self.silence:
                self._note(f"the server does not answer: {error}")
            self.silence = str(error)
            return
        for name in ("placement", "routing", "timeline"):  # left out where they have not changed
            if name in known:
                view.setdefault(name, known[name])
        if self.silence:
            self._note("the server answers again")
        if view.get("nodes") != known.get("nodes") and "nodes" in view and "nodes" in known:
            self._note(f"nodes: {view['nodes']}, before {known['nodes']}")
        self.view, self.silence = view, ""

    def _note(self, text: str) -> None:
        self.notes.append((self.now(), text))

    def list_events(self) -> list[tuple[float, str]]:
        """The faults that the server knows and what was noted here, by time since 1970."""
        events = list(self.notes)
        for fault in self.view.get("timeline", {}).get("faults", []):
            began, ended = fault["began_at"], fault["ended_at"]
            how_long = "it failed for good" if fault["is_final"] else "it lasts"
            if ended is not None:
                how_long = f"lasted {ended - began:.1f} s" if ended > began else "was short"
            events.append((began, f"{fault['reason']} ({how_long})"))
        return sorted(events, key=lambda event: event[0])


def render_view(watched: WatchedServer, width: int, height: int | None = None) -> RenderableType:
    """As `draw_view`.

    Raises:
        ClusterError: the state is not in the form of this version.
    """
    try:
        return draw_view(watched, width, height)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ClusterError(
            f"unexpected /cluster response ({error!r}); the server may be of another version"
        ) from error


def draw_view(watched: WatchedServer, width: int, height: int | None = None) -> RenderableType:
    """One picture of a server.

    Args:
        watched: updated at least once.
        width: columns.
        height: lines; the timeline gets what the rest leaves. None: all of it.
    """
    faults = [(time.strftime("%H:%M:%S", time.localtime(at)), t) for at, t in watched.list_events()]
    if "ranks" in watched.view:
        lines = [*_head(watched, width), *_load(watched.view, width), *_speed(watched.view, width)]
        nodes, experts = _nodes(watched.view, width), _hot_experts(watched.view, width)
        devices = sum(bool(_describe_devices(rank)) for rank in watched.view["ranks"])
        room = 0 if height is None else height - len(lines) - len(nodes) - len(experts)
        if height is None or room - FAULT_LINES * bool(faults) >= devices:
            nodes = _nodes(watched.view, width, with_devices=True)
        lines += nodes + experts
    else:  # of several models none is loaded
        lines = [Text("no answer" if watched.silence else "idle: no model is loaded", "bold")]
        for name, state in watched.view["models"].items():
            lines.append(Text(f"  {printable(state):<10} {printable(name)}"))
    if height is not None:
        lines = lines[: height - 1]
        faults = faults[-max(0, height - len(lines) - 2) :] if height - len(lines) > 2 else []
    if faults:
        lines += [
            Text("faults", "bold"),
            *(Text(f"  {at}  {printable(text)}") for at, text in faults),
        ]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def _head(watched: WatchedServer, width: int) -> list[Text]:
    view, plan = watched.view, watched.view["plan"]
    status, style = str(view["status"]), "bold green" if view["status"] == "ok" else "bold red"
    if watched.silence:
        status, style = "no answer", "bold red"
    nodes = f"{view['nodes']} node{'s' * (view['nodes'] != 1)}"
    title = Text.assemble(
        (status, style), "  ", (printable(view["model"]), "bold"), f"  {nodes}, up "
    )
    title.append(_format_duration(view["uptime_s"]))
    lines = [title]
    if view["nodes"] > 1:
        placement = f"{plan['placement']} experts, {plan['trunk']} trunk, {plan['backend']}"
        lines.append(_row("placement", printable(placement)))
    if view.get("reason"):
        lines.append(_row("because", printable(view["reason"])))
    if view.get("detail"):  # what new ranks wait for
        lines += _paragraph("now", view["detail"], width)
    return lines


def _load(view: dict[str, Any], width: int) -> list[Text]:
    history, totals, drafts = view["history"], view["totals"], view["drafts"]
    rates = history["tokens_per_s"]
    room = max(0, min(60, width - LABEL_WIDTH - 24))
    now = rates[-1] if rates else 0.0
    cached = ""
    if totals["cached_tokens"]:
        cached = f" ({totals['cached_tokens'] / totals['prompt_tokens']:.0%} cached)"
    lines = [
        _row("tokens/s", f"{now:<7g}{draw_sparks(rates, room)} most {max(rates, default=0):g}"),
        *_day(view, width),
        *_traffic(view, room),
        _row("requests", f"{view['running']} running, {view['waiting']} waiting"),
        _row(
            "so far",
            f"{totals['requests']:,} requests, {totals['prompt_tokens']:,}{cached} + "
            f"{totals['generated_tokens']:,} tokens",
        ),
    ]
    if drafts["drafted"]:
        share = drafts["accepted"] / drafts["drafted"]
        lines.append(_row("drafts", f"{share:.0%} of {drafts['drafted']:,} accepted"))
    return lines


def _traffic(view: dict[str, Any], room: int) -> list[Text]:
    rates = view["history"]["sent_bytes_per_s"]
    if view["nodes"] < 2 or not rates:
        return []
    now, most = format_bytes(rates[-1]), format_bytes(max(rates))
    return [_row("sent/s", f"{now:<7} {draw_sparks(rates, room - 1)} most {most}")]


def _day(view: dict[str, Any], width: int) -> list[Text]:
    minutes = view.get("timeline", {}).get("tokens_per_s", [])
    if len(minutes) < 2:
        return []
    room = max(1, min(60, width - LABEL_WIDTH - 24))
    size = -(-len(minutes) // room)  # minutes for each block
    means = [
        sum(minutes[at : at + size]) / len(minutes[at : at + size])
        for at in range(0, len(minutes), size)
    ]
    hours = f"{len(minutes) / 60:.1f} h"
    return [
        _row("", f"{hours:<7}{draw_sparks(means, room)} mean {sum(minutes) / len(minutes):.1f}")
    ]


def _speed(view: dict[str, Any], width: int) -> list[Text]:
    timings, prediction = view["step_timings"], view.get("prediction")
    measured = timings["mean_ms"] if timings["steps"] else None
    predicted = prediction["step_timings_ms"] if prediction else None
    if measured is None and predicted is None:
        return [_row("ms/token", "nothing measured or predicted yet")]
    lines = [_row("ms/token", f"{'measured':>9}{'predicted':>11}", "dim")]
    totals = {"total": "total"}
    largest = max(v for ms in (measured, predicted) if ms for v in (*ms.values(), 1e-9))
    room = width - LABEL_WIDTH - 22
    for name, label in {**COMPONENTS, **totals}.items():
        cells = [f"{ms[name]:.2f}" if ms else "-" for ms in (measured, predicted)]
        line = _row(f"  {label}", f"{cells[0]:>9}{cells[1]:>11}", label_style="")
        if measured and name != "total" and room > 5:
            line.append("  " + draw_bar(measured[name] / largest, min(40, room)), "cyan")
        if measured and predicted and name == "total":
            line.append(f"  {measured['total'] / predicted['total'] - 1:+.0%}", "bold")
        lines.append(line)
    return lines


def _nodes(view: dict[str, Any], width: int, *, with_devices: bool = False) -> list[Text]:
    lines = [Text("nodes", "bold")]
    for rank in view["ranks"]:
        memory = rank["memory"]
        used = "memory unknown"
        if memory:
            resident, total = memory["resident_bytes"], memory["total_bytes"]
            taken = 1 - memory["available_bytes"] / total
            bar = draw_bar(taken, max(5, min(20, width - 50)), "░")
            used = f"{bar} {taken:.0%} of {format_bytes(total)}, {format_bytes(resident)} here"
        line = Text(f"  {rank['rank']}  ")
        line.append(used)
        if rank["silent_s"] > 3:
            line.append(f"  silent for {rank['silent_s']:.0f} s", "bold red")
        line.append(f"  {printable(rank['device'])}", "dim")
        lines.append(line)
        if memory and width >= ACCOUNT_WIDTH:
            lines.append(_memory_account(rank))
        devices = join_fitting(_describe_devices(rank), width - 5) if with_devices else ""
        if devices:
            lines.append(Text(f"     {devices}", "dim"))
    return lines


def _describe_devices(rank: dict[str, Any]) -> list[str]:
    """A rank's disk and its slowest link."""
    parts = []
    if disk := rank["disk"]:
        free, total = format_bytes(disk["free_bytes"]), format_bytes(disk["total_bytes"])
        parts.append(f"disk {free} free of {total}")
    if link := rank["link"]:
        parts.append(f"sent {format_bytes(link['sent_bytes'])}")
        if link["latency_s"] is not None:
            rate = format_bytes(link["bytes_per_s"])
            parts.append(f"link {1000 * link['latency_s']:.2g} ms, {rate}/s")
    return parts


def _memory_account(rank: dict[str, Any]) -> Text:
    """What of a rank's resident memory is what; red if it is more than it should be."""
    memory = rank["memory"]
    weights, caches = format_bytes(rank["weights_bytes"]), format_bytes(memory["cache_bytes"])
    text = f"     weights {weights}, caches {caches}, rest {format_bytes(memory['rest_bytes'])}"
    if memory["resident_bytes"] <= memory["limit_bytes"]:
        return Text(text, "dim")
    return Text(f"{text}, above {format_bytes(memory['limit_bytes'])}", "bold red")


def _hot_experts(view: dict[str, Any], width: int) -> list[Text]:
    layers = view.get("placement", {}).get("layers", [])
    hottest = find_hot_experts(view.get("routing", {}).get("counts", []))
    if not hottest:
        return []
    lines = [Text("hot experts", "bold").append(", times a fair share", "not bold dim")]
    room = max(5, min(40, width - 32))
    for row, expert, ratio in hottest:
        layer = layers[row][0] if row < len(layers) else row
        bar = draw_bar(ratio / hottest[0][2], room)
        line = Text(f"  layer {layer:<3} expert {expert:<4}")
        line.append(bar.ljust(room), "magenta")
        lines.append(line.append(f" {ratio:.1f}"))
    return lines


def find_hot_experts(
    counts: Sequence[Sequence[int]], most: int = HOT_EXPERTS
) -> list[tuple[int, int, float]]:
    """The experts that were chosen most, compared with an equal share in their layer.

    Args:
        counts: by layer and expert, how often it was chosen.

    Returns:
        Row of the layer, expert, and times the share; the hottest first.
    """
    ratios = [
        (row, expert, count * len(layer) / sum(layer))
        for row, layer in enumerate(counts)
        if sum(layer)
        for expert, count in enumerate(layer)
    ]
    return sorted(ratios, key=lambda item: -item[2])[:most]


def draw_sparks(values: Sequence[float], width: int) -> str:
    """The last values as a line of blocks, the largest full."""
    shown = list(values)[-width:] if width > 0 else []
    largest = max(shown, default=0) or 1
    return "".join(SPARKS[round(max(0, v) / largest * (len(SPARKS) - 1))] for v in shown)


def _row(label: str, text: str, style: str = "", label_style: str = "bold") -> Text:
    return Text.assemble((f"{label:<{LABEL_WIDTH}}", label_style), (text, style))


def _paragraph(label: str, text: str, width: int) -> list[Text]:
    """Rows of a sentence, the last of which is cut off where there would be more."""
    wrapped = textwrap.wrap(
        printable(text), max(20, width - LABEL_WIDTH), max_lines=PARAGRAPH_LINES, placeholder=" ..."
    )
    return [_row(label if at == 0 else "", line) for at, line in enumerate(wrapped)]


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d " * bool(days) + f"{hours}:{minutes:02}:{rest:02}"


def _watch(watched: WatchedServer, interval_s: float) -> None:
    """Show the server until q is pressed."""
    console = wide_console()

    def picture() -> RenderableType:
        bottom = Text("q quits", "dim", no_wrap=True)
        return Group(render_view(watched, console.width, console.height - 1), bottom)

    with _single_keys() as read_key:
        with Live(picture(), console=console, screen=True, auto_refresh=False) as live:
            while True:
                if read_key(interval_s) in ("q", "Q", "\x1b", "\x04"):
                    return
                watched.update()
                live.update(picture(), refresh=True)


@contextlib.contextmanager
def _single_keys() -> Iterator[Callable[[float], str]]:
    """Read keys without Enter and without showing them.

    Yields:
        A function that waits for at most so many seconds: the key, or "" if none was pressed.
    """
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)

    def read_key(timeout_s: float) -> str:
        ready, _, _ = select.select([number], [], [], timeout_s)
        if not ready:
            return ""
        pressed = os.read(number, 32).decode(errors="ignore")
        if not pressed:
            return "q"  # the terminal has gone
        return pressed[:1] if len(pressed) == 1 or pressed[:1] != "\x1b" else ""

    try:
        yield read_key
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
