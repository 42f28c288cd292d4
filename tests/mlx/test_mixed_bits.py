"""Bits that differ from layer to layer and matrix to matrix, as mlx-lm's own recipes write them.

The witness is mlx-lm's own load of the same file.
"""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from one_process import run_ranks

from cenacle.collective.base import Collective
from cenacle.model.synth import synth

KINDS: tuple[dict[str, Any] | bool, ...] = (
    {"bits": 3, "group_size": 32, "mode": "affine"},
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 6, "group_size": 32, "mode": "affine"},
    {"bits": 8, "group_size": 32, "mode": "affine"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    False,
)
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "qwen3_next", "gpt_oss", "minimax")
TOKENS = mx.array([[1, 2, 3, 4, 5]])


def choose_kind(path: str, module: nn.Module) -> dict[str, Any] | bool:
    if not hasattr(module, "to_quantized") or module.weight.shape[-1] % 32:
        return False
    return KINDS[zlib.crc32(path.encode()) % len(KINDS)]


@cache
def logits_of_mlx_lm(folder: Path) -> mx.array:
    return compute_logits(load_model(folder)[0])


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    synth(made / "floats", family=request.param, dtype="float32")
    model, config = load_model(made / "floats")
    model, config = quantize_model(model, config, 32, 4, quant_predicate=choose_kind)
    save_model(made / "mixed", model)
    save_config(config, made / "mixed" / "config.json")
    return made / "mixed"


def compute_logits(model: nn.Module, collective: Collective | None = None) -> mx.array:
    logits = model(TOKENS)
    mx.eval(logits)
    return logits


@pytest.mark.parametrize(
    ("nodes", "placement"), [(1, "whole"), (3, "whole"), (3, "sliced"), (3, "replicated")]
)
def test_logits_are_those_of_mlx_lm(folder: Path, nodes: int, placement: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    kinds = [v for v in config["quantization"].values() if isinstance(v, dict)]
    assert len({(kind["mode"], kind["bits"]) for kind in kinds}) > 2
    expected = logits_of_mlx_lm(folder)
    got = run_ranks(folder, nodes, compute_logits, placement=placement)[0]
    scale = float(mx.max(mx.abs(expected)))
    assert float(mx.max(mx.abs(got - expected))) < 1e-4 * scale


@pytest.mark.parametrize("spelling", ["quantization_config", "language_model", "model_of_images"])
def test_other_spellings_of_the_config(folder: Path, spelling: str, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization")
    config.pop("quantization_config", None)
    prefix = {"language_model": "language_model.", "model_of_images": "model.language_model."}
    settings = {
        (prefix.get(spelling, "") + key if isinstance(value, dict | bool) else key): value
        for key, value in settings.items()
    }
    key = "quantization_config" if spelling == "quantization_config" else "quantization"
    (tmp_path / "config.json").write_text(json.dumps({**config, key: settings}))
    for file in folder.glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    expected = logits_of_mlx_lm(folder)
    got = run_ranks(tmp_path, 1, compute_logits)[0]
    assert float(mx.max(mx.abs(got - expected))) < 1e-4 * float(mx.max(mx.abs(expected)))
