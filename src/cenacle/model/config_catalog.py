"""Configs of models: a tiny one of every family, and a catalog of full-size models.

Owns: the files in `configs/`, and cutting a config to its first layers.
Does not know: weights, plans.
Next: `synth.py`, which writes checkpoints of these configs.
"""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..core.model_config import LAYER_COUNT_KEYS, Config, get_int, text_config
from ..errors import InputError

CONFIGS = Path(__file__).parent / "configs"
TINY_CONFIGS = CONFIGS / "tiny"
TOWER_CONFIGS = CONFIGS / "images"

# Keys of config.json, at any depth, that change when a model is reduced to its first layers: one
# entry per layer, ids of layers, ids that count from 1, periods with full attention in the last.
_PER_LAYER = (
    "compress_ratios",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "indexer_types",
    "is_moe_layer",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "moe_intermediate_size",
    "moe_layer_freq",
    "moe_topk",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_shared_expert",
    "partial_rotary_factors",
    "rope_theta",
    "sparse_attention_freq",
    "swiglu_limits",
    "swiglu_limits_shared",
)
_LAYER_IDS = (
    "engram_layer_ids",
    "full_attn_idxs",
    "index_source_layer_ids",
    "kv_source_layer_ids",
    "mlp_only_layers",
    "moe_layers",
)
_LAYER_IDS_FROM_1 = ("full_attn_layers", "kda_layers", "ple_layer_ids")
_PERIODS = ("full_attention_interval", "layer_group_size")


@dataclass(frozen=True)
class CatalogEntry:
    """A model of the catalog.

    Args:
        config: config.json as on the hub, without what mlx-lm does not read.
        source: where the shape comes from.
        confidence: A (read in the authors' or vendor's files) to E (derived), as in docs.
        parameters: number of weights that the source states, to compare with; None: not stated.
    """

    config: Config
    source: str
    confidence: str
    parameters: float | None = None


def family_names() -> list[str]:
    """Names of the tiny configs: the module names of all MoE families."""
    return sorted(p.stem for p in TINY_CONFIGS.glob("*.json"))


@cache
def model_catalog() -> dict[str, CatalogEntry]:
    """The full-size models by name."""
    raw = json.loads((CONFIGS / "models.json").read_text())
    return {name: CatalogEntry(**entry) for name, entry in raw.items()}


def tiny_config(family: str) -> Config:
    """A small config of a family, with the family's peculiarities switched on.

    Raises:
        InputError: there is no such family; names the nearest.
    """
    path = TINY_CONFIGS / f"{family}.json"
    if family not in family_names():
        raise _unknown_name_error("family", family, family_names())
    return json.loads(path.read_text())


def with_tower(config: Config, family: str) -> Config:
    """A tiny config of a family, and what sees images beside it.

    Raises:
        InputError: no such tower is known.
    """
    known = sorted(p.stem for p in TOWER_CONFIGS.glob("*.json"))
    if family not in known:
        reason = f"expected one of {', '.join(known)}, got {family!r}"
        raise InputError(f"images: no vision tower of this family is known: {reason}", "images")
    tower = json.loads((TOWER_CONFIGS / f"{family}.json").read_text())
    text = {**text_config(config), **tower.pop("text_config", {})}
    return {**config, **tower, "text_config": text}


def full_config(name: str, field: str = "name") -> Config:
    """The config of a model of the catalog; errors name the field.

    Raises:
        InputError: the catalog has no such model; names the nearest.
    """
    if name not in model_catalog():
        raise _unknown_name_error(field, name, sorted(model_catalog()))
    return copy.deepcopy(model_catalog()[name].config)


def _unknown_name_error(field: str, name: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0)
    return InputError(f"{field}: unknown {name!r}; nearest: {', '.join(near)}", field)


def layer_count(config: Config) -> int:
    """Number of layers that a config states.

    Raises:
        InputError: it states none.
    """
    text = text_config(config)
    layers = get_int(text, LAYER_COUNT_KEYS)
    if layers is not None:
        return layers
    for key in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
        if key in text:
            return len(text[key])
    raise InputError(f"config: expected one of {', '.join(LAYER_COUNT_KEYS)}, got none", "config")


def first_layers(config: Config, layers: int) -> Config:
    """The config of the model's first `layers` layers.

    Raises:
        InputError: more layers than there are, or too few for mlx-lm to run the family.
    """
    total = layer_count(config)
    if not 1 <= layers <= total:
        raise InputError(f"layers: expected 1 to {total}, got {layers}", "layers")
    text = text_config(config)
    minimum = _min_layers(text)
    if layers < min(minimum, total):
        raise InputError(
            f"layers: expected at least {minimum}, got {layers}: mlx-lm needs the first "
            f"full-attention layer of this family, number {minimum}",
            "layers",
        )

    def cut(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {k: cut(v, k) for k, v in node.items()}
        if key in LAYER_COUNT_KEYS and node == total:
            return layers
        if isinstance(node, list | str) and key in _PER_LAYER:
            return node[:layers]
        if isinstance(node, list) and key in _LAYER_IDS:
            return [i for i in node if i < layers]
        if isinstance(node, list) and key in _LAYER_IDS_FROM_1:
            return [i for i in node if i <= layers]
        if key == "moe_layers_enum" and isinstance(node, str):
            return ",".join(i for i in node.split(",") if int(i) < layers)
        if key in ("moe_layer_end_index", "candidate_source_layer_id") and isinstance(node, int):
            return min(node, layers - 1)
        if key == "num_kv_shared_layers" and isinstance(node, int):
            return max(0, layers - (total - node))
        return node

    return cut(config)


def _min_layers(text: Config) -> int:
    """Layers up to the first one with full attention, where mlx-lm sizes its masks by that one."""
    if text.get("model_type") == "llama4_text":
        return 4
    candidates = [text[key] for key in _PERIODS if isinstance(text.get(key), int)]
    candidates += text.get("linear_attn_config", {}).get("full_attn_layers", [])[:1]
    candidates += (
        [text["hybrid_override_pattern"].index("*") + 1]
        if "*" in (text.get("hybrid_override_pattern") or "")
        else []
    )
    return max(candidates, default=1)
