"""Why a process ended, in words that say what to do about it.

Owns: words for exit statuses and for the several forms of running out of memory.
Does not know: ranks, or who watches them.
Invariant: nothing uncertain is stated as certain.
Next: `local_ranks.py` and `cluster/agent.py` ask when a rank has ended, `worker.py` before it ends.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

VMSTAT = Path("/proc/vmstat")
OUT_OF_MEMORY = "ran out of memory"

# MLX's allocators on CPU, CUDA and Metal raise RuntimeError; C++'s own becomes MemoryError.
_ALLOCATION_FAILURE = re.compile(
    r"unable to allocate|cannot allocate|failed to allocate|attempting to allocate|out of memory"
    r"|insufficient memory|bad_alloc",
    re.IGNORECASE,
)


def oom_kill_count() -> int | None:
    """How many processes the kernel has killed for lack of memory since boot; None: unknown (not
    Linux)."""
    try:
        match = re.search(r"^oom_kill (\d+)$", VMSTAT.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) if match else None


def describe_exit(
    status: int, oom_kills_before: int | None = None, *, uses_mlx: bool = True
) -> str:
    """How a process ended, to follow its name.

    Args:
        status: its exit status; negative: the signal that ended it.
        oom_kills_before: `oom_kill_count` when it started.
        uses_mlx: whether MLX may have ended it.
    """
    if status >= 0:
        return f"exited {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    reason, oom_kills = f"was killed by {name}", oom_kill_count()
    is_counted = None not in (oom_kills_before, oom_kills) and oom_kills != oom_kills_before
    if -status == signal.SIGKILL and is_counted:
        # Which process it was is in the kernel's log only, which not every user may read.
        reason += (
            f", most likely by the kernel because this machine {OUT_OF_MEMORY} (/proc/vmstat "
            "counts such a kill since the process started)"
        )
    if -status == signal.SIGSEGV and uses_mlx:
        reason += ", as MLX is on a CPU when the system refuses it memory"
    return reason


def describe_error(error: BaseException) -> str:
    """An unexpected error in words; lack of memory is named first."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, MemoryError) or _ALLOCATION_FAILURE.search(str(error)):
        return f"{OUT_OF_MEMORY} ({text})"
    return text
