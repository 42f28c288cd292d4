"""The program, as `cenacle` and as `python -m cenacle`.

Owns: what must be so before anything else is imported: Ctrl-C ends the program with one line, and
the three standard streams exist.
Invariant: imports nothing that takes time before Ctrl-C is handled.
Next: `cli/main.py`.
"""

import atexit
import os
import signal
import sys

SUPERVISED = "CENACLE_SUPERVISED"  # of the environment of a server's process: see `supervisor.py`


def open_missing_streams() -> None:
    """Open what the program was started without (`>&-`), so that no file or connection takes its
    number and receives what is printed."""
    for number, mode in enumerate(("r", "w", "w")):
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115


def end_at_once(number: int, _frame: object) -> None:
    """End the program by Ctrl-C while nothing has to be put in order."""
    if SUPERVISED not in os.environ:
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def main() -> None:
    """Run the command line."""
    open_missing_streams()
    # Where it is ignored (`nohup`, a shell's `&`), it stays so.
    heeds_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeds_ctrl_c:
        # The first to be registered runs last: Python then takes its handlers back, and Ctrl-C
        # would end a program that has done its work by the signal.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGINT, end_at_once)
    from .cli.main import main as run

    try:
        if heeds_ctrl_c:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # as the command began or had ended
        end_at_once(signal.SIGINT, None)
    finally:
        # Whatever still runs at the end of the interpreter may be cut.
        if heeds_ctrl_c:
            signal.signal(signal.SIGINT, end_at_once)


if __name__ == "__main__":
    main()
