"""Tiny checkpoints with a layer for multi-token prediction, in the published form.

The layer is random, or set by hand for a model that is nearly a table of bigrams: its layers'
outputs are scaled down, so that hidden states are nearly the embeddings of their tokens. A layer
that passes on the embedding of the token it reads then expects what the model expects.
"""

import json
from pathlib import Path

import mlx.core as mx

from cenacle.model.config_catalog import tiny_config
from cenacle.model.synth import synth

OUTPUTS = ("o_proj", "down_proj")


def write_mtp(
    folder: Path,
    family: str,
    skill: str = "random",
    loudness: float = 0.001,
    layers: int | None = None,
) -> Path:
    """Write a checkpoint.

    Args:
        skill: of the layer: "random", or "trained" as the file says.
        loudness: factor of the outputs of the served model's layers; not of a random layer's model.
        layers: of the served model; None: as many as the family's tiny config has.
    """
    config = tiny_config(family)
    layers = layers or config["num_hidden_layers"]
    synth(folder, config={**config, "num_hidden_layers": layers + 1}, dtype="float32", seed=3)
    file = folder / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    width, prefix = config["hidden_size"], f"model.layers.{layers}."
    keys = mx.random.split(mx.random.key(4), 2)
    tensors |= {
        f"{prefix}eh_proj.weight": mx.random.normal((width, 2 * width), key=keys[0]) / width**0.5,
        f"{prefix}enorm.weight": mx.ones(width),
        f"{prefix}hnorm.weight": mx.ones(width),
        f"{prefix}shared_head.norm.weight": tensors["model.norm.weight"],
        f"{prefix}shared_head.head.weight": tensors["lm_head.weight"],
        f"{prefix}embed_tokens.weight": tensors["model.embed_tokens.weight"],
    }
    if skill == "trained":
        eye = mx.eye(width)
        tensors[f"{prefix}eh_proj.weight"] = mx.concatenate([eye, mx.zeros_like(eye)], axis=1)
        for name in ("model.embed_tokens.weight", f"{prefix}embed_tokens.weight"):
            tensors[name] = tensors[name] / mx.std(tensors[name])
        for name, tensor in tensors.items():
            if name.rsplit(".", 2)[-2] in OUTPUTS:
                tensors[name] = tensor * (0 if name.startswith(prefix) else loudness)
    (folder / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
    written = json.loads((folder / "config.json").read_text())
    written |= {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(written))
    return folder
