"""What a reasoning effort means to one model.

Owns: the mapping of OpenAI's efforts to what a chat template and the server can do.
Does not know: tokenizers, APIs.
Invariant: every effort has a meaning for every model; at worst it has no effect.
Next: `tokenizer.py` calls it for its template.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""From least to most."""

_SYNONYMS = {
    "off": "none",
    "disabled": "none",
    "min": "minimal",
    "lowest": "minimal",
    "moderate": "medium",
    "normal": "medium",
    "standard": "medium",
    "ultra": "max",
    "highest": "max",
    "maximum": "max",
}
_PARTS = (("min", "minimal"), ("low", "low"), ("med", "medium"), ("high", "xhigh"), ("max", "max"))
_DEFAULTS = ("auto", "default", "adaptive", "on", "enabled")

SWITCHES = ("enable_thinking", "thinking")
"""The variables by which chat templates turn reasoning on or off."""

_OPENAI_WORDS = ("low", "medium", "high")
_BUDGETS = {"minimal": 512, "low": 2048, "medium": 8192}  # tokens; beyond them there is no limit


@dataclass(frozen=True)
class ReasoningSettings:
    """How a model is told to reason.

    Args:
        enabled: for `ChatTokenizer.render`; None: the template's default.
        variables: of the template.
        budget: most tokens of reasoning; None: no limit.
    """

    enabled: bool | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    budget: int | None = None


def nearest_effort(word: str) -> str | None:
    """The one of `EFFORTS` that a word of another API means, or a newer one; None: the model's
    default, also for a word that says nothing."""
    plain = re.sub(r"[^a-z]", "", word[:40].lower())
    if plain in EFFORTS or plain in _DEFAULTS:
        return plain if plain in EFFORTS else None
    if plain in _SYNONYMS:
        return _SYNONYMS[plain]
    if "ultra" in plain:
        return "max"
    return next((effort for part, effort in _PARTS if part in plain), None)


def map_effort(effort: str, template: str, *, has_reasoning: bool) -> ReasoningSettings:
    """The settings for an effort.

    Args:
        effort: one of `EFFORTS`.
        template: source of the chat template.
        has_reasoning: the model has markers for reasoning.
    """
    enabled = True if has_reasoning else None
    if effort == "none":
        switches = any(_uses(template, name) for name in SWITCHES)
        enabled = False if has_reasoning or switches else None
    budget = _BUDGETS.get(effort) if has_reasoning else None
    if _uses(template, "reasoning_effort"):
        # The model was trained on the word, so it needs no limit.
        return ReasoningSettings(enabled, {"reasoning_effort": _nearest_word(effort, template)})
    if _uses(template, "thinking_budget") and effort in ("none", *_BUDGETS):
        return ReasoningSettings(enabled, {"thinking_budget": budget or 0}, budget)
    return ReasoningSettings(enabled, budget=budget)


def _uses(template: str, variable: str) -> bool:
    return re.search(rf"\b{variable}\b", template) is not None


def _nearest_word(effort: str, template: str) -> str:
    """The nearest of the words that the template names; the lower of two."""
    named = [word for word in EFFORTS if re.search(rf"""(["']){word}\1""", template)]
    words = named if len(named) > 1 else _OPENAI_WORDS  # one alone is the default
    rank = EFFORTS.index(effort)
    candidates = [w for w in words if w != "none"] if effort != "none" else words
    return min(candidates or words, key=lambda word: abs(EFFORTS.index(word) - rank))
