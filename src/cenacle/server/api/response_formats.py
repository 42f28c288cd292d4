"""Response formats of OpenAI's APIs, and other servers' names for them.

Owns: the request models of formats; how each becomes a grammar.
Does not know: which API a format came by, tokens.
Next: `structured_output.py` makes the grammars.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .structured_output import choice_grammar, json_schema_grammar, lark_grammar, regex_grammar
from .validation import Items, JsonObject, RequestModel, Tagged, Text, describe, fail, refuse


class PlainFormat(RequestModel):
    """Any text, or a JSON object, any one or what a schema describes."""

    type: Literal["text", "json_object"]
    schema_: JsonObject | None = Field(
        default=None, alias="schema", description="Of a json_object."
    )

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "text" and self.schema_ is not None:
            fail("only allowed with type json_object", "schema")
        return self

    def to_grammar(self, field: str) -> str | None:
        """Its grammar; `field` is its path in the request."""
        if self.type == "text":
            return None
        if self.schema_ is None:
            return json_schema_grammar({"type": "object"}, field)
        return json_schema_grammar(self.schema_, f"{field}.schema")


class NamedSchema(RequestModel):
    """A JSON schema, enforced whether it is strict or not."""

    name: Text = ""
    description: Text = ""
    schema_: JsonObject = Field({}, alias="schema", description="Without it, any JSON matches.")
    strict: bool = False

    def to_grammar(self, field: str) -> str:
        """Its grammar; `field` is its path in the request."""
        return json_schema_grammar(self.schema_, f"{field}.schema")


def _nest_schema(value: Any) -> Any:
    """llama.cpp's form, and that of responses, have the schema beside the type."""
    if not isinstance(value, dict) or "json_schema" in value or "schema" not in value:
        return value
    return {"type": value.get("type"), "json_schema": value}


class _SchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    @model_validator(mode="before")
    @classmethod
    def _read_flat_form(cls, value: Any) -> Any:
        return _nest_schema(value)

    def to_grammar(self, field: str) -> str:
        return self.json_schema.to_grammar(f"{field}.json_schema")


class _RegexFormat(RequestModel):
    type: Literal["regex"]
    pattern: Text = Field(description="In Rust's syntax, without look-around.")

    def to_grammar(self, field: str) -> str:
        return regex_grammar(self.pattern, f"{field}.pattern")


class _GrammarFormat(RequestModel):
    type: Literal["grammar"]
    grammar: Text = Field(description="In llguidance's variant of Lark.")

    def to_grammar(self, field: str) -> str:
        return lark_grammar(self.grammar, f"{field}.grammar")


ResponseFormat = Tagged[PlainFormat | _SchemaFormat | _RegexFormat | _GrammarFormat]


def parse_schema(value: Any) -> Any:
    """A JSON schema that may come as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        fail(f"expected a JSON schema, got {describe(value)}")


class StructuredOutputs(RequestModel):
    """vLLM's form of a response format."""

    unsupported = refuse("structural_tag", "whitespace_pattern")
    json_: Annotated[JsonObject | None, BeforeValidator(parse_schema)] = Field(None, alias="json")
    regex: Text | None = None
    choice: Items[Text] = Field([])
    grammar: Text | None = None
    json_object: bool = False

    def constraints(self) -> dict[str, Callable[[str], str]]:
        """How to make the grammar of each member that is set, by its path."""
        schema = {"type": "object"} if self.json_object and self.json_ is None else self.json_
        return constraints_of(
            {
                "structured_outputs.json": schema,
                "structured_outputs.regex": self.regex,
                "structured_outputs.choice": self.choice or None,
                "structured_outputs.grammar": self.grammar,
            }
        )


def constraints_of(fields: Mapping[str, Any]) -> dict[str, Callable[[str], str]]:
    """How to make the grammar of each field that is set, by what its name ends with."""
    makers: dict[str, Callable[[Any, str], str]] = {
        "json": json_schema_grammar,
        "json_schema": json_schema_grammar,
        "regex": regex_grammar,
        "choice": choice_grammar,
        "grammar": lark_grammar,
    }
    return {
        field: partial(makers[re.sub(r"^(guided_|.*\.)", "", field)], value)
        for field, value in fields.items()
        if value is not None
    }
