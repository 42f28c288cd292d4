"""What efforts mean to templates of several kinds."""

import pytest

from cenacle.text.reasoning import EFFORTS, ReasoningSettings, map_effort

GPT_OSS = (
    '{% set reasoning_effort = reasoning_effort or "medium" %}Reasoning: {{ reasoning_effort }}'
)
MISTRAL = "{% if reasoning_effort not in ['none', 'high'] %}{{ raise_exception('no') }}{% endif %}"
DEEPSEEK = (
    "{% if reasoning_effort == 'max' %}Think long.{% elif reasoning_effort == 'high' %}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (GPT_OSS, ["low", "low", "low", "medium", "high", "high", "high"]),
        (MISTRAL, ["none", "high", "high", "high", "high", "high", "high"]),
        (DEEPSEEK, ["high", "high", "high", "high", "high", "high", "max"]),
    ],
)
def test_a_template_with_efforts_gets_its_nearest_word(template, words):
    settings = [map_effort(effort, template, has_reasoning=False) for effort in EFFORTS]
    assert [s.variables["reasoning_effort"] for s in settings] == words
    assert {s.budget for s in settings} == {None}


@pytest.mark.parametrize("template", ["{{ enable_thinking }}", "{{ thinking }}", "<think>"])
def test_a_template_without_efforts_gets_a_switch_and_a_limit(template):
    settings = {effort: map_effort(effort, template, has_reasoning=True) for effort in EFFORTS}
    assert settings["none"] == ReasoningSettings(enabled=False)
    assert settings["minimal"] == ReasoningSettings(enabled=True, budget=512)
    assert settings["medium"] == ReasoningSettings(enabled=True, budget=8192)
    assert settings["high"] == settings["max"] == ReasoningSettings(enabled=True)


def test_a_template_with_a_budget_is_told():
    low = map_effort("low", "{{ thinking_budget }}", has_reasoning=True)
    assert low == ReasoningSettings(True, {"thinking_budget": 2048}, 2048)
    assert map_effort("none", "{{ thinking_budget }}", has_reasoning=True).variables == {
        "thinking_budget": 0
    }


@pytest.mark.parametrize("effort", EFFORTS)
def test_efforts_have_no_effect_without_reasoning(effort):
    assert map_effort(effort, "{{ messages }}", has_reasoning=False) == ReasoningSettings()
