"""Ends Python code that runs too long, such as a chat template from a stranger.

Owns: `time_limit`.
Does not know: what runs.
Invariant: after the `with` block nothing is raised any more. A single call into C is ended only
when it returns.
Next: `tokenizer.py` renders templates under it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class LimitReached(BaseException):
    """The code was ended, or needed too much memory. Not an `Exception`, which it may catch."""


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise `LimitReached` in this thread if the block takes longer; for Python code, also in
    threads other than the main one, where signals cannot be used. Limits do not nest."""
    thread = ctypes.c_ulong(threading.get_ident())
    lock, is_over, is_sent = threading.Lock(), False, False

    def end() -> None:
        nonlocal is_sent
        with lock:
            if not is_over:
                is_sent = True
                _send(thread)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
        timer.cancel()
        if is_sent:
            _receive(thread)


def _send(thread: ctypes.c_ulong) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(LimitReached))


def _receive(thread: ctypes.c_ulong) -> None:
    """Have what was sent to this thread, and perhaps not raised yet, raised here.

    Sending nothing in its place would leave CPython's mark that there is something: every call
    would look for it from then on, and with a trace function CPython 3.11 would look for ever.
    """
    with suppress(LimitReached):
        _send(thread)
        while True:  # until it is raised, at the next step
            pass
