"""Registers functions as commands, with options that are declared once and shared.

Owns: the expansion of dataclass parameters into options.
Does not know: which commands and options there are.
Invariant: a parameter whose type is a dataclass becomes one option per field; a field is annotated
like a typer parameter. Options have the defaults of the fields, or the values of the parameter's
own default, if it has one.
Next: `options.py` has the shared dataclasses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import typer
from rich.markup import escape


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

    def register(function: Callable[..., None]) -> Callable[..., None]:
        epilog = format_example(example)
        app.command(name, epilog=epilog, rich_help_panel=panel)(expand_dataclasses(function))
        return function

    return register


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
        if not is_dataclass(annotation):
            keyword = parameter.replace(annotation=annotation, kind=parameter.KEYWORD_ONLY)
            parameters.append(keyword)
            continue
        groups[parameter.name] = annotation
        field_annotations = get_type_hints(annotation, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(parameter.default, field.name, field.default),
                annotation=field_annotations[field.name],
            )
            for field in fields(annotation)
        ]

    @functools.wraps(function)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        function(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call
