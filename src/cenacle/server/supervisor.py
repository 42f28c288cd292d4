"""Watches over the process that serves, and starts it again when it dies or hangs.

Owns: both ends: `supervise`, in the process that the user started, and `SupervisedProcess`, in the
one that loads the model and answers.
Does not know: HTTP, models, ranks.
Invariant: the listening socket stays open while one process follows another, so that clients which
connect meanwhile wait; no process of a server that died is left when the next one starts; when the
supervisor dies, the server ends. Wrong options, a model that cannot be loaded and a wish to end
are not faults: the exit status is the server's own.
Next: `cli/inference.py` opens servers, `app.py` shows the restarts in /health.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

import psutil

from ..ranks.exit_reason import describe_exit, oom_kill_count

ENVIRONMENT = "CENACLE_SUPERVISED"
ALIVE = b"a"
ALIVE_S = 2.0  # between two signs of life
HANG_S = 120.0  # without one after which a server is ended; a busy machine is late by seconds
FIRST_DELAY_S = 0.5  # before a restart; doubles with every failure in a row
MAX_FAILURES = 8  # in a row: with the delays between them about a minute
STABLE_S = 300.0  # a server that answered so long did not fail in a row with the last
RANKS_END_S = 3.0  # ranks notice within half a second that their server is gone
KILL_S = 20.0  # the system may need this long to release a killed rank's memory
STOPPED = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit statuses of a wish
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl()


@dataclass(frozen=True)
class Restarts:
    """How often the server was started again, and how the process before this one ended."""

    count: int = 0
    reason: str = ""


class SupervisedProcess:
    """What the supervisor has given to this process.

    Args:
        sock: the listening socket.
        control: to the supervisor; it closes when the supervisor ends.
        restarts: before this process.
    """

    def __init__(self, sock: socket.socket, control: socket.socket, restarts: Restarts) -> None:
        self.sock, self.restarts, self._control = sock, restarts, control
        threading.Thread(target=self._watch, daemon=True, name="supervisor").start()

    @classmethod
    def from_environment(cls) -> SupervisedProcess | None:
        """This process's, or None if it was not started by a supervisor."""
        text = os.environ.pop(ENVIRONMENT, None)
        if text is None:
            return None
        fields = json.loads(text)
        sockets = [socket.socket(fileno=fields[name]) for name in ("socket", "control")]
        for sock in sockets:
            sock.set_inheritable(False)  # a rank that holds them would keep them open
        return cls(sockets[0], sockets[1], Restarts(fields["count"], fields["reason"]))

    def report_ready(self) -> None:
        """The server answers: from now on it is started again when it dies, or when the running
        event loop makes no progress."""
        with suppress(OSError):
            self._control.send(ALIVE, socket.MSG_DONTWAIT)
        asyncio.get_running_loop().call_later(ALIVE_S, self.report_ready)

    def _watch(self) -> None:
        with suppress(OSError):
            self._control.recv(1)
        os.kill(os.getpid(), signal.SIGTERM)


def supervise(
    sock: socket.socket,
    report: Callable[[str], None],
    command: Sequence[str] | None = None,
    first_delay_s: float = FIRST_DELAY_S,
    hang_s: float = HANG_S,
) -> int:
    """Run the server in a process of its own, and again when it dies or hangs. Closes the socket.

    Args:
        sock: listening.
        report: told in a sentence what happens.
        command: of the server; None: of this process.
        first_delay_s: before a restart; doubles with every failure in a row.
        hang_s: without a sign of life, after the first, after which the server is ended.

    Returns:
        The exit status for this process.
    """
    with closing(sock):
        if command is None:
            command = [sys.executable, *sys.orig_argv[1:]]
        return _Supervisor(sock, report, command, first_delay_s, hang_s).run()


class _Supervisor:
    def __init__(
        self,
        sock: socket.socket,
        report: Callable[[str], None],
        command: Sequence[str],
        first_delay_s: float,
        hang_s: float,
    ) -> None:
        self._sock, self._report = sock, report
        self._command, self._first_delay_s, self._hang_s = command, first_delay_s, hang_s
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_signal = 0
        self._stopped = threading.Event()

    def run(self) -> int:
        _adopt_orphans()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_stop)
        restarts, has_served, failures = Restarts(), False, 0
        while True:
            oom_kills = oom_kill_count()
            status, served_s = self._run_process(restarts)
            has_served |= served_s is not None
            exit_status = status if status >= 0 else 128 - status
            if self._stop_signal == signal.SIGINT:
                return 128 + signal.SIGINT  # though the server ended in good order
            if self._stop_signal or status in STOPPED or (status >= 0 and not has_served):
                return exit_status
            reason = describe_exit(status, oom_kills, uses_mlx=False)
            if not has_served:
                self._report(f"error: the server {reason} before it answered")
                return exit_status
            failures = 1 if (served_s or 0.0) >= STABLE_S else failures + 1
            if failures >= MAX_FAILURES:
                self._report(
                    f"error: the server ended {failures} times in a row, the last time it "
                    f"{reason}; giving up. Fix the cause above, then start the server again"
                )
                return exit_status
            restarts = Restarts(restarts.count + 1, reason)
            _end_children()
            delay_s = self._first_delay_s * 2 ** (failures - 1)
            self._report(
                f"the server {reason}; starting it again in {delay_s:g} s (restart "
                f"{restarts.count})"
            )
            if self._stopped.wait(delay_s):
                return 128 + self._stop_signal

    def _run_process(self, restarts: Restarts) -> tuple[int, float | None]:
        """Its status, and for how long it has answered requests; None: never."""
        control, inherited = socket.socketpair()
        with control:
            with inherited:
                descriptors = self._sock.fileno(), inherited.fileno()
                fields = {
                    "socket": descriptors[0],
                    "control": descriptors[1],
                    "count": restarts.count,
                    "reason": restarts.reason,
                }
                # A session of its own: Ctrl-C in the terminal comes from here, once.
                self._process = process = subprocess.Popen(
                    self._command,
                    env={**os.environ, ENVIRONMENT: json.dumps(fields)},
                    pass_fds=descriptors,
                    start_new_session=True,
                )
            if self._stop_signal:
                process.send_signal(self._stop_signal)
            if control.recv(1) != ALIVE:
                return process.wait(), None
            ready_s = time.monotonic()
            control.settimeout(self._hang_s)
            try:
                while control.recv(4096):
                    pass
                process.wait(self._hang_s)
            except (TimeoutError, subprocess.TimeoutExpired):
                self._report(f"the server did not respond for {self._hang_s:g} s; ending it")
                process.kill()
            return process.wait(), time.monotonic() - ready_s

    def _on_stop(self, number: int, _frame: object) -> None:
        self._stop_signal = number
        self._stopped.set()
        if self._process is not None:
            self._process.send_signal(number)


def _adopt_orphans() -> None:
    """Have processes whose parent dies become this one's children (Linux), so that it can wait
    until they have ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_children() -> None:
    """Wait until the ranks of a server that died have ended, and end those that do not."""
    children = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(children, RANKS_END_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, KILL_S)
