"""Rotary positions that config.json scales, for every family.

Owns: which scalings are computed and by whom; ours where a family's class would ignore them.
Does not know: ranks, files.
Why: mlx-lm's classes of Mixtral, Qwen3-MoE, GLM-4.5 and others turn positions without a scale,
whatever config.json says, and no class of the zoo knows all of YaRN's values; answers to long
texts would be wrong without a word. What is right say transformers' logits (`tests/vectors`).
Invariant: a scaling that config.json names is computed, or the model is refused by its name.
Next: `zoo.py`, which builds every model with the classes that `scale_classes` gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import YarnRoPE, initialize_rope

from ..core.model_config import Config, get_int, text_config
from ..errors import CheckpointError

UNSCALED = ("default", "mrope", "proportional")
"""Values of rope_type whose settings every family that has them computes."""
YARN = ("yarn", "deepseek_yarn")
COMPUTED = ("linear", *YARN, "llama3")
"""What is computed where a family's class would ignore it."""
_KNOWN_TO_ZOO = (*COMPUTED, "telechat3-yarn", "longrope")  # its `initialize_rope`
# Classes with rotary positions of their own, or others for each kind of layers: what they compute.
# Others have `nn.RoPE`, which is replaced where all of a model's are unscaled, or what the zoo's
# `initialize_rope` gives.
_OWN_KINDS: dict[str, tuple[str, ...]] = {
    "deepseek_v2": YARN,
    "deepseek_v4": YARN,
    "deepseek_v41": YARN,
    "ernie4_5_moe_vl": (),
    "gemma4": (),
    "gemma4_text": (),
    "glm4v_moe": (),
    "hunyuan": ("dynamic",),  # with an alpha, so that it does not depend on the length
    "laguna": (*YARN, "linear", "llama3", "longrope"),
    "mellum": (*YARN, "llama3", "longrope"),
    "mimo_v2": (),
    "mimo_v2_flash": (),  # two kinds of layers, each with a base of its own
    "phimoe": ("longrope",),
    "qwen3_omni_moe": (),
    "qwen4_exp": (),
}
# Attention of these has no rotary positions, so nothing is lost.
_WITHOUT_POSITIONS = (
    *("glm5_next", "granitemoehybrid", "inkling", "jamba", "kimi_k3", "kimi_linear", "nemotron_h"),
)
# Of these the arguments refuse a scaling that the class would ignore.
_REFUSING_ARGUMENTS = ("qwen2_moe",)
_WITH_LENGTH = (*YARN, "telechat3-yarn", "llama3", "longrope")


def complete_rope(config: Config) -> Config:
    """A config, or its part about text, with every name that families give to the same settings.

    transformers 5 has all in `rope_parameters`; before it there were `rope_theta`,
    `partial_rotary_factor` and `rope_scaling`.
    """
    full = dict(config)
    rope, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    is_nested = isinstance(rope, dict) and _is_nested(rope)
    if isinstance(rope, dict) and not is_nested:
        for key in ("rope_theta", "partial_rotary_factor"):
            if rope.get(key) is not None:
                full.setdefault(key, rope[key])
        if scaling is None and _kind_of(rope) not in UNSCALED:
            rope = {"type": _kind_of(rope), **rope}
            full["rope_scaling"] = _with_length(rope, config)
        full["rope_parameters"] = _with_length(rope, config)
    if isinstance(scaling, dict):
        scaling = {"type": _kind_of(scaling), **_with_length(scaling, config)}
        full["rope_scaling"] = scaling
        if not is_nested and _kind_of(scaling) not in UNSCALED:  # then transformers takes these
            old = rope if isinstance(rope, dict) else {}
            kind = {"rope_type": _kind_of(scaling), "type": _kind_of(scaling)}
            settings = {**old, **scaling, **kind}
            for key in ("rope_theta", "partial_rotary_factor"):
                if config.get(key) is not None:
                    settings.setdefault(key, config[key])
            full["rope_parameters"] = settings
    return full


def _is_nested(rope: Mapping[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in rope.values())


def _kind_of(settings: Mapping[str, Any]) -> str:
    return str(settings.get("rope_type") or settings.get("type") or "default")


def _with_length(settings: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """With the length that a model was trained with, which by default is that of the config."""
    known = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    full = dict(settings)
    if _kind_of(settings) in _WITH_LENGTH and known is not None:
        full.setdefault("original_max_position_embeddings", known)
    return full


def find_scalings(config: Config) -> list[dict[str, Any]]:
    """The settings of all scaled rotary positions of a config: several by kinds of layers."""
    text = complete_rope(text_config(config))
    rope, settings = text.get("rope_parameters"), []
    if isinstance(rope, dict) and _is_nested(rope):
        settings = [value for value in rope.values() if isinstance(value, dict)]
    if isinstance(text.get("rope_scaling"), dict):
        settings.append(text["rope_scaling"])
    return [{**s, "rope_type": _kind_of(s)} for s in settings if _kind_of(s) not in UNSCALED]


def check_scalings(family: str, config: Config) -> None:
    """Refuse what neither the family's class nor this module computes.

    Raises:
        CheckpointError: a kind, or a value of one.
    """
    known = _OWN_KINDS.get(family, _KNOWN_TO_ZOO)
    scalings = find_scalings(config)
    text = text_config(config)
    rope, scaling = text.get("rope_parameters"), text.get("rope_scaling")
    if isinstance(rope, dict) and _is_nested(rope) and isinstance(scaling, dict):
        raise CheckpointError(
            "config.json: expected rope_scaling, or rope_parameters of each kind of layers, got "
            "both"
        )
    for settings in scalings:
        kind = settings["rope_type"]
        if kind not in known:
            expected = " or ".join(map(repr, ("default", *known)))
            raise CheckpointError(
                f"config.json: rope_type: expected {expected} with {family}, got {kind!r:.100}; "
                "its scaling of rotary positions is not supported"
            )
        for key in ("factor", "original_max_position_embeddings", "attention_factor"):
            value = settings.get(key)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < 2**53):
                raise CheckpointError(
                    f"config.json: {key} of rotary positions: expected a positive number, "
                    f"got {value!r:.100}"
                )
        if kind in COMPUTED and settings.get("factor") is None:
            raise CheckpointError(f"config.json: rope_type {kind!r} needs a factor, got none")


def scale_positions(model: nn.Module, family: str, config: Config) -> None:
    """Give a model that was built of `config` the scaling that its class ignored, in place.

    Raises:
        CheckpointError: it would be computed without the scaling, or with another one.
    """
    scalings = find_scalings(config)
    modules = [(path, m) for path, m in model.named_modules() if _is_rope(m)]
    is_ignored = all(type(m) is nn.RoPE and m.scale == 1.0 for _, m in modules)
    if family in _OWN_KINDS or (not modules and family in _WITHOUT_POSITIONS):
        is_ignored = False
    kind = scalings[0]["rope_type"]
    if is_ignored and (not modules or len(scalings) > 1 or kind not in COMPUTED):
        raise CheckpointError(
            f"config.json: rope_type: expected 'default', got {kind!r:.100}: {family} would "
            "ignore it"
        )
    has_unknown = any(map(_has_unknown_values, scalings))
    replaced = [
        (path, m)
        for path, m in modules
        if is_ignored or (has_unknown and len(scalings) == 1 and isinstance(m, YarnRoPE))
    ]
    if has_unknown and not replaced and family not in _WITHOUT_POSITIONS:
        raise CheckpointError(
            f"config.json: attention_factor or truncate of rotary positions: {family} would "
            "ignore it"
        )
    text = complete_rope(text_config(config))
    length = get_int(text, ("max_position_embeddings",))
    for path, module in replaced:
        base = module.base if is_ignored else text.get("rope_theta", 10000.0)
        made = initialize_scaled(module.dims, base, module.traditional, scalings[0], length)
        parent, _, name = path.rpartition(".")
        node: Any = model
        for part in parent.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        setattr(node, name, made)


def _is_rope(module: nn.Module) -> bool:
    return type(module) is nn.RoPE or type(module).__name__.endswith("RoPE")


def _has_unknown_values(settings: Mapping[str, Any]) -> bool:
    """Whether YaRN's settings have values that the zoo's class does not look at."""
    if settings["rope_type"] not in YARN:
        return False
    stated = settings.get("attention_factor")
    is_default = stated is None or abs(stated - _attention_factor(settings, None)) < 1e-6
    return not (is_default and settings.get("truncate", True))


def _attention_factor(settings: Mapping[str, Any], stated: float | None) -> float:
    """What YaRN multiplies rotated queries and keys by."""
    if stated is not None:
        return stated

    def of(scale: float) -> float:
        factor: float = settings["factor"]
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scale, scale_all = settings.get("mscale"), settings.get("mscale_all_dim")
    return of(scale) / of(scale_all) if scale and scale_all else of(1.0)


def initialize_scaled(
    dims: int,
    base: float,
    traditional: bool,
    settings: Mapping[str, Any],
    max_positions: int | None,
) -> nn.Module:
    """Rotary positions as transformers computes them.

    Args:
        dims: features that are turned.
        settings: see `find_scalings`; of a kind in `COMPUTED`.
        max_positions: of the config.
    """
    kind = "yarn" if settings["rope_type"] in YARN else settings["rope_type"]
    scaling = {**settings, "type": kind}
    rope = initialize_rope(dims, base, traditional, scaling, max_positions)
    if kind != "yarn":
        return rope
    rope.mscale = _attention_factor(settings, settings.get("attention_factor"))
    if settings.get("truncate", True):
        return rope

    def dimension(rotations: float) -> float:
        length = settings.get("original_max_position_embeddings", 4096)
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(dimension(settings.get("beta_fast") or 32), 0)
    high = min(dimension(settings.get("beta_slow") or 1), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2) - low) / max(high - low, 1e-3), 0, 1)
    short = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    long = settings["factor"] * short
    rope._freqs = long * short / (long * (1 - ramp) + short * ramp)
    return rope


@dataclass(frozen=True)
class _Unscaled:
    """DeepSeek-V2's arguments: its class knows YaRN only, whose factor of 1 changes nothing."""

    arguments: Any

    def from_dict(self, values: Config) -> Any:
        return self.arguments.from_dict({**values, "rope_scaling": {"type": "yarn", "factor": 1.0}})


def scale_classes(
    family: str, model: type[nn.Module], arguments: Any, config: Config
) -> tuple[type[nn.Module], Any]:
    """A family's model class and its arguments' class, for a config that scales positions.

    Raises:
        CheckpointError: see `check_scalings`.
    """
    if not find_scalings(config):
        return model, arguments if family != "deepseek_v2" else _Unscaled(arguments)
    check_scalings(family, config)

    class ScaledModel(model):  # type: ignore[valid-type, misc]
        def __init__(self, made: Any) -> None:
            super().__init__(made)
            scale_positions(self, family, config)

    class Arguments:
        @staticmethod
        def from_dict(values: Config) -> Any:
            if family in _REFUSING_ARGUMENTS:
                values = {**values, "rope_scaling": None}
            return arguments.from_dict(values)

    ScaledModel.__module__, ScaledModel.__name__ = model.__module__, model.__name__
    return ScaledModel, Arguments
