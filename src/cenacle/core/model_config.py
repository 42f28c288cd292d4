"""Numbers of a model's config.json, under whatever names its family gives them.

Owns: the keys under which families state the same number, and finding it.
Does not know: mlx-lm, what a number is used for.
Next: `model/architecture.py` adds the keys that mlx-lm needs; `planning/model_shapes.py` counts
parameters.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]
"""A config.json."""

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
HIDDEN_SIZE_KEYS = ("hidden_size", "d_model", "n_embd", "model_dim")
VOCAB_SIZE_KEYS = ("vocab_size", "num_vocab")
HEAD_COUNT_KEYS = ("num_attention_heads", "n_heads", "num_heads", "n_head")
KV_HEAD_COUNT_KEYS = ("num_key_value_heads", "kv_n_heads", "num_attention_groups")
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)
CONTEXT_LENGTH_KEYS = (
    "max_position_embeddings",
    "max_seq_len",
    "max_sequence_length",
    "model_max_length",
    "n_positions",
    "seq_length",
)


def text_config(config: Config) -> Config:
    """The part of a config that describes the language model."""
    thinker = config.get("thinker_config")  # beside a model that speaks
    nested = (thinker if isinstance(thinker, dict) else config).get("text_config")
    return nested if isinstance(nested, dict) else config


def get_int(config: Config, keys: tuple[str, ...], largest: bool = False) -> int | None:
    """The first of `keys` that is an integer at the top level of a config.

    Args:
        largest: of a list of integers, such as one per layer, take the largest; else a list counts
            only if its entries are equal.
    """
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value:
            if largest:
                value = max((v for v in value if isinstance(v, int)), default=None)
            elif len(set(map(str, value))) == 1:
                value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def find_int(config: Config, keys: tuple[str, ...]) -> int | None:
    """`get_int` of the config or, breadth first, of the configs nested in it."""
    levels = [config]
    while levels:
        level = levels.pop(0)
        value = get_int(level, keys)
        if value is not None:
            return value
        levels += [v for v in level.values() if isinstance(v, dict)]
    return None


def kv_cache_elements_per_token(config: Config, layers: int) -> int:
    """How many elements a KV cache keeps per token, all layers together.

    Exact for grouped-query and latent attention. Too high where layers keep no cache (linear
    attention, state-space layers) or only a window; too low for mlx-lm's deepseek_v2, which
    expands its latents.
    """
    latent = find_int(config, ("kv_lora_rank",))
    if latent is not None:
        return layers * (latent + (find_int(config, ("qk_rope_head_dim",)) or 0))
    heads = find_int(config, HEAD_COUNT_KEYS) or 1
    kv_heads = find_int(config, KV_HEAD_COUNT_KEYS) or heads
    width = find_int(config, HIDDEN_SIZE_KEYS) or 0
    return layers * 2 * kv_heads * (find_int(config, ("head_dim",)) or width // heads)
