"""Tools as clients define and choose them, where all APIs agree.

Owns: functions, tools of plain text, tools that are left out, choices among them; one API's form of
these in another's.
Does not know: the rest of the APIs.
Next: `structured_output.py` decides what is offered.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from ...core.chat import Tool
from .protocol import ToolName
from .structured_output import Mode, ToolChoice
from .validation import JsonObject, RequestModel, Text, refuse

_FORMS = ("function", "custom", "allowed_tools")
_MODES = {"auto": "auto", "none": "none", "any": "required", "required": "required"}


def nest(value: Any) -> Any:
    """A tool, or a choice, in the form of chat completions, if it comes in that of responses."""
    value = _mode_of(value)
    if isinstance(value, dict) and "function" in value:
        return {"type": "function", **value}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in _FORMS or kind in value or not ("name" in value or "tools" in value):
        return value
    return {"type": kind, kind: {name: v for name, v in value.items() if name != "type"}}


def flatten(value: Any) -> Any:
    """A tool, or a choice, in the form of responses, if it comes in that of chat completions."""
    value = _mode_of(value)
    if not isinstance(value, dict):
        return value
    kind = value.get("type", "function")
    inner = value.get(kind) if kind in _FORMS else None
    return {"type": kind, **inner} if isinstance(inner, dict) else value


def _mode_of(value: Any) -> Any:
    """A choice, if it comes in the form of Anthropic's API."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind in _MODES:
        return _MODES[kind]
    if kind == "tool" and "name" in value:
        return {"type": "function", "name": value["name"]}
    return value


class FunctionDefinition(RequestModel):
    """A function that the model may call."""

    unsupported = refuse(input_schema=({},))
    name: ToolName
    description: Text = ""
    parameters: JsonObject = Field({}, description="A JSON schema of the arguments.")
    strict: bool = Field(False, description="Calls that break the schema are text.")

    def to_tool(self) -> Tool:
        """As it is offered to the model."""
        return Tool(self.name, self.description, self.parameters, self.strict)


class CustomDefinition(RequestModel):
    """A tool whose one argument is plain text."""

    name: ToolName
    description: Text = ""
    format: JsonObject = Field({}, description="Text, or a grammar, which the model only reads.")

    def to_tool(self) -> Tool:
        """As it is offered to the model: a function with one string."""
        details = self.format.get("grammar", self.format)
        definition = details.get("definition") if isinstance(details, dict) else None
        written = f"The input must match this grammar:\n{definition}" if definition else ""
        text = "\n\n".join(part for part in (self.description, written) if part)
        schema = {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
        }
        return Tool(self.name, text, schema, freeform=True)


OtherType = Annotated[
    str,
    WithJsonSchema({"type": "string", "not": {"enum": ["function", "custom", "allowed_tools"]}}),
]


class HostedTool(RequestModel):
    """A tool that the API's own servers would run: the model is not told of it."""

    type: OtherType

    def to_tool(self) -> None:
        """None: it is not offered."""


class ToolChoiceObject(RequestModel):
    """A `tool_choice` that names tools."""

    @abstractmethod
    def to_choice(self) -> ToolChoice:
        """What it says."""


class HostedToolChoice(ToolChoiceObject):
    """A tool that is not offered cannot be called: the model decides."""

    type: OtherType

    def to_choice(self) -> ToolChoice:
        """See `ToolChoiceObject`."""
        return ToolChoice(is_hosted=True)


def allowed_choice(
    mode: Literal["auto", "required"], choices: Sequence[ToolChoiceObject]
) -> ToolChoice:
    """A choice among named tools; those that are not offered do not count."""
    names = [choice.to_choice().function for choice in choices]
    return ToolChoice(mode, allowed=tuple(name for name in names if name is not None))


def to_choice(choice: Mode | Literal["any"] | ToolChoiceObject) -> ToolChoice:
    """What a `tool_choice` says; "any" is another word for "required"."""
    if isinstance(choice, str):
        return ToolChoice("required" if choice == "any" else choice)
    return choice.to_choice()
