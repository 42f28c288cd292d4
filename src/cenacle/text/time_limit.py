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
from contextlib import contextmanager


class LimitReached(BaseException):
    """The code was ended, or needed too much memory. Not an `Exception`, which it may catch."""


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise `LimitReached` in this thread if the block takes longer; for Python code, also in
    threads other than the main one, where signals cannot be used. Limits do not nest."""
    thread = ctypes.c_ulong(threading.get_ident())
    lock, is_over = threading.Lock(), False

    def end() -> None:
        with lock:
            if not is_over:
                error = ctypes.py_object(LimitReached)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
        timer.cancel()
