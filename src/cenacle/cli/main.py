"""The program `cenacle`: all commands, and how errors become one line and an exit status.

Owns: the root of the command line, `--version`, the form of errors.
Does not know: what the commands do.
Invariant: an error is one line on stderr that begins with "error:"; wrong usage exits with status
2, other failures with the status of their class in `errors`. Ctrl-C is one line and status 130; a
reader that goes away ends the program without a word, with the status that SIGPIPE has.
Next: `inference.py` has `generate`, `chat` and `serve`.
"""

from __future__ import annotations

import errno
import gc
import io
import re
import signal
import sys
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer

from ..errors import CenacleError
from ..paths import use_private_temp_dir
from .console import discard_output, print_error, report_interrupt
from .help import Group

# The commands of each module, in the order of the help; a name of its own: a group of commands.
COMMANDS: dict[str, tuple[str, ...]] = {
    "inference": ("generate", "chat", "serve"),
    "top": ("top",),
    "models": ("inspect", "families", "synth", "demo"),
    "cluster": ("up", "join", "nodes", "status", "leave", "down"),
    "plan": ("plan", "calibrate", "validate", "record-routing"),
    "doctor": ("doctor",),
    "bench": ("bench",),
    "keys": ("keys",),
}
GROUPS = {"bench": "Planning and measurement", "keys": "Run a model"}  # and their panels

# Many short-lived cycles are collected less often: importing makes hundreds of thousands of objects
# that stay, and looking through them was a tenth of a start's time.
COLLECTOR_THRESHOLDS = (50_000, 20, 50)

# Messages of typer's own checks, by the kind of the error.
EXPECTED = {
    "int_parsing": "an integer",
    "float_parsing": "a number",
    "bool_parsing": "true or false",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
}


def print_version(value: bool) -> None:
    """Print the version and exit, if the option was given."""
    if value:
        from importlib import metadata

        print(f"cenacle {metadata.version('cenacle')}")
        raise typer.Exit


def set_global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """See `make_app`; this function only declares the global options."""


@cache
def make_app(command: str = "") -> typer.Typer:
    """The program.

    Args:
        command: one that is enough; its module alone is imported. None of these: all commands.
    """
    app = typer.Typer(
        name="cenacle",
        cls=Group,
        help="Serve Mixture-of-Experts models from one or several machines.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="`cenacle COMMAND --help` shows the options of a command and an example.",
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback()(set_global_options)
    found = [module for module, names in COMMANDS.items() if command in names]
    for module in found or COMMANDS:
        group = import_module(f"{__package__}.{module}").app
        name = module if module in GROUPS else None
        app.add_typer(group, name=name, rich_help_panel=GROUPS.get(module))
    return app


def main() -> None:
    """Run the command line; errors become one line and an exit status."""
    # Ending by SIGTERM must run the same `finally` blocks as Ctrl-C: they end the ranks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for stream in (sys.stdout, sys.stderr):
        # Characters that the terminal's encoding lacks are written as escapes, not refused.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    use_private_temp_dir()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    try:
        status = make_app(sys.argv[1] if len(sys.argv) > 1 else "")(
            prog_name="cenacle", standalone_mode=False
        )
        sys.stdout.flush()  # an error of it is told like any other
    except typer.TyperException as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # the help is printed already
            print_error(describe_usage_error(error))
        sys.exit(error.exit_code)
    except CenacleError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer has caught it
            sys.exit(discard_output())
        raise
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        sys.exit(discard_output())
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            discard_output()
            print_error(f"the output cannot be written: {error.strerror}")
            sys.exit(1)
        if error.filename is None:
            raise
        hint = "; give this user access to it" if isinstance(error, PermissionError) else ""
        print_error(f"{error.filename}: {error.strerror}{hint}")
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        status = 128 + signal.SIGINT
    if status == 128 + signal.SIGINT:
        report_interrupt()
    sys.exit(status)


def describe_usage_error(error: Any) -> str:
    """An error of typer in the form that `errors` uses: what, expected, got, what to do."""
    param, context = getattr(error, "param", None), getattr(error, "ctx", None)
    hint = f"; see `{context.command_path} --help`" if context is not None else ""
    if param is None:
        if (
            missing := re.fullmatch(r"Option '(.*)' requires an argument\.", error.message)
        ) is not None:
            return f"{missing[1]}: expected a value, got none{hint}"
        message = error.message.removeprefix("Got ").rstrip(".").replace(". Did", "; did")
        if similar := getattr(error, "possibilities", None):
            message += f"; did you mean {get_close_matches(error.option_name, similar, 1, 0)[0]}?"
        return message[0].lower() + message[1:] + hint * (not message.endswith("?"))
    name = max(param.opts, key=len) if param.param_type_name == "option" else param.name.upper()
    if type(error).__name__ == "MissingParameter":
        return f"{name}: expected a value, got none{hint}"
    return f"{name}: {_describe_bad_value(error)}{hint}"


def _describe_bad_value(error: Any) -> str:
    message = str(error.message).removeprefix("Value error, ")
    if (choice := re.fullmatch(r"(.*) is not one of (.*)\.", message)) is not None:
        choices = choice[2].replace("'", "")
        return f"expected {'one of ' * (',' in choices)}{choices}, got {choice[1]}"
    if (access := re.fullmatch(r"path '(.*)' is not (readable|writable)\.", message)) is not None:
        verb = {"readable": "read", "writable": "written"}[access[2]]
        return f"{access[1]} cannot be {verb}; give this user access to it"
    # typer checks values with pydantic, and the cause has the details.
    details = error.__cause__.errors()[0] if error.__cause__ is not None else {}
    expected = EXPECTED.get(details.get("type", ""))
    if expected is None:
        return message
    return f"expected {expected.format(**details.get('ctx', {}))}, got {details['input']!r}"


if __name__ == "__main__":
    main()
