"""What can go wrong, as one tree.

    CenacleError                 caught by the commands: printed as one line, exit code below
    ├── InputError       (2)     a wrong argument or request, for the caller to correct (HTTP 400)
    ├── CheckpointError  (3)     the model's files are missing, damaged or not supported
    ├── PlanError        (4)     the model cannot be placed as requested; use other nodes
    ├── Busy             (6)     the queue is full: try again later (HTTP 429)
    └── ClusterError     (5)     a rank failed, fell silent or could not be started (HTTP 503)
        ├── NodesMissing (5)     not enough nodes of the cluster are connected; they may still come
        └── RankLost     (5)     names the rank; the whole group has been ended

Every message says what, expected, got, and what to do next. Nothing here knows who raises it.
"""

from __future__ import annotations

import re

MAX_MESSAGE_CHARACTERS = 2000


def printable(text: str) -> str:
    """Text from outside on one line for terminals and logs: control characters are escaped."""
    line = " ".join(text[: 2 * MAX_MESSAGE_CHARACTERS].split())
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(escaped) <= MAX_MESSAGE_CHARACTERS:
        return escaped
    return f"{escaped[: MAX_MESSAGE_CHARACTERS - 3]}..."


# How Python writes an error of the system, with its number and, again, the path.
_SYSTEM_ERROR = re.compile(r"\[Errno -?\d+\] ([^:']*)(?:: '[^']*')?")


class CenacleError(Exception):
    """Base of every error that a user may see.

    Messages are one printable line: names of tensors, files and nodes in them come from outside.
    Errors of the system in them lose their numbers.
    `exit_code` is the exit status of the command; `node_id` the node of a cluster that failed, if
    one did.
    """

    exit_code = 1
    node_id: str | None = None

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(_SYSTEM_ERROR.sub(r"\1", str(message))))


class InputError(CenacleError):
    """A wrong argument or request.

    Args:
        message: what was expected, what was received, what to do.
        field: name of the wrong field or option, if there is one.
    """

    exit_code = 2

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(CenacleError):
    """The model's files are missing, truncated, corrupted, or of a kind that is not supported."""

    exit_code = 3


class PlanError(CenacleError):
    """The model cannot be placed as requested."""

    exit_code = 4


class Busy(CenacleError):
    """The queue is full.

    Args:
        message: how full.
        retry_after_s: whole seconds after which a place is likely to be free.
    """

    exit_code = 6

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClusterError(CenacleError):
    """The group of ranks could not start or has failed."""

    exit_code = 5


class NodesMissing(ClusterError):
    """Not enough nodes of the cluster are connected; they may still come."""


class RankLost(ClusterError):
    """One rank died or fell silent; the others have been ended.

    Args:
        rank: which one.
        message: how it was noticed.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def error_to_json(error: CenacleError) -> dict[str, object]:
    """An error as it is sent to another process: kind, message, and what else it names."""
    kind = next(c.__name__ for c in type(error).__mro__ if c.__name__ in _KINDS)
    names = ("field", "rank", "retry_after_s", "node_id")
    details = {name: getattr(error, name, None) for name in names}
    details = {name: value for name, value in details.items() if value is not None}
    return {"kind": kind, "message": str(error), **details}


def error_from_json(data: object, prefix: str = "") -> CenacleError:
    """The error that `error_to_json` described; a `ClusterError` if that cannot be told.

    Args:
        prefix: put in front of the message, such as the name of the node that sent it.
    """
    data = data if isinstance(data, dict) else {"message": data}
    message = f"{prefix}{data.get('message')}"
    field, rank, retry_after_s = (data.get(name) for name in ("field", "rank", "retry_after_s"))
    error: CenacleError
    match data.get("kind"):
        case "InputError":
            error = InputError(message, field if isinstance(field, str) else None)
        case "Busy" if isinstance(retry_after_s, int):
            error = Busy(message, retry_after_s)
        case "RankLost" if isinstance(rank, int):
            error = RankLost(rank, message)
        case "CheckpointError" | "PlanError" as kind:
            error = _KINDS[kind](message)
        case _:
            error = ClusterError(message)
    if isinstance(node_id := data.get("node_id"), str):
        error.node_id = node_id
    return error


_KINDS: dict[str, type[CenacleError]] = {
    kind.__name__: kind
    for kind in (
        *(CenacleError, InputError, CheckpointError, PlanError),
        *(Busy, ClusterError, RankLost),
    )
}
