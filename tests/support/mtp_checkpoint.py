"""Tiny checkpoints with a layer for multi-token prediction, in the published forms.

The layer is random, or set by hand for a model that is nearly a table of bigrams: its layers'
outputs are scaled down, so that hidden states are nearly the embeddings of their tokens. A layer
that passes on the embedding of the token it reads then expects what the model expects.
"""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from cenacle.core.model_config import text_config
from cenacle.model.config_catalog import tiny_config
from cenacle.model.mtp import FORMS
from cenacle.model.synth import synth
from cenacle.model.zoo_drafters import ZOO_DRAFTERS

OUTPUTS = ("o_proj", "out_proj", "down_proj", "dense", "fc2", "fc2_latent_proj", "wo_b")
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "embeddings.weight")
EMBEDDING_PATHS = ("fc_embedding.weight", "e_proj.weight")  # where two projections join inputs
HIDDEN_PATHS = ("fc_hidden.weight", "h_proj.weight")
PLE_OUTPUTS = ("ple.value_proj.weight", "ple.conv1d.weight")  # of qwen4_exp
LOW_NORMS = (
    "layernorm",
    "q_norm",
    "k_norm",
    "language_model.norm",
    "norm_embedding",
    "norm_hidden",
)


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
    if FORMS[family].is_zoo:
        return _write_zoo(folder, family, skill, loudness)
    config = tiny_config(family)
    text = text_config(config)
    layers = layers or text["num_hidden_layers"]
    is_qwen, is_nemotron = family.startswith("qwen"), family == "nemotron_h"
    # Of Qwen's layers every second is the kind that drafts; of Nemotron's two are one.
    taller = {**text, "num_hidden_layers": layers + (2 if is_qwen or is_nemotron else 1)}
    if is_nemotron:
        taller["hybrid_override_pattern"] += "*E"
    taller.pop("layer_types", None)
    nested = config if text is config else {**config, "text_config": taller}
    synth(folder, config=taller if text is config else nested, dtype="float32", seed=3)
    file = folder / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    add = _add_qwen_layer if is_qwen else _add_deepseek_layer
    add = _add_nemotron_layer if is_nemotron else add
    prefix = add(tensors, text["hidden_size"], layers, FORMS[family].text_path, skill)
    if skill == "trained":
        _train(tensors, prefix, loudness)
    (folder / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
    written = json.loads((folder / "config.json").read_text())
    text_config(written).update({"num_hidden_layers": layers, "num_nextn_predict_layers": 1})
    if is_nemotron:
        written["hybrid_override_pattern"] = config["hybrid_override_pattern"]
        written["mtp_hybrid_override_pattern"] = "*E"
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def _train(tensors: dict[str, mx.array], prefix: str, loudness: float) -> None:
    for name, tensor in tensors.items():
        if name.endswith(EMBEDDINGS):
            tensors[name] = tensor / mx.std(tensor)
        elif name.rsplit(".", 2)[-2] in OUTPUTS or name.endswith(PLE_OUTPUTS):
            tensors[name] = tensor * (0 if name.startswith(prefix) else loudness)


def _write_zoo(folder: Path, family: str, skill: str, loudness: float) -> Path:
    """With the layer of mlx-vlm's drafter, in the names of published files."""
    from mlx_vlm.speculative.drafters.mtp_split import get_mtp_splitter

    synth(folder, config=tiny_config(family), dtype="float32", seed=3)
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    text_config(config)["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").unlink()
    prefix = FORMS[family].list_prefixes(config)[0]
    splitter = get_mtp_splitter(source_config=config)
    kind = splitter.draft_model_cls
    arguments = kind.__init__.__annotations__["config"]
    text = splitter.read_text_config(config) | ZOO_DRAFTERS[family].settings
    drafter = kind(arguments.from_dict({"text_config": text}))
    tensors = dict(mx.load(str(file)))
    keys = iter(mx.random.split(mx.random.key(4), 999))
    for path, array in tree_flatten(drafter.parameters()):
        if path == "norm.weight" and ZOO_DRAFTERS[family].has_models_norm:
            continue
        name = prefix + ZOO_DRAFTERS[family].name_in_files(path)
        noise = mx.random.normal(array.shape, key=next(keys))
        if array.ndim == 1:  # a norm or a bias
            tensors[name] = array + 0.1 * noise * (skill == "random")
        elif path == "eh_proj.weight":
            tensors[name] = _joining_weight(array.shape[0], skill)
        elif path.endswith("input_proj.weight"):  # the other way round
            tensors[name] = mx.roll(_joining_weight(array.shape[0], skill), array.shape[0], axis=1)
        elif path in EMBEDDING_PATHS + HIDDEN_PATHS and skill == "trained":
            tensors[name] = mx.eye(array.shape[0]) * (path in EMBEDDING_PATHS)
        else:
            tensors[name] = noise / array.shape[-1] ** 0.5
    if skill == "trained":
        _train(tensors, prefix, loudness)
        last = ZOO_DRAFTERS[family].streams or "none"  # what mixes streams for the output head
        for name in [name for name in tensors if f".model.{last}." in name]:
            path = ZOO_DRAFTERS[family].name_in_files(name.partition(".model.")[2])
            tensors[prefix + path] = tensors[name]
    mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
    return folder


def _joining_weight(width: int, skill: str) -> mx.array:
    if skill == "trained":
        return mx.concatenate([mx.eye(width), mx.zeros((width, width))], axis=1)
    key = mx.random.split(mx.random.key(4), 2)[0]
    return mx.random.normal((width, 2 * width), key=key) / width**0.5


def _add_deepseek_layer(
    tensors: dict[str, mx.array], width: int, layers: int, text_path: str, skill: str
) -> str:
    prefix, embedding = f"{text_path}model.layers.{layers}.", "embed_tokens"
    if "model.word_embeddings.weight" in tensors:  # Ling's names
        embedding = "word_embeddings"
        tensors[f"{prefix}final_layernorm.weight"] = tensors["model.norm.weight"]
    else:
        tensors[f"{prefix}shared_head.norm.weight"] = tensors["model.norm.weight"]
        tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"]
    tensors |= {
        f"{prefix}eh_proj.weight": _joining_weight(width, skill),
        f"{prefix}enorm.weight": mx.ones(width),
        f"{prefix}hnorm.weight": mx.ones(width),
        f"{prefix}{embedding}.weight": tensors[f"model.{embedding}.weight"],
    }
    return prefix


def _add_qwen_layer(
    tensors: dict[str, mx.array], width: int, layers: int, text_path: str, skill: str
) -> str:
    surplus, last = (f"{text_path}model.layers.{layers + i}." for i in range(2))
    for name in list(tensors):
        if name.startswith((surplus, last)):
            tensor = tensors.pop(name)
            if name.startswith(last):
                tensors[name.replace(last, "mtp.layers.0.")] = tensor
    tensors |= {
        "mtp.fc.weight": _joining_weight(width, skill),
        "mtp.pre_fc_norm_embedding.weight": mx.ones(width),
        "mtp.pre_fc_norm_hidden.weight": mx.ones(width),
        "mtp.norm.weight": tensors[f"{text_path}model.norm.weight"],
    }
    return "mtp."


def _add_nemotron_layer(
    tensors: dict[str, mx.array], width: int, layers: int, text_path: str, skill: str
) -> str:
    for name in list(tensors):
        for index in range(2):
            if name.startswith(surplus := f"{text_path}backbone.layers.{layers + index}."):
                tensors[name.replace(surplus, f"mtp.layers.{index}.")] = tensors.pop(name)
    tensors |= {
        "mtp.layers.0.eh_proj.weight": _joining_weight(width, skill),
        "mtp.layers.0.enorm.weight": mx.ones(width),
        "mtp.layers.0.hnorm.weight": mx.ones(width),
        "mtp.layers.1.final_layernorm.weight": tensors[f"{text_path}backbone.norm_f.weight"],
    }
    return "mtp."


def publish_qwen(folder: Path, *, single: bool = False) -> Path:
    """Change a checkpoint of Qwen, as `write_mtp` writes it, to the layout that Qwen publishes:
    norms less 1, single or fused experts, other names.

    Args:
        single: experts are single in any case.
    """
    file = folder / "model.safetensors"
    tensors, published = mx.load(str(file)), {}
    is_fused = not single and any(name.startswith("language_model.") for name in tensors)
    for old, tensor in tensors.items():
        name = old.replace("language_model.model.", "model.language_model.")
        name = name.removeprefix("language_model.")
        path = name.removesuffix(".weight")
        if path.endswith("conv1d"):
            published[name] = tensor.moveaxis(2, 1)
        elif path.endswith(LOW_NORMS) or path in ("mtp.norm", "model.norm"):
            published[name] = tensor - 1
        elif "switch_mlp" not in path:
            published[name] = tensor
        elif not is_fused:
            single = path.replace("switch_mlp.", "experts.{}.") + ".weight"
            published |= {single.format(e): part for e, part in enumerate(tensor)}
        elif path.endswith("gate_proj"):
            up = tensors[old.replace("gate_proj", "up_proj")]
            fused = path.replace("switch_mlp.gate_proj", "experts.gate_up_proj")
            published[fused] = mx.concatenate([tensor, up], axis=1)
        elif path.endswith("down_proj"):
            published[path.replace("switch_mlp", "experts")] = tensor
    mx.save_safetensors(str(file), published, metadata={"format": "pt"})
    return folder
