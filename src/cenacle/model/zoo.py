"""Model classes of mlx-lm, and of mlx-vlm for families that mlx-lm lacks.

Owns: which package runs a model_type, and making mlx-vlm's language models look like mlx-lm's.
Does not know: ranks, plans, bytes on disk.
How: mlx-vlm's `Model` is `language_model` and towers for images and sound. `TextModel` is that
class without the towers, called as mlx-lm calls its models. `use_mlx_lm_experts` replaces its
stacked experts by mlx-lm's, so that slicing and kernels know one kind.
Invariant: mlx-vlm is imported only for a model_type that needs it.
Next: `architecture.py`, which finds the blocks; `families.py`, the rows of both packages.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, deepseek_v41, step3p5, switch_layers
from mlx_lm.models.cache import KVCache
from mlx_lm.models.mla import MultiLinear
from mlx_lm.utils import _get_classes

from ..core.model_config import Config
from ..errors import CheckpointError, InputError
from ..extras import import_extra, is_installed
from .families import OUTPUT_SCALE, Positions, Zoo, family_of, is_tower_tensor, vlm_family_name
from .rotary import scale_classes
from .zoo_caches import as_mlx_lm_caches
from .zoo_drafters import PREFIX_KEY, drafter_classes
from .zoo_repairs import repair

_LANGUAGE_MODEL, _THINKER = "language_model", "thinker"
_EXPERT_SCALES = {"gate_scale": "gate_proj", "out_scale": "down_proj"}
_IMAGE_EXPERTS = "switch_mlp_1", "gate_1", "e_score_correction_bias_1"
_MODALITIES = ("text", "vision", "perceiver", "projector", "audio")  # as mlx-vlm builds configs
_FUSED = re.compile(r"(.*\.switch_mlp)\.gate_up_proj\.(\w+)")


@dataclass(frozen=True)
class ModelClasses:
    """What builds a model.

    Args:
        family: the package's own name of the family: its module.
        zoo: the package.
        model: the class, called with what `arguments.from_dict(config)` gives.
        arguments: the class of its arguments.
    """

    family: str
    zoo: Zoo
    model: type[nn.Module]
    arguments: Any

    def build(self, config: Config) -> nn.Module:
        """The model of a config, with lazy random weights."""
        return self.model(self.arguments.from_dict(config))  # type: ignore[call-arg]


def find_classes(config: Config) -> ModelClasses:
    """The classes for a config's model_type and its scaling of rotary positions.

    Raises:
        CheckpointError: the config has no model_type, neither package has such a family, or
            positions are scaled in a way that is not supported.
        InputError: mlx-vlm has it and is not installed.
    """
    classes = _find_classes(config)
    if PREFIX_KEY in config:
        model, arguments = drafter_classes(classes.family)
        classes = replace(classes, model=model, arguments=arguments)
    model, arguments = scale_classes(classes.family, classes.model, classes.arguments, config)
    return replace(classes, model=model, arguments=arguments)


def _find_classes(config: Config) -> ModelClasses:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("config.json: expected a model_type, got none")
    if (name := vlm_family_name(kind)) is not None:
        return _vlm_classes(name)
    try:
        model, arguments = _get_classes(config)
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        # AttributeError: a module of mlx-lm that is no family; TypeError: odd `architectures`.
        if (other := _unlisted_vlm_classes(kind)) is not None:
            return other
        raise CheckpointError(
            f"config.json: neither mlx-lm nor mlx-vlm supports model_type {kind!r}; "
            f"`cenacle families` lists the supported ones"
        ) from error
    name = model.__module__.rsplit(".", 1)[-1]
    repair(name)
    return ModelClasses(name, Zoo.MLX_LM, model, arguments)


def _unlisted_vlm_classes(kind: str) -> ModelClasses | None:
    """A family of mlx-vlm without a row: the generic case."""
    if not is_installed("mlx_vlm") or not is_installed(f"mlx_vlm.models.{kind}.language"):
        return None
    try:
        return _vlm_classes(kind)
    except (InputError, AttributeError):
        return None


@cache
def _vlm_classes(name: str) -> ModelClasses:
    package = import_extra(f"mlx_vlm.models.{name}", "vlm")
    repair(name)
    kind = type("TextModel", (TextModel, package.Model), {"_package": package, "_family": name})
    arguments = SimpleNamespace(from_dict=lambda config: vlm_arguments(package, config))
    return ModelClasses(name, Zoo.MLX_VLM, kind, arguments)


def vlm_arguments(package: ModuleType, config: Config) -> Any:
    """The arguments of mlx-vlm's model, as `mlx_vlm.utils.load_model` makes them."""
    from mlx_vlm.utils import update_module_configs

    config = copy.deepcopy(config)  # mlx-vlm writes into it
    config.setdefault("text_config", config.pop("llm_config", {}))
    for name in ("vision_config", "audio_config"):
        config.setdefault(name, {})
    arguments = package.ModelConfig.from_dict(config)
    return update_module_configs(arguments, package, config, _MODALITIES)


class TextModel(nn.Module):
    """The language model of a model of mlx-vlm; a mixin before mlx-vlm's own class.

    Called with ids [batch, length] and caches; gives logits [batch, length, vocabulary]. Parameters
    have mlx-vlm's names, which begin with "language_model.".
    """

    _package: ModuleType
    _family: str

    def __init__(self, arguments: Any) -> None:
        super().__init__(arguments)  # type: ignore[call-arg]
        _set_aside(self, {_LANGUAGE_MODEL, _THINKER})
        if _THINKER in self:
            _set_aside(self[_THINKER], {_LANGUAGE_MODEL})
        self.eval()

    @property
    def _text(self) -> Any:
        return self.get(_THINKER, self)[_LANGUAGE_MODEL]

    def __call__(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """See the class."""
        return self.forward(ids, cache)

    def forward(
        self,
        ids: mx.array,
        cache: list[Any] | None,
        positions: mx.array | None = None,
        embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits [batch, length, vocabulary].

        Args:
            positions: in the family's layout; None: they count up.
            embeddings: of the ids, [batch, length, width]; None: the model's own.
        """
        model = self._text
        arguments = {} if embeddings is None else {"inputs_embeds": embeddings}
        if not hasattr(model, "_rope_deltas"):
            return model(ids, cache=cache, **arguments).logits
        # It keeps positions between calls, of one conversation: give them with each call.
        if positions is None:
            positions = self.text_positions(ids, cache)
        return model(ids, cache=cache, position_ids=positions, **arguments).logits

    def text_positions(
        self, ids: mx.array, cache: list[Any] | None, shift: int | mx.array = 0
    ) -> mx.array:
        """Positions of text, in the family's layout.

        Args:
            shift: added to them, of all or of each sequence.
        """
        offset = mx.array(_offset_of(cache)).reshape(-1, 1) + mx.array(shift).reshape(-1, 1)
        positions = mx.broadcast_to(mx.arange(ids.shape[1]) + offset, ids.shape)
        layout = family_of(self._family).positions
        if layout is not Positions.ONE:
            axis = 0 if layout is Positions.THREE_ROWS else -1
            positions = mx.stack([positions] * 3, axis=axis)
        return positions

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
        """mlx-vlm's choice of what to quantize; in the format that was asked for."""
        chosen = getattr(self._text, "quant_predicate", None)

        def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
            if not hasattr(module, "to_quantized"):
                return False
            settings = True if chosen is None else chosen(path, module)
            is_affine = isinstance(settings, dict) and settings.get("mode", "affine") == "affine"
            return settings if is_affine else bool(settings)

        return predicate

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return self._text.layers

    def make_cache(self) -> list[Any]:
        """A cache for each layer: mlx-lm's, where these have no other kind than mlx-lm has."""
        if not hasattr(self._text, "make_cache"):
            return [KVCache() for _ in self.layers]
        return as_mlx_lm_caches(self._text.make_cache())

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """As mlx-vlm converts a checkpoint, of which the towers' tensors are dropped."""
        if (convert := getattr(super(), "sanitize", None)) is not None:
            weights = convert(weights)
        model = self._text
        if hasattr(self._package, "LanguageModel") and hasattr(model, "sanitize"):
            weights = model.sanitize(weights)
        prefix = f"{_THINKER}.{_LANGUAGE_MODEL}." if _THINKER in self else f"{_LANGUAGE_MODEL}."
        return {
            name: array
            for name, array in weights.items()
            if name.startswith(prefix) and not is_tower_tensor(name)
        }


def prepare_engram(model: nn.Module, folder: Path) -> None:
    """Make the n-gram hashes of deepseek_v41, for which mlx-vlm reads files of the checkpoint.

    Raises:
        CheckpointError: they are missing; mlx-vlm would leave Engram out without a word.
    """
    text = model.get(_LANGUAGE_MODEL)
    if text is None or getattr(text, "layout", None) is None:
        return
    text._engram_source = str(folder)
    text._ensure_engram_hash()
    if text.engram_hash is None:
        raise CheckpointError(
            f"{folder}: expected engram_token_map.json or tokenizer.json beside the weights, for "
            f"the n-grams of Engram; download one of them"
        )


def _set_aside(module: nn.Module, kept: set[str]) -> None:
    """Leave a module only the children `kept`; the others stay attributes: `sanitize` uses them."""
    for name in set(module) - kept:
        value = module.pop(name)
        if isinstance(value, nn.Module):
            object.__setattr__(module, name, value)


def drop_image_experts(model: nn.Module) -> None:
    """Remove experts that only tokens of images choose, in place."""
    for module in model.modules():
        if _IMAGE_EXPERTS[0] in module:
            for name in _IMAGE_EXPERTS:
                module.pop(name, None)


def _offset_of(caches: list[Any] | None) -> int | mx.array:
    for layer_cache in caches or ():
        offset = getattr(layer_cache, "offset", None)
        if offset is not None:
            return offset
    return 0


def _vlm_types(module: str, *names: str) -> tuple[type[nn.Module], ...]:
    """Classes of a module of mlx-vlm, if that was imported."""
    vlm = sys.modules.get(f"mlx_vlm.models.{module}")
    return () if vlm is None else tuple(getattr(vlm, name) for name in names)


def switch_linear_types() -> tuple[type[nn.Module], ...]:
    """The classes of stacked linear layers, of both packages."""
    return (switch_layers.SwitchLinear, *_vlm_types("switch_layers", "SwitchLinear"))


def multi_linear_types() -> tuple[type[nn.Module], ...]:
    """The classes of linear layers with a matrix for each head, of both packages."""
    return (MultiLinear, *_vlm_types("mla", "MultiLinear"))


def is_vlm_stack(module: nn.Module) -> bool:
    """Whether a module is stacked experts of mlx-vlm: gate and up projections, fused or not."""
    return isinstance(module.get("down_proj"), _vlm_types("switch_layers", "SwitchLinear")) and (
        "gate_up_proj" in module or "gate_proj" in module
    )


def as_mlx_lm_experts(stack: nn.Module) -> switch_layers.SwitchGLU:
    """mlx-lm's stacked experts of the same shape, with lazy random weights."""
    down = stack.down_proj
    activation = _as_mlx_lm_activation(stack.activation)
    are_weighted = type(stack).__name__ == "DeepseekV41SwitchGLU"
    experts = WeightedExperts if are_weighted else switch_layers.SwitchGLU
    return experts(down.output_dims, down.input_dims, down.num_experts, activation, "bias" in down)


class WeightedExperts(switch_layers.SwitchGLU):
    """Stacked experts of deepseek_v41: weighted and rounded to FP8 before their output layer.

    x [..., width + 3], ids [..., k] -> [..., k, width]; the last three features add up to the
    weight.
    """

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """See the class."""
        weights = x[..., -3:].astype(mx.float32).sum(axis=-1)[..., None, None, None]
        x = mx.expand_dims(x[..., :-3], (-2, -3))
        activated = self.activation(self.up_proj(x, ids), self.gate_proj(x, ids), weights)
        return self.down_proj(activated, ids).squeeze(-2)


def _as_mlx_lm_activation(activation: nn.Module) -> nn.Module:
    """mlx-lm's class of the same function, which the kernels know; else the activation itself."""
    kind = type(activation).__name__
    if kind == "SwiGLU":
        return switch_layers.SwiGLU()
    if kind == "ClampedSwiGLU":
        return step3p5.ClampedSwiGLU(activation.limit)
    if kind == "LimitedSwiGLU" and not isinstance(activation.limit, int | float):
        raise CheckpointError(
            f"config.json: swiglu_limit: expected a number, got {activation.limit!r:.100}"
        )
    if kind == "LimitedSwiGLU" and activation.limit > 0:
        return deepseek_v41.DeepseekV41SwiGLU(activation.limit)
    if kind == "MiniMaxSwiGLUOAI" and activation.beta == 1:
        return activations.SwigluOAI(activation.alpha, activation.limit)
    return activation


def fold_expert_scales(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Multiply factors of single experts (inkling) into their matrices, lazily.

    Where the format has no room for them they scale what the matrices make.
    """
    folded = dict(weights)
    for name, factors in weights.items():
        path, _, leaf = name.rpartition(".")
        if not path.endswith(".switch_mlp") or leaf not in _EXPERT_SCALES:
            continue
        del folded[name]
        target = f"{path}.{_EXPERT_SCALES[leaf]}"
        leaves = ("scales", "biases") if f"{target}.scales" in weights else ("weight",)
        for part in (f"{target}.{leaf}" for leaf in leaves):
            matrix = folded.get(part)
            if matrix is not None and matrix.dtype == mx.uint8:
                rows = mx.repeat(factors[:, None], matrix.shape[1], axis=1)
                folded[f"{target}.{OUTPUT_SCALE}"] = rows.astype(mx.float32)
            elif matrix is not None and matrix.dtype != mx.uint32:  # words: see their scales
                folded[part] = matrix * factors.reshape(-1, 1, 1).astype(matrix.dtype)
    return folded


def split_fused_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Split the fused gate and up projections of converted stacks, lazily."""
    split = {}
    for name, array in weights.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            split[name] = array
            continue
        axis = -1 if match[2] == "bias" else -2
        for part, half in zip(("gate_proj", "up_proj"), mx.split(array, 2, axis), strict=True):
            split[f"{match[1]}.{part}.{match[2]}"] = half
    return split
