"""The form of `--help`: panels where there is room, else a list that a narrow terminal can show.

Owns: the classes of commands and groups; the names of values, such as PATH.
Does not know: which commands and options there are.
Invariant: every name of a command or an option is shown whole in `MIN_WIDTH` columns; flags have no
value's name. Help texts are shown as they are, without markup.
"""

from __future__ import annotations

import re
import textwrap
from shutil import get_terminal_size
from typing import Any

from rich.markup import escape
from rich.text import Text
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

PANELS_WIDTH = 80  # columns; in fewer, panels leave their texts a few words on a line
MIN_WIDTH = 24
INDENT = "    "
PLACEHOLDERS = {"str": "TEXT", "path": "PATH", "int": "N", "float": "X"}  # by type


class Command(TyperCommand):
    """A command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        if not _print_narrow_help(self, ctx):
            super().format_help(ctx, formatter)


class Group(TyperGroup):
    """A group of commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        if not _print_narrow_help(self, ctx):
            super().format_help(ctx, formatter)


def narrow_help(command: Command | Group, ctx: Any, width: int) -> str:
    """The help in few columns: each name on a line of its own, its text indented below.

    Args:
        command: with its values named.
        width: columns.
    """
    width = max(MIN_WIDTH, width)
    lines = [*textwrap.wrap(command.get_usage(ctx), width, subsequent_indent=INDENT), ""]
    for paragraph in (command.help or "").split("\n\n"):
        lines += [*textwrap.wrap(paragraph, width), ""]
    sections: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if (record := param.get_help_record(ctx)) is not None:
            is_option = isinstance(param, TyperOption)
            panel = getattr(param, "rich_help_panel", None)
            title = panel or ("Options" if is_option else "Arguments")
            name = record[0] if is_option else str(param.metavar)
            sections.setdefault(title, []).append((name, record[1]))
    if isinstance(command, Group):
        for name, child in command.commands.items():
            text = child.short_help or child.help or ""
            title = getattr(child, "rich_help_panel", None) or "Commands"
            sections.setdefault(title, []).append((name, text.split("\n\n")[0]))
    for title, records in sections.items():
        lines += [f"{title}:", ""]
        for name, text in records:
            plain = text.replace("\\[", "[")  # as rich escapes it
            lines += textwrap.wrap(name, width, initial_indent="  ", subsequent_indent=INDENT)
            lines += textwrap.wrap(plain, width, initial_indent=INDENT, subsequent_indent=INDENT)
        lines.append("")
    if command.epilog:
        lines += textwrap.wrap(Text.from_markup(command.epilog).plain, width)
    return "\n".join(lines)


def _print_narrow_help(command: Command | Group, ctx: Any) -> bool:
    """Print the help if the terminal is too narrow for panels."""
    _name_values(command, ctx)
    width = get_terminal_size().columns
    if width < PANELS_WIDTH:
        print(narrow_help(command, ctx, width))
    return width < PANELS_WIDTH


def _name_values(command: Command | Group, ctx: Any) -> None:
    if getattr(command, "_values_are_named", False):
        return
    command._values_are_named = True  # type: ignore[union-attr]
    for param in command.get_params(ctx):
        if isinstance(param, TyperOption | TyperArgument):
            param.help = escape(param.help or "")
        if isinstance(param, TyperOption):
            if param.is_flag:
                param.metavar = ""
            elif param.metavar is None:
                shown = param.display_type(ctx)  # such as <int range>, <list[Path]>, <a|b>
                kind = re.sub(r"<(?:list\[)?(\w+)(?:\]| range)?>", r"\1", shown).lower()
                param.metavar = PLACEHOLDERS.get(kind, shown)
        elif isinstance(param, TyperArgument):
            if param.metavar is None:
                param.metavar = (param.name or "").upper()
            # Panels would show <str> beside the name.
            param.display_type_rich = lambda **_: None  # type: ignore[method-assign]
