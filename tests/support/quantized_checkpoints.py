"""Small random checkpoints of some families, in each of the formats of `quantized_formats.py`."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cenacle.model.config_catalog import TINY_CONFIGS

from .quantized_formats import Format, Stored, write_safetensors

WIDTH, HIDDEN, EXPERTS, VOCABULARY, HEADS = 128, 192, 4, 64, 4
WEIGHTS = "model.safetensors"
Shapes = dict[str, tuple[int, int]]


def mlp(
    at: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    width: int = WIDTH,
    hidden: int = HIDDEN,
) -> Shapes:
    gate, up, down = names
    return {
        f"{at}.{gate}": (hidden, width),
        f"{at}.{up}": (hidden, width),
        f"{at}.{down}": (width, hidden),
    }


def attention(at: str, width: int = WIDTH) -> Shapes:
    return {
        **{f"{at}.{n}_proj": (width, width) for n in "qo"},
        **{f"{at}.{n}_proj": (width // 2, width) for n in "kv"},
    }


def mixtral(layer: str) -> tuple[dict, Shapes, Shapes]:
    """config.json's differences, and the shapes of quantized and other layers."""
    config = {"intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
    at = f"{layer}.block_sparse_moe"
    layers = attention(f"{layer}.self_attn")
    for e in range(EXPERTS):
        layers |= mlp(f"{at}.experts.{e}", ("w1", "w3", "w2"))
    return config, layers, {f"{at}.gate": (EXPERTS, WIDTH)}


def qwen3_moe(layer: str) -> tuple[dict, Shapes, Shapes]:
    config = {"moe_intermediate_size": HIDDEN, "num_experts": EXPERTS, "intermediate_size": HIDDEN}
    config |= {"num_experts_per_tok": 2, "mlp_only_layers": [0]}
    layers = attention(f"{layer}.self_attn")
    norms = {f"{layer}.self_attn.{n}_norm": (32,) for n in "qk"}
    if layer.endswith("0"):
        return config, layers | mlp(f"{layer}.mlp"), norms
    for e in range(EXPERTS):
        layers |= mlp(f"{layer}.mlp.experts.{e}")
    return config, layers, norms | {f"{layer}.mlp.gate": (EXPERTS, WIDTH)}


def deepseek_v3(layer: str) -> tuple[dict, Shapes, Shapes]:
    config = {"moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS}
    config |= {"intermediate_size": HIDDEN, "num_experts_per_tok": 2, "n_shared_experts": 1}
    config |= {"q_lora_rank": 64, "kv_lora_rank": 64}
    at = f"{layer}.self_attn"
    layers: Shapes = {
        f"{at}.q_a_proj": (64, WIDTH),
        f"{at}.q_b_proj": (HEADS * 96, 64),
        f"{at}.kv_a_proj_with_mqa": (96, WIDTH),
        f"{at}.kv_b_proj": (HEADS * 128, 64),
        f"{at}.o_proj": (WIDTH, HEADS * 64),
    }
    others = {f"{at}.{n}_a_layernorm": (64,) for n in ("q", "kv")}
    if layer.endswith("0"):
        return config, layers | mlp(f"{layer}.mlp"), others
    for e in range(EXPERTS):
        layers |= mlp(f"{layer}.mlp.experts.{e}")
    layers |= mlp(f"{layer}.mlp.shared_experts")
    return config, layers, others | {f"{layer}.mlp.gate": (EXPERTS, WIDTH)}


FAMILIES: dict[str, Callable[[str], tuple[dict, Shapes, Shapes]]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
}


def write_checkpoints(folder: Path, family: str, form: Format, dtype: str = "float32") -> Path:
    """A quantized checkpoint, and the same with decoded weights in the folder "dense"."""
    config = json.loads((TINY_CONFIGS / f"{family}.json").read_text())
    config |= {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    config["torch_dtype"] = dtype
    rng = np.random.default_rng(5)
    plain: dict[str, Stored] = {}
    quantized: dict[str, Stored] = {}
    decoded: dict[str, Stored] = {}

    def normal(*shape: int) -> Stored:
        return "F32", (rng.standard_normal(shape) * 0.3).astype(np.float32)

    for i in range(2):
        layer = f"model.layers.{i}"
        changes, layers, others = FAMILIES[family](layer)
        config |= changes
        for path, shape in layers.items():
            leaves, weight = form.layer(rng, *shape)
            quantized |= {f"{path}.{leaf}": stored for leaf, stored in leaves.items()}
            decoded[f"{path}.weight"] = "F32", weight
        for path, shape in others.items():
            plain[f"{path}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            plain[f"{layer}.{name}.weight"] = "F32", np.ones(WIDTH, np.float32)
        if family == "deepseek_v3" and i:
            plain[f"{layer}.mlp.gate.e_score_correction_bias"] = normal(EXPERTS)
    plain["model.embed_tokens.weight"] = normal(VOCABULARY, WIDTH)
    plain["lm_head.weight"] = normal(VOCABULARY, WIDTH)
    plain["model.norm.weight"] = "F32", np.ones(WIDTH, np.float32)
    (folder / "dense").mkdir(parents=True)
    write_safetensors(folder / "dense" / WEIGHTS, plain | decoded)
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / WEIGHTS, plain | quantized)
    if form.separate:
        settings = {"producer": {"name": "modelopt"}, "quantization": form.settings}
        (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    else:
        config["quantization_config"] = form.settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_large(
    folder: Path, form: Format, *, width: int, hidden: int, experts: int, layers: int, group: int
) -> None:
    """A mixtral of any size, all of whose experts are the same one.

    Args:
        group: of the formats whose settings say it (AWQ, GPTQ).
    """
    settings, options = form.settings, dict(form.options)
    if "group_size" in settings and "quant_method" in settings:
        settings, options = settings | {"group_size": group}, options | {"group": group}
    config = json.loads((TINY_CONFIGS / "mixtral.json").read_text())
    config |= {"hidden_size": width, "vocab_size": VOCABULARY, "num_hidden_layers": layers}
    config |= {"intermediate_size": hidden, "num_local_experts": experts}
    rng = np.random.default_rng(5)
    made: dict[tuple[int, int], dict[str, Stored]] = {}
    tensors: dict[str, Stored] = {}

    def normal(*shape: int) -> Stored:
        return "F32", (rng.standard_normal(shape) * 0.3).astype(np.float32)

    for i in range(layers):
        at = f"model.layers.{i}"
        shapes = attention(f"{at}.self_attn", width)
        for e in range(experts):
            path = f"{at}.block_sparse_moe.experts.{e}"
            shapes |= mlp(path, ("w1", "w3", "w2"), width, hidden)
        for path, shape in shapes.items():
            leaves = made.setdefault(shape, {}) or form.write(rng, *shape, **options)
            made[shape] = leaves
            tensors |= {f"{path}.{leaf}": stored for leaf, stored in leaves.items()}
        tensors[f"{at}.block_sparse_moe.gate.weight"] = normal(experts, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = "F32", np.ones(width, np.float32)
    tensors["model.embed_tokens.weight"] = normal(VOCABULARY, width)
    tensors["lm_head.weight"] = normal(VOCABULARY, width)
    tensors["model.norm.weight"] = "F32", np.ones(width, np.float32)
    folder.mkdir(parents=True)
    write_safetensors(folder / WEIGHTS, tensors)
    if form.separate:
        separate = {"producer": {"name": "modelopt"}, "quantization": settings}
        (folder / "hf_quant_config.json").write_text(json.dumps(separate))
    else:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
