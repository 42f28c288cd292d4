"""Runs the program in this process: starting one takes a second or two of a processor.

For commands that check, list and plan. What serves, and what ends by signals, is a process of its
own in its tests.
"""

import contextlib
import gc
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cenacle.cli import main as program


def run_here(*arguments: object, home: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """`cenacle ARGUMENTS`, as `subprocess.run` gives it with its output captured.

    Args:
        home: CENACLE_HOME; None: as it is.
    """
    words = [str(argument) for argument in arguments]
    outputs = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    handler, thresholds = signal.getsignal(signal.SIGTERM), gc.get_threshold()
    status: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cenacle", *words])
        patch.setattr(program, "use_private_temp_dir", lambda: None)  # it is for the process
        if home is not None:
            patch.setenv("CENACLE_HOME", str(home))
        with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
            try:
                program.main()
            except SystemExit as end:
                status = end.code or 0
            finally:
                signal.signal(signal.SIGTERM, handler)
                gc.set_threshold(*thresholds)
    out, err = (output.buffer.getvalue().decode() for output in outputs)
    assert isinstance(status, int), status
    return subprocess.CompletedProcess(words, status, out, err)
