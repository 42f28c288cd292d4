"""The planner's workload for a model that is given by its config.json or its folder.

Owns: what is read of the model: the stored bytes of a checkpoint, and parameter counts of the model
that mlx-lm builds from a config.
Does not know: machines, placements, models that are known by name only (`planning.catalog`).
Next: `planning/planner.py` plans for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from ..core.model_spec import ModelSpec
from ..errors import CenacleError, CheckpointError
from ..planning import planner
from ..planning.catalog import Quantization, parse_quantization
from ..planning.model_shapes import ModelShape, shape_from_config
from ..planning.perf_model import Workload
from . import architecture, synth
from .checkpoint import Checkpoint
from .config_file import check_values
from .spec_reader import read_model_spec

QUANTIZATION_KEYS = ("quantization", "quantization_config")


OnMessage = Callable[[str], None]


def read_workload(
    path: Path,
    quantization: str | None,
    context: int,
    users: int,
    prompt_tokens: int,
    on_message: OnMessage = lambda _: None,
) -> tuple[Workload, ModelSpec | None]:
    """The workload, and the spec of a checkpoint that is run as it is stored.

    Args:
        path: config.json or folder.
        quantization: bits per weight, as `catalog.quant` reads them; None: as stored.
        context: tokens in the cache, per user.
        users: requests at once.
        prompt_tokens: length of the prompt whose first token is timed.
        on_message: told if parameter counts had to be estimated.

    Raises:
        InputError: an unknown quantization.
        CheckpointError: the file or folder cannot be read.
    """
    if path.is_file():
        config = _read_config(path)
        name = config.get("_name_or_path") or path.resolve().parent.name
        shape = count_parameters(shape_from_config(str(name), config), config, on_message)
        stored = parse_quantization(quantization or _stored_bits(config))
        return Workload(shape, stored, context, users, prompt_tokens), None
    checkpoint = Checkpoint.open(path)
    spec = read_model_spec(checkpoint)
    shape = shape_from_config(path.resolve().name, checkpoint.config, str(path))
    shape = count_parameters(shape, checkpoint.config, on_message)
    if quantization is not None:
        return Workload(
            shape, parse_quantization(quantization), context, users, prompt_tokens
        ), None
    stored_bytes = (float(spec.trunk_bytes), float(spec.expert_bytes), float(spec.shared_bytes))
    expert_bits = 8 * spec.expert_bytes / shape.routed
    stored = Quantization(
        f"{expert_bits:.3g} (stored)", expert_bits, 8 * spec.trunk_bytes / shape.trunk
    )
    return Workload(shape, stored, context, users, prompt_tokens, stored_bytes), spec


def count_parameters(
    shape: ModelShape, config: dict[str, Any], on_message: OnMessage = lambda _: None
) -> ModelShape:
    """The shape with the parameter counts of the model that mlx-lm builds from the config.

    Attention sizes come from the config; parameter counts need not be derived where mlx-lm knows
    the family.
    """
    unquantized = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    try:
        model = synth.build_lazy_model(architecture.complete_config(unquantized))
    except CenacleError as error:
        on_message(f"parameter counts are estimated from the config: {error}")
        return shape
    architecture.unify_experts(model)
    blocks = architecture.find_blocks(model)
    if not blocks:
        return shape
    routed = sum(_size(linear) for block in blocks for linear in block.linears.values())
    shared = sum(_size(block.module[name]) for block in blocks for name in block.shared_names)
    return replace(
        shape,
        moe_layers=len(blocks),
        moe_ids=tuple(block.layer for block in blocks),
        experts=blocks[0].expert_count,
        expert=routed // (len(blocks) * blocks[0].expert_count),
        shared=shared // len(blocks),
        trunk=_size(model) - routed - shared,
    )


def estimate_spec(workload: Workload) -> ModelSpec:
    """The spec of a model of which no checkpoint was read.

    Raises:
        PlanError: the shape does not say which layers have experts.
    """
    family = workload.shape.family
    return planner.spec_from_workload(
        workload, architecture.resolve_family({"model_type": family}) if family else ""
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a config.json: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}")
    check_values(path, config)
    return config


def _stored_bits(config: dict[str, Any]) -> str:
    """The quantization that config.json states, else 16 bits."""
    for key in QUANTIZATION_KEYS:
        table = config.get(key)
        if isinstance(table, dict):
            if "mxfp4" in (table.get("mode"), table.get("quant_method")):
                return "mxfp4"
            if isinstance(table.get("bits"), int):
                return str(table["bits"])
            if table.get("quant_method") == "fp8":
                return "fp8"
    return "16"


def _size(module: Any) -> int:
    arrays: Any = tree_flatten(module.parameters())
    return sum(array.size for _, array in arrays)
