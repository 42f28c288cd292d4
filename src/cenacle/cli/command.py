"""Registers functions as commands, with options that are declared once and shared.

Owns: the declaration of options as fields of a dataclass, and their expansion; the names of options
in errors about fields.
Does not know: which commands and options there are.
Invariant: a parameter whose type is a dataclass becomes one option per field. Options have the
defaults of the fields, or the values of the parameter's own default, if it has one.
Next: `options.py` has the shared dataclasses.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.markup import escape

from ..errors import CenacleError
from .help import Command


def option(
    default: Any, help_text: str, *names: str, panel: str | None = None, **settings: Any
) -> Any:
    """A field of a dataclass that is an option of a command.

    Args:
        default: its value if it is not given.
        help_text: one sentence.
        names: such as "--model", "-m"; none: the name of the field.
        panel: heading under which the help lists it.
        settings: further arguments of `typer.Option`.
    """
    settings |= {"help": help_text, "rich_help_panel": panel}
    return field(default=default, metadata={"names": names, "settings": settings})


def command(
    app: typer.Typer, *, example: str, name: str | None = None, panel: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`.

    Args:
        app: where to register it.
        example: a command line, shown after the options.
        name: of the command; None: the function's.
        panel: heading under which the help of `app` lists the command.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        epilog = format_example(example)
        register = app.command(name, cls=Command, epilog=epilog, rich_help_panel=panel)
        register(expand_dataclasses(function))
        return function

    return add


def format_example(example: str) -> str:
    """The epilog of a command's help."""
    return f"Example: [bold]{escape(example)}[/]"


def expand_dataclasses(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a function so that its dataclass parameters are separate keyword parameters."""
    annotations = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}  # parameter name -> dataclass
    for parameter in inspect.signature(function).parameters.values():
        annotation = annotations[parameter.name]
        if is_dataclass(annotation):
            groups[parameter.name] = annotation
            parameters += _field_parameters(annotation, parameter.default)
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=annotation, kind=kind))

    @functools.wraps(function)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        try:
            function(**values)
        except CenacleError as error:
            error.args = (_name_option(str(error), parameters),)
            raise

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def _field_parameters(group: Any, instance: Any) -> list[inspect.Parameter]:
    """A keyword parameter for each field; defaults are those of `instance`, if it has any."""
    parameters, types = [], get_type_hints(group)
    for item in fields(group):
        value_type, settings = types[item.name], item.metadata["settings"]
        parameters.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(instance, item.name, item.default),
                annotation=Annotated[value_type, typer.Option(*item.metadata["names"], **settings)],
            )
        )
    return parameters


def _name_option(message: str, parameters: list[inspect.Parameter]) -> str:
    """An error as users of the command line see it: "group_size: ..." is "--group-size: ..."."""
    match = re.match(r"(rank \d+: )?([a-z][a-z_-]*):", message)
    if match is None:
        return message
    for parameter in parameters:
        if _plain_name(parameter.name) == _plain_name(match[2]):
            option = _option_name(parameter)
            return (match[1] or "") + option + message[match.end(2) :]
    return message


def _plain_name(name: str) -> str:
    """The name without its unit: `node_memory_gb` is `node_memory_bytes` of `LoadOptions`."""
    return re.sub("_(gb|bytes|ms|s)$", "", name.replace("-", "_"))


def _option_name(parameter: inspect.Parameter) -> str:
    for info in get_args(parameter.annotation):
        if isinstance(info, typer.models.ArgumentInfo):
            return parameter.name.upper()
        if isinstance(info, typer.models.OptionInfo):
            names = [name for name in info.param_decls or () if name.startswith("--")]
            if names:
                return names[0]
    return f"--{parameter.name.replace('_', '-')}"
