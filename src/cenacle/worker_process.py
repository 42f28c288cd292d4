"""A process for work that may never end or end its process, since it comes from strangers.

Owns: the process, its start and restart; messages to it and back; limits of its work.
Does not know: what it does.
Invariant: work that fails, ends the process or goes beyond a limit costs one `WorkerFailed`; the
next work has a new process.
Next: `engine/sampling/grammar_process.py`, `text/text_process.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil

# A process with so much more than after its first answer is replaced: what it has freed may stay.
MAX_KEPT_BYTES = 1 << 30
END_TIMEOUT_S = 10  # of a process that has closed its output
DEADLINE_S = 600  # of an answer, on a busy machine; the worker limits its processor time


class WorkerFailed(Exception):
    """The process ended, or did not answer."""


class WorkerKilled(WorkerFailed):
    """Another program killed the process; limits of its work end it in other ways."""


def work_again_if_killed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do work, and once more if its process was killed: by a person, or for lack of memory.

    Raises:
        WorkerFailed: as `WorkerProcess.ask`.
    """
    try:
        return work()
    except WorkerKilled:
        return work()


class WorkerProcess:
    """Runs a module, which calls `serve`. Not for several threads.

    It is started by `start` or on the first use.

    Args:
        module: its full name.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._first_resident_bytes = 0  # after the first answer of the process

    @property
    def has_answered(self) -> bool:
        """Whether the process that runs now has answered anything; False if none runs."""
        running = self._process is not None and self._process.poll() is None
        return running and self._first_resident_bytes > 0

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            WorkerKilled: there is none, because another program killed the process.
            WorkerFailed: there is none.
        """
        try:
            process = self.start()
            assert process.stdin is not None
            assert process.stdout is not None
            ends = time.monotonic() + DEADLINE_S
            _write(process.stdin, _frame(message), ends)
            (size,) = struct.unpack("<I", _read(process.stdout, 4, ends))
            answer: dict[str, Any] = json.loads(_read(process.stdout, size, ends))
        except (OSError, EOFError, ValueError) as error:
            kind = WorkerKilled if self._was_killed(error) else WorkerFailed
            self.close()
            raise kind(f"{self._module}: {error!r}") from error
        resident_bytes = _resident_bytes(process)
        self._first_resident_bytes = self._first_resident_bytes or resident_bytes or 1
        if resident_bytes > self._first_resident_bytes + MAX_KEPT_BYTES:
            self.close()
        return answer

    def _was_killed(self, error: Exception) -> bool:
        if self._process is None or not isinstance(error, EOFError | BrokenPipeError):
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_TIMEOUT_S) in (-signal.SIGKILL, -signal.SIGTERM)
        return False

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._process, self._first_resident_bytes = None, 0

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process unless it runs; it prepares itself meanwhile.

        Raises:
            OSError: the system has no room for it.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            # Not for Ctrl-C: it ends when its input does.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
        return self._process


def _resident_bytes(process: subprocess.Popen[bytes]) -> int:
    try:
        return int(psutil.Process(process.pid).memory_info().rss)
    except psutil.Error:
        return 0


def _write(stream: IO[bytes], data: bytes, ends: float) -> None:
    """All of `data`, to a stream that does not block.

    Raises:
        TimeoutError: they were not taken in time.
    """
    left = memoryview(data)
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    while left:
        if not poll.poll(max(0.0, 1000 * (ends - time.monotonic()))):
            raise TimeoutError("it does not read")
        left = left[stream.write(left) or 0 :]


def _read(stream: IO[bytes], size: int, ends: float) -> bytes:
    """Exactly `size` bytes.

    Raises:
        EOFError: the process has ended.
        TimeoutError: they did not come in time.
    """
    pieces = []
    poll = select.poll()  # unlike select(), for any number of open files
    poll.register(stream, select.POLLIN)
    while size > 0:
        if not poll.poll(max(0.0, 1000 * (ends - time.monotonic()))):
            raise TimeoutError("no answer")
        piece = stream.read(size)
        if not piece:
            raise EOFError("it has ended")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


# In the process


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer messages until the input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(4)) == 4:
        (size,) = struct.unpack("<I", head)
        sink.write(_frame(answer(json.loads(source.read(size)))))
        sink.flush()


def _frame(message: Any) -> bytes:
    """Four bytes of length, then JSON."""
    data = json.dumps(message).encode()
    return struct.pack("<I", len(data)) + data


def limit_work(cpu_s: float, memory_bytes: int) -> None:
    """This process ends when it uses more from now on. Linux keeps both limits, macOS the first."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may end for every request of a stranger
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + cpu_s) + 1, resource.RLIM_INFINITY))
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes, resource.RLIM_INFINITY))


def lift_limits() -> None:
    """Undo `limit_work`."""
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
        resource.setrlimit(limit, (resource.RLIM_INFINITY,) * 2)
