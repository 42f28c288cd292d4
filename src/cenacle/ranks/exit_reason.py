"""How a process ended, in words that say what to do something about.

Owns: words for exit statuses, and for lack of memory in its several forms.
Does not know: ranks, who watches them.
Invariant: what is not certain is not said to be.
Next: `launcher.py` and `agent.py` ask when a rank has ended, `engine/worker.py` before it does.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

VMSTAT = Path("/proc/vmstat")
OUT_OF_MEMORY = "ran out of memory"

# MLX's allocators on CPU, CUDA and Metal raise RuntimeError; C++'s own becomes MemoryError.
_OUT_OF_MEMORY_ERROR = re.compile(
    r"unable to allocate|cannot allocate|failed to allocate|attempting to allocate|out of memory"
    r"|insufficient memory|bad_alloc",
    re.IGNORECASE,
)


def oom_kill_count() -> int | None:
    """How many processes the kernel has ended for lack of memory since it started; None: it does
    not say (other systems than Linux)."""
    try:
        found = re.search(r"^oom_kill (\d+)$", VMSTAT.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None


def describe_exit(status: int, kills_before: int | None = None) -> str:
    """How a process ended, to follow its name.

    Args:
        status: its exit status; negative: the signal that ended it.
        kills_before: `kernel_kills` when it began.
    """
    if status >= 0:
        return f"exited {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    said, now = f"was killed by {name}", oom_kill_count()
    if -status == signal.SIGKILL and None not in (kills_before, now) and now != kills_before:
        # Which process that was the kernel tells its log only, which not everybody may read.
        said += (
            f", most likely by the kernel because this machine {OUT_OF_MEMORY} (/proc/vmstat "
            "counts a process ended so since this one began)"
        )
    if -status == signal.SIGSEGV:
        said += ", as MLX is on a CPU when the system refuses it memory"
    return said


def describe_error(error: BaseException) -> str:
    """What an error that nobody expected means; where memory is short that comes first."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY_ERROR.search(str(error)):
        return f"{OUT_OF_MEMORY} ({what})"
    return what
