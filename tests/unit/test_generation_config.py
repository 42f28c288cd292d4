"""Sampling parameters that a checkpoint recommends: what is read, and what a request changes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cenacle.core.request import Sampling
from cenacle.model.generation_config import read_sampling_defaults
from cenacle.server.api.openai import ChatCompletionsAdapter
from cenacle.server.api.protocol import ServedModel

RECOMMENDED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
SERVED = ServedModel("house", 100, 50, sampling_defaults=RECOMMENDED)


def sampling(served: ServedModel = SERVED, **fields: Any) -> Sampling:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    return ChatCompletionsAdapter().parse(json.dumps(body).encode(), served).sampling


def test_a_request_leaves_out_what_the_checkpoint_recommends():
    found = sampling()
    assert {name: getattr(found, name) for name in RECOMMENDED} == RECOMMENDED
    assert found.repetition_context_size == -1  # the whole text, as in transformers
    assert sampling(replace(SERVED, sampling_defaults={})).temperature == 1.0


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0, "top_p": 0.95}),
        ({"temperature": None}, {"temperature": 0.6}),
        ({"top_p": 1, "top_k": -1}, {"top_p": 1.0, "top_k": 0, "temperature": 0.6}),
        ({"repeat_penalty": 1}, {"repetition_penalty": 1.0}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2, "repetition_context_size": 20}),
        ({"repeat_last_n": 7}, {"repetition_penalty": 1.05, "repetition_context_size": 7}),
        ({"repetition_context_size": 9}, {"repetition_context_size": 9}),
    ],
)
def test_a_request_decides(fields, expected):
    found = sampling(**fields)
    assert {name: getattr(found, name) for name in expected} == expected


def write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    return folder


def test_only_values_that_sampling_accepts_are_read(tmp_path, caplog):
    assert read_sampling_defaults(tmp_path) == {}
    assert not caplog.records
    content = {**RECOMMENDED, "eos_token_id": [1, 2], "do_sample": True, "min_p": None}
    assert read_sampling_defaults(write(tmp_path, content)) == RECOMMENDED
    assert read_sampling_defaults(write(tmp_path, {"top_k": -1, "top_p": 0.9})) == {"top_p": 0.9}
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "[" * 100_000,
        "\x00",
        '{"temperature": NaN}',
        '{"temperature": "warm"}',
        '{"temperature": 1e999}',
        '{"top_p": -1}',
        '{"top_k": true}',
        '{"top_k": 1.5}',
        '{"repetition_penalty": [1]}',
        '{"min_p": {"a": 1}}',
    ],
)
def test_wrong_values_are_named_and_left_out(tmp_path, caplog, content):
    assert read_sampling_defaults(write(tmp_path, content)) == {}
    (record,) = caplog.records
    assert "generation_config.json" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_file_that_is_not_one_is_left_out(tmp_path, caplog):
    (tmp_path / "generation_config.json").mkdir()
    assert read_sampling_defaults(tmp_path) == {}
    (record,) = caplog.records
    assert "it is ignored" in record.getMessage()
