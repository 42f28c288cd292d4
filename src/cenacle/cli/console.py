"""Output helpers that every command uses.

Owns: the console on stderr, JSON and tables on stdout, the progress bars of loading.
Does not know: commands and their options.
Invariant: results go to stdout, everything else to stderr; with --json the last line of stdout is
one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from ..errors import InputError
from ..logs import LogFormat, format_time

FALLBACK_WIDTH = 120  # of tables in a pipe
# Whether another process of this program watches over this one; it speaks for both.
IS_SUPERVISED = "CENACLE_SUPERVISED" in os.environ


class PipeConsole(Console):
    """A console whose reader may go away: that is an error like any other, where `rich` exits."""

    def on_broken_pipe(self) -> None:
        """See `rich`."""
        raise BrokenPipeError


# No emoji: ":AB:" may be part of a fingerprint.
stderr_console = PipeConsole(stderr=True, highlight=False, emoji=False)


def report(message: str) -> None:
    """Print a message to stderr, without wrapping or markup; in a log of JSON as one object."""
    if LogFormat.is_json:
        print_log_line("info", message)
        return
    stderr_console.print(message, soft_wrap=True, markup=False)


def draw_bar(share: float, width: int, empty: str = "") -> str:
    """A bar for a share of 0 to 1."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return "█" * filled + empty * (width - filled)


def join_fitting(parts: Sequence[str], width: int, separator: str = ", ") -> str:
    """As many of the parts as there is room for, joined."""
    text = ""
    for part in parts:
        longer = f"{text}{separator}{part}" if text else part
        if cell_len(longer) > width:
            break
        text = longer
    return text


def print_error(message: str) -> None:
    """Print an error to stderr, on one line."""
    if LogFormat.is_json:
        print_log_line("error", message)
        return
    stderr_console.print("error:", style="bold red", end=" ")
    report(message)


def print_log_line(level: str, message: str) -> None:
    """Print a line as `JsonFormatter` writes it."""
    record = {"time": format_time(time.time()), "level": level, "source": "cenacle"}
    print(json.dumps({**record, "message": message}), file=sys.stderr, flush=True)


def report_interrupt() -> None:
    """Report that Ctrl-C has ended the program."""
    if not IS_SUPERVISED:
        if stderr_console.is_terminal:
            stderr_console.print()  # the terminal has written ^C
        report("interrupted")


def discard_output() -> int:
    """Discard what has not reached stdout, so that the end of the program does not try it again.

    Returns:
        The exit status of a program whose reader has gone.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def read_stdin(option: str) -> str:
    """All of standard input, without the newline at its end.

    Raises:
        InputError: it is not text; names the option.
    """
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--{option}: expected UTF-8 text on standard input, got {error}", option
        ) from error


def print_json(value: Any) -> None:
    """Print a value to stdout as one line of JSON."""
    print(json.dumps(value))


def wide_console(fallback_width: int = FALLBACK_WIDTH) -> Console:
    """A console on stdout: as wide as the terminal, or `fallback_width` columns in a pipe."""
    return PipeConsole(width=None if sys.stdout.isatty() else fallback_width, highlight=False)


def given_width(default: int = FALLBACK_WIDTH) -> int:
    """Columns that `COLUMNS` gives a table in a pipe, or `default`.

    Only for tables that fold: GNU readline sets it to 80 for all that its program starts.
    """
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else default


def write_text(path: Path, text: str, option: str) -> None:
    """Write a file that the user named with `--option`, and create its folder.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InputError(f"--{option}: cannot write {path}: {error}", option) from error


@contextmanager
def loading_progress() -> Iterator[Callable[[int, int, int], None]]:
    """Show a progress bar for each rank while weights are loaded.

    Yields:
        The progress callback of `api.load`: rank, bytes loaded, total bytes.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

    columns = (TextColumn("rank {task.fields[rank]}"), BarColumn(), DownloadColumn())
    hidden = not stderr_console.is_terminal or LogFormat.is_json
    with Progress(*columns, console=stderr_console, transient=True, disable=hidden) as bars:
        tasks: dict[int, TaskID] = {}

        def show(rank: int, loaded_bytes: int, total_bytes: int) -> None:
            if rank not in tasks:
                tasks[rank] = bars.add_task("", total=total_bytes, rank=rank)
            bars.update(tasks[rank], completed=loaded_bytes)

        yield show
