"""config.json of a checkpoint, checked before anything believes it.

Owns: reading it; the bounds of what a config can ask for.
Does not know: families, weights.
Invariant: a config that was read is an object of finite size whose counts are plausible, and names
no code that is to be run.
Next: `checkpoint.py` compares its counts with the tensors.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm import utils as mlx_lm_utils

from ..core.model_config import (
    EXPERT_COUNT_KEYS,
    HEAD_COUNT_KEYS,
    HIDDEN_SIZE_KEYS,
    KV_HEAD_COUNT_KEYS,
    LAYER_COUNT_KEYS,
    VOCAB_SIZE_KEYS,
    Config,
)
from ..errors import CheckpointError
from ..extras import import_extra
from .weight_files import config_file

log = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 16 << 20
MAX_DEPTH = 64
MAX_INTEGER = 2**63 - 1
# More than any model has; a config could otherwise ask for gigabytes before weights are looked at.
MAX_COUNTS = {
    LAYER_COUNT_KEYS: 1000,
    EXPERT_COUNT_KEYS: 10_000,
    HIDDEN_SIZE_KEYS: 1 << 20,
    VOCAB_SIZE_KEYS: 1 << 24,
    HEAD_COUNT_KEYS: 1 << 16,
    KV_HEAD_COUNT_KEYS: 1 << 16,
}


# Values of quant_method whose tensors mean nothing without the tool that wrote them.
UNSUPPORTED_METHODS = (
    *("aqlm", "auto-gptq-marlin", "bitsandbytes", "eetq", "exl2", "exl3", "fp_quant", "higgs"),
    *("hqq", "marlin", "quanto", "quark", "quip", "spqr", "sinq", "torchao", "vptq"),
)


def read_config(folder: Path) -> Config:
    """config.json, with the names that mlx-lm looks for.

    Raises:
        CheckpointError: it is missing, is not a plausible config, or names code to run.
    """
    file = config_file(folder)
    try:
        for read in (file, folder / "generation_config.json"):  # mlx-lm reads both
            if (size := read.stat().st_size if read.exists() else 0) > MAX_CONFIG_BYTES:
                raise CheckpointError(
                    f"{read}: expected at most {MAX_CONFIG_BYTES:,} bytes, got {size:,}"
                )
        config = (
            _load_params(file) if file.name == "params.json" else mlx_lm_utils.load_config(folder)
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no config.json; expected a model folder as on the Hugging Face Hub"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{error.filename or file} cannot be read: {error}") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    except (RecursionError, TypeError, AttributeError, KeyError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else repr(error)
        raise CheckpointError(
            f"{file}, or generation_config.json beside it: expected a JSON object: {reason:.200}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got a {type(config).__name__}")
    check_values(file, config)
    if "model_file" in config:
        raise CheckpointError(
            f"{folder}: config.json names a Python file ({config['model_file']!r:.100}); Cenacle "
            f"runs mlx-lm's own families only and executes no code from a checkpoint"
        )
    return config


def _load_params(file: Path) -> Config:
    """Mistral's own config, as mlx-vlm translates it."""
    params = json.loads(file.read_bytes())
    if "moe" not in params or "vision_encoder" not in params:
        raise CheckpointError(
            f"{file}: expected a Mistral Large 3; other models of Mistral need a config.json"
        )
    config: Config = import_extra("mlx_vlm.models.mistral_large3.config", "vlm").config_from_params(
        params
    )
    if ignored := [key for key in ("yarn", "llama_4_scaling") if params.get(key)]:
        log.warning("%s: mlx-vlm ignores %s: long texts may differ", file, ", ".join(ignored))
    for key in ("quantization", "quantization_config"):
        if isinstance(params.get(key), dict):
            config["quantization_config"] = params[key]
    return config


def read_quantization_settings(folder: Path, config: Config) -> Config:
    """How config.json, or ModelOpt's file beside it, says that weights are quantized.

    Raises:
        CheckpointError: the file is not what ModelOpt writes, or another tool's format that cannot
            be read.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        settings = part.get("quantization_config")
        if isinstance(settings, dict):
            break
    else:
        file = folder / "hf_quant_config.json"
        if not file.is_file():
            return {}
        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise ValueError(f"{file.stat().st_size:,} bytes")
            settings = json.loads(file.read_bytes())["quantization"]
            if not isinstance(settings, dict):
                raise TypeError(f"quantization is a {type(settings).__name__}")
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            raise CheckpointError(
                f"{file}: expected a JSON object with an object named quantization, got "
                f"{error!r:.200}"
            ) from error
    method = settings.get("quant_method")
    if method in UNSUPPORTED_METHODS:
        raise CheckpointError(
            f"{folder}: weights quantized by {method} are not supported; docs/serving.md lists the "
            f"formats"
        )
    return settings


def _walk(config: Config) -> Iterator[tuple[str, Any, int]]:
    """Every member of every object, with its name and depth; lists count as depth too."""
    rest: list[tuple[str, Any, int]] = [("", config, 0)]
    while rest:
        name, value, depth = rest.pop()
        yield name, value, depth
        if isinstance(value, dict):
            rest += [(str(key), member, depth + 1) for key, member in value.items()]
        elif isinstance(value, list):
            rest += [(name, item, depth + 1) for item in value]


def check_values(file: Path, config: Config) -> None:
    """Check that values are finite, and counts plausible.

    Raises:
        CheckpointError: they are not.
    """
    limits = {key: limit for keys, limit in MAX_COUNTS.items() for key in keys}
    for name, value, depth in _walk(config):
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{file}: expected at most {MAX_DEPTH} nested levels, got more")
        if name == "text_config" and not isinstance(value, dict):
            raise CheckpointError(
                f"{file}: text_config: expected a JSON object, got {value!r:.100}"
            )
        if isinstance(value, float) and math.isnan(value):
            raise CheckpointError(f"{file}: {name:.80}: expected a number, got NaN")
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if abs(value) > MAX_INTEGER and math.isfinite(value):
            raise CheckpointError(
                f"{file}: {name:.80}: expected a number of 64 bits, got a larger one"
            )
        if name in limits and not 0 <= value <= limits[name]:
            raise CheckpointError(
                f"{file}: {name}: expected a number from 0 to {limits[name]:,}, got {value}"
            )
    kind = config.get("model_type")
    if kind is not None and not (isinstance(kind, str) and _is_name(kind)):
        raise CheckpointError(f"{file}: expected a model_type that is a name, got {kind!r:.100}")


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 64 and all(c.isalnum() or c in "_-" for c in text)
