"""Tiny models and drafters that were made for them, in the published layouts.

A drafter is random, or set by hand for a model that is nearly a table of bigrams: the outputs of
the model's layers are scaled down, so that its hidden states are nearly the embeddings of their
tokens. A drafter whose attention looks at the token itself and passes on its embedding then
expects what the model expects.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from cenacle.core.model_config import text_config
from cenacle.model.config_catalog import tiny_config
from cenacle.model.synth import synth

OUTPUTS = ("o_proj", "out_proj", "down_proj", "dense")
HEADS, HEAD_DIM = 4, 16


def write_served(folder: Path, family: str = "qwen3_moe", loudness: float = 0.002) -> Path:
    """Write a model that is nearly a table of bigrams.

    Args:
        loudness: factor of the outputs of its layers.
    """
    synth(folder, config=tiny_config(family), dtype="float32", seed=3)
    file = folder / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight"):
            tensors[name] = tensor / mx.std(tensor)
        elif name.rsplit(".", 2)[-2] in OUTPUTS:
            tensors[name] = tensor * loudness
    mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
    return folder


def write_eagle3(
    folder: Path,
    served: Path,
    layers: tuple[int, ...],
    skill: str = "random",
    layout: str = "sglang",
    known: int | None = None,
    own_embedding: bool | None = None,
    **changes: object,
) -> Path:
    """Write an EAGLE-3 drafter for a model of `write_served`.

    Args:
        layers: of the model, whose outputs it reads, from 0.
        skill: "random", or "trained" as the file says.
        layout: "sglang" or "speculators".
        known: every how manieth token id the output head knows; None: all, without a map.
        own_embedding: None: as the layout has it.
        changes: of config.json.
    """
    folder.mkdir(parents=True)
    text = text_config(json.loads((served / "config.json").read_text()))
    model = mx.load(str(served / "model.safetensors"))
    width, vocab_size = text["hidden_size"], text["vocab_size"]
    head = model.get("lm_head.weight", model["model.embed_tokens.weight"])
    ids = mx.arange(0, vocab_size, known or 1)
    keys = iter(mx.random.split(mx.random.key(11), 20))

    def matrix(rows: int, columns: int) -> mx.array:
        return mx.random.normal((rows, columns), key=next(keys)) / columns**0.5

    def norm() -> mx.array:
        return 1 + 0.1 * mx.random.normal((width,), key=next(keys))

    inner = HEADS * HEAD_DIM
    tensors = {
        "fc.weight": matrix(width, len(layers) * width),
        "midlayer.self_attn.q_proj.weight": matrix(inner, 2 * width),
        "midlayer.self_attn.k_proj.weight": matrix(inner, 2 * width),
        "midlayer.self_attn.v_proj.weight": matrix(inner, 2 * width),
        "midlayer.self_attn.o_proj.weight": matrix(width, inner),
        "midlayer.mlp.gate_proj.weight": matrix(96, width),
        "midlayer.mlp.up_proj.weight": matrix(96, width),
        "midlayer.mlp.down_proj.weight": matrix(width, 96),
        "midlayer.hidden_norm.weight": norm(),
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.post_attention_layernorm.weight": norm(),
        "norm.weight": norm(),
        "lm_head.weight": head[ids],
    }
    if skill == "trained":
        assert inner == width
        embedding = mx.concatenate([mx.eye(width), mx.zeros((width, width))], axis=1)
        for name in "qk":
            tensors[f"midlayer.self_attn.{name}_proj.weight"] = 3 * embedding
        # Less what the layer adds its output to.
        passed_on = mx.concatenate([mx.eye(width), -mx.eye(width)], axis=1)
        tensors["midlayer.self_attn.v_proj.weight"] = passed_on
        tensors["midlayer.hidden_norm.weight"] = mx.ones(width)
        tensors["midlayer.self_attn.o_proj.weight"] = mx.eye(width)
        tensors["midlayer.mlp.down_proj.weight"] *= 0
        tensors["fc.weight"] *= 0
        tensors["midlayer.input_layernorm.weight"] = mx.ones(width)
        tensors["norm.weight"] = model["model.norm.weight"]
    if known is not None:
        tensors["d2t"] = (ids - mx.arange(len(ids))).astype(mx.int64)
        tensors["t2d"] = mx.arange(vocab_size) % known == 0
    config = {
        "hidden_size": width,
        "num_hidden_layers": 1,
        "intermediate_size": 96,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "model_type": "llama",
    }
    if layout == "sglang":
        config |= {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": len(ids),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers)},
        }
    else:
        tensors = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "draft_vocab_size": len(ids),
            "eagle_aux_hidden_state_layer_ids": [n + 1 for n in layers],
            "transformer_layer_config": config,
        }
    if own_embedding or (own_embedding is None and layout == "speculators"):
        tensors["embed_tokens.weight"] = model["model.embed_tokens.weight"]
    (folder / "config.json").write_text(json.dumps(config | changes))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    return folder


def write_dflash(
    folder: Path,
    served: Path,
    layers: tuple[int, ...],
    skill: str = "random",
    *,
    is_dspark: bool = False,
    inner: dict[str, object] | None = None,
    **changes: object,
) -> Path:
    """Write a DFlash drafter for a model of `write_served`, or a DSpark one.

    Args:
        layers: of the model, whose outputs it reads, from 0.
        skill: "random", or "trained": a DSpark drafter whose scores of pairs are the model's.
        inner: changes of `dflash_config`.
        changes: of config.json.
    """
    folder.mkdir(parents=True)
    text = text_config(json.loads((served / "config.json").read_text()))
    model = mx.load(str(served / "model.safetensors"))
    width, vocab_size, count, inner_width = text["hidden_size"], text["vocab_size"], 2, 64
    keys = iter(mx.random.split(mx.random.key(12), 60))

    def matrix(rows: int, columns: int) -> mx.array:
        return mx.random.normal((rows, columns), key=next(keys)) / columns**0.5

    def norm(size: int = width) -> mx.array:
        return 1 + 0.1 * mx.random.normal((size,), key=next(keys))

    tensors = {
        "fc.weight": matrix(width, len(layers) * width),
        "hidden_norm.weight": norm(),
        "norm.weight": norm(),
    }
    for layer in range(count):
        prefix = f"layers.{layer}."
        tensors |= {
            f"{prefix}self_attn.q_proj.weight": matrix(inner_width, width),
            f"{prefix}self_attn.k_proj.weight": matrix(inner_width // 2, width),
            f"{prefix}self_attn.v_proj.weight": matrix(inner_width // 2, width),
            f"{prefix}self_attn.o_proj.weight": matrix(width, inner_width),
            f"{prefix}self_attn.q_norm.weight": norm(HEAD_DIM),
            f"{prefix}self_attn.k_norm.weight": norm(HEAD_DIM),
            f"{prefix}mlp.gate_proj.weight": matrix(96, width),
            f"{prefix}mlp.up_proj.weight": matrix(96, width),
            f"{prefix}mlp.down_proj.weight": matrix(width, 96),
            f"{prefix}input_layernorm.weight": norm(),
            f"{prefix}post_attention_layernorm.weight": norm(),
        }
    embedding = model["model.embed_tokens.weight"]
    if is_dspark:
        tensors["markov_head.markov_w1.weight"] = matrix(vocab_size, width)
        tensors["markov_head.markov_w2.weight"] = matrix(vocab_size, width)
        tensors["confidence_head.proj.weight"] = matrix(1, 2 * width)
    if skill == "trained":
        tensors["norm.weight"] *= 0
        tensors["markov_head.markov_w1.weight"] = mx.fast.rms_norm(
            embedding, model["model.norm.weight"], 1e-6
        )
        tensors["markov_head.markov_w2.weight"] = model["lm_head.weight"]
    own = {"mask_token_id": vocab_size - 1, "target_layer_ids": list(layers)}
    if is_dspark:
        own |= {"projector_type": "dspark", "markov_rank": width}
    config = {
        "architectures": ["DSparkDraftModel" if is_dspark else "DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": width,
        "num_hidden_layers": count,
        "intermediate_size": 96,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "block_size": 8,
        "num_target_layers": text["num_hidden_layers"],
        "dflash_config": own | (inner or {}),
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    return folder


class OncePerOptions:
    """Drafters by the arguments of a function that writes them, each written when first asked for.

    Args:
        write: `write_eagle3` or `write_dflash`.
        root: their folders are in it.
        served, layers: arguments of `write`.
    """

    def __init__(
        self, write: Callable[..., Path], root: Path, served: Path, layers: tuple[int, ...]
    ) -> None:
        self._write, self._root, self._served, self._layers = write, root, served, layers
        self._written: dict[str, Path] = {}

    def __call__(self, **options: Any) -> Path:
        """The folder of one."""
        key = json.dumps(options, sort_keys=True)
        if key not in self._written:
            folder = self._root / str(len(self._written))
            self._written[key] = self._write(folder, self._served, self._layers, **options)
        return self._written[key]
