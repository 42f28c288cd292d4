"""A family's checkpoint as its makers publish it, made from the names that mlx-vlm gives it.

One function for each family, the inverse of mlx-vlm's `sanitize`: floats, with the published names
and the published fusions. A test checks that mlx-vlm itself reads them as the same model.
"""

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from support.quantized_formats import (
    FORMATS,
    Stored,
    bfloat16,
    e4m3,
    floats,
    read_nvfp4,
    write_safetensors,
)

Encoded = tuple[dict[str, Stored], np.ndarray]
"""The tensors of a layer, and its weights."""
Tensors = dict[str, mx.array]
Named = Iterator[tuple[str, mx.array]]
_MISTRAL_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate.": "gate.",
    "mlp.experts": "experts",
    "mlp.shared_experts": "shared_experts",
    "mlp.": "feed_forward.",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.": "",
}
_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def split_experts(tensors: Tensors, names: dict[str, str] | None = None) -> Named:
    """Stacked experts one by one."""
    for name, array in tensors.items():
        path, found, rest = name.rpartition(".switch_mlp.")
        if not found or array.ndim != 3:
            yield name, array
            continue
        projection = rest.removesuffix(".weight")
        parts = {projection: array}
        if projection == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), mx.split(array, 2, axis=1), strict=True))
        for part, stack in parts.items():
            for expert, matrix in enumerate(stack):
                published = (names or {}).get(part, part)
                yield f"{path}.experts.{expert}.{published}.weight", matrix


def join_absorbed(tensors: Tensors) -> Tensors:
    """MLA's kv_b_proj instead of the two matrices that it is split into."""
    joined = dict(tensors)
    for name in tensors:
        if name.endswith(".embed_q.weight"):
            path = name.removesuffix(".embed_q.weight")
            keys, values = joined.pop(name).swapaxes(1, 2), joined.pop(f"{path}.unembed_out.weight")
            whole = mx.concatenate([keys, values], axis=1)
            joined[f"{path}.kv_b_proj.weight"] = whole.reshape(-1, whole.shape[-1])
    return joined


def split_rows(tensors: Tensors, fused: str, parts: dict[str, int]) -> Tensors:
    """Rows of a fused matrix as several; `parts`: shares of its rows, or rows if below zero."""
    split: Tensors = {}
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        if not path.endswith(f".{fused}"):
            split[name] = array
            continue
        fixed = sum(-n for n in parts.values() if n < 0)
        unit = (array.shape[0] - fixed) // max(1, sum(n for n in parts.values() if n > 0))
        begin = 0
        for part, share in parts.items():
            rows = -share if share < 0 else share * unit
            split[f"{path.removesuffix(fused)}{part}.{leaf}"] = array[begin : begin + rows]
            begin += rows
    return split


def bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("language_model."): array for name, array in tensors.items()}


def nested(tensors: Tensors) -> Tensors:
    return {
        re.sub("^language_model.model.", "model.language_model.", n).replace(
            "language_model.lm_head", "lm_head"
        ): a
        for n, a in tensors.items()
    }


def deepseek_v4(tensors: Tensors) -> Named:
    names = (
        (r"^model\.(?=layers|norm)", ""),
        (r"^model\.embed_tokens", "embed"),
        (r"^model\.hc_head\.", "hc_head_"),
        ("^lm_head", "head"),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"gate\.e_score_correction_bias", "gate.bias"),
    )
    for name, array in split_experts(bare(tensors), _W):
        for old, new in names:
            name = re.sub(old, new, name)
        if ".shared_experts." in name:
            head, projection, leaf = name.rsplit(".", 2)
            name = f"{head}.{_W[projection]}.{leaf}"
        yield name, array.reshape(-1, array.shape[-1]) if ".wo_a." in name else array


def deepseek_v41(tensors: Tensors) -> Named:
    for name, array in split_experts(bare(tensors), _W):
        name = re.sub("^embed_tokens", "embed", name)
        if ".shared_experts." in name:
            head, projection, leaf = name.rsplit(".", 2)
            name = f"{head}.{_W[projection]}.{leaf}"
        yield name, array.reshape(-1, array.shape[-1]) if ".wo_a." in name else array


def qwen4_exp(tensors: Tensors) -> Named:
    tensors = nested(tensors)
    for name, array in tensors.items():
        name = re.sub(r"shards\.(\d+)", r"shard_\1", name)
        if name.endswith("switch_mlp.gate_proj.weight"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            name = name.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj")
            array = mx.concatenate([array, up], axis=1)
        elif name.endswith("switch_mlp.up_proj.weight"):
            continue
        elif name.endswith("switch_mlp.down_proj.weight"):
            name = name.replace("switch_mlp.down_proj.weight", "experts.down_proj")
        yield name, array.moveaxis(2, 1) if "conv1d" in name else array


def glm5_next(tensors: Tensors) -> Named:
    tensors = join_absorbed(nested(tensors))
    halves = {"gate_proj": 1, "up_proj": 1}
    tensors = split_rows(tensors, "mlp.gate_up_proj", {f"mlp.{n}": 1 for n in halves})
    tensors = split_rows(
        tensors, "shared_experts.gate_up_proj", {f"shared_experts.{n}": 1 for n in halves}
    )
    tensors = split_rows(tensors, "qkv_proj", dict.fromkeys(("q_proj", "k_proj", "v_proj"), 1))
    tensors = split_rows(tensors, "qkv_conv.conv", {f"{c}_conv1d": 1 for c in "qkv"})
    tensors = split_rows(tensors, "fbg_a_proj", {"f_a_proj": 1, "b_proj": -2, "g_a_proj": 1})
    tensors = split_rows(tensors, "qkv_a_proj", {"q_a_proj": 1, "kv_a_proj_with_mqa": 1})
    for name, array in split_experts(tensors):
        name = re.sub(r"\.(attn|ffn)_hc\.", r".hc_\1_", name)
        yield name, array.moveaxis(2, 1) if "conv1d" in name else array


def mimo_v2(tensors: Tensors) -> Named:
    tensors = dict(split_experts(bare(tensors)))
    for name, array in tensors.items():
        if name.endswith(".q_proj.weight"):
            others = [tensors[name.replace("q_proj", n)] for n in ("k_proj", "v_proj")]
            yield name.replace("q_proj", "qkv_proj"), mx.concatenate([array, *others])
        elif not name.endswith((".k_proj.weight", ".v_proj.weight")):
            yield name, array


def step3p7(tensors: Tensors) -> Named:
    for name, array in nested(tensors).items():
        name = name.replace(".mlp.switch_mlp.", ".moe.").replace(".mlp.gate.gate.", ".moe.gate.")
        name = name.replace(".mlp.gate.router_bias", ".moe.router_bias")
        name = name.replace(".mlp.share_expert.", ".share_expert.")
        yield name, array - 1 if "norm" in name else array


def mistral_large3(tensors: Tensors) -> Named:
    for name, array in split_experts(join_absorbed(bare(tensors))):
        if "e_score_correction_bias" in name:
            continue  # not published
        for old, new in _MISTRAL_NAMES.items():
            name = name.replace(old, new, 1)
        for old, new in _W.items():
            name = name.replace(f".{old}.", f".{new}.")
        yield name, array


def minimax_m3(tensors: Tensors) -> Named:
    for name, array in split_experts(bare(tensors), _W):
        if ".experts.8." not in name:
            yield name, array
            continue
        for old, new in _W.items():
            name = name.replace(f".experts.8.{new}.", f".shared_experts.{old}.")
        yield name, array


def longcat_flash_sparse(tensors: Tensors) -> Named:
    for name, array in split_experts(join_absorbed(bare(tensors))):
        if name.endswith("ngram_embeddings.post_proj.weight"):
            for part, columns in enumerate(mx.split(array, 2, axis=1)):
                yield f"model.oe_embed_proj{part}.weight", columns
            continue
        name = name.replace("ngram_embeddings.word_embeddings", "embed_tokens")
        yield re.sub(r"ngram_embeddings\.embedders\.(\d+)", r"oe_embed_tokens\1", name), array


def hy_v4(tensors: Tensors) -> Named:
    """Floats one by one; MXFP8 is published in stacks, see `hy_v4_stacks`."""
    return split_experts(bare(tensors))


def hy_v4_stacks(tensors: Tensors) -> Named:
    for name, array in join_absorbed(bare(tensors)).items():
        yield re.sub(r"switch_mlp\.(\w+)\.weight", r"experts.\1", name), array


def inkling(tensors: Tensors) -> Named:
    attention = {"q": "wq_du", "k": "wk_dv", "v": "wv_dv", "r": "wr_du"}
    tensors = bare(tensors)
    names = (
        (r"^model\.", "model.llm."),
        (r"embed_tokens", "embed"),
        (r"^lm_head", "model.llm.unembed"),
        (r"\.self_attn\.(\w+_norm|rel_proj|\w_sconv)", r".attn.\1"),
        (r"\.self_attn\.o_proj", ".attn.wo_ud"),
        (r"\.rel_proj", ".rel_logits_proj.weight"),
        (r"_sconv\.conv\.", "_sconv."),
        (r"input_layernorm", "attn_norm"),
        (r"post_attention_layernorm", "mlp_norm"),
        (r"mlp\.gate_weight", "mlp.gate.weight"),
        (r"mlp\.e_score_correction_bias", "mlp.gate.bias"),
        (r"mlp\.global_scale", "mlp.gate.global_scale"),
        (r"\.mlp\.down_proj", ".mlp.w2_md"),
        (r"switch_mlp\.down_proj\.weight", "experts.w2_weight"),
    )

    def woven(gate: mx.array, up: mx.array) -> mx.array:
        both = mx.stack([gate, up], axis=-2)
        return both.reshape(*gate.shape[:-2], -1, gate.shape[-1])

    for name, array in tensors.items():
        up = tensors.get(name.replace("gate_proj", "up_proj"))
        if name.endswith((".up_proj.weight", "switch_mlp.gate_scale", "switch_mlp.out_scale")):
            continue
        if name.endswith(".gate_proj.weight"):
            if ".shared_experts." in name:
                gate, other = (a.reshape(2, -1, a.shape[-1]) for a in (array, up))
                name, array = (
                    name.replace("gate_proj.weight", "shared_w13_weight"),
                    woven(gate, other),
                )
            elif ".switch_mlp." in name:
                name = name.replace("switch_mlp.gate_proj.weight", "experts.w13_weight")
                array = woven(array, up)
            else:
                name, array = name.replace("gate_proj", "w13_dn"), woven(array, up)
        elif name.endswith("shared_experts.down_proj.weight"):
            array = array.reshape(array.shape[0], 2, -1).transpose(1, 0, 2)
            name = name.replace("down_proj.weight", "shared_w2_weight")
        elif name.endswith("qkvr_proj.weight"):
            rows = array.shape[0]
            sizes = {"q": 128, "k": 64, "v": 64, "r": rows - 256}
            begin = 0
            for part, size in sizes.items():
                path = name.replace("self_attn.qkvr_proj", f"attn.{attention[part]}")
                yield path.replace("model.", "model.llm.", 1), array[begin : begin + size]
                begin += size
            continue
        for old, new in names:
            name = re.sub(old, new, name)
        yield name, array.transpose(0, 2, 1) if array.ndim == 3 and "sconv" in name else array


def single_experts(prefix: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Named]:
    return lambda tensors: split_experts(join_absorbed(prefix(tensors)))


LAYOUTS: dict[str, Callable[[Tensors], Named]] = {
    "cohere2_moe": single_experts(bare),
    "deepseek_v4": deepseek_v4,
    "deepseek_v41": deepseek_v41,
    "glm4v_moe": single_experts(nested),
    "glm5_next": glm5_next,
    "hy_v4": hy_v4,
    "inkling": inkling,
    "longcat_flash_sparse": longcat_flash_sparse,
    "mimo_v2": mimo_v2,
    "minimax_m3": minimax_m3,
    "mistral_large3": mistral_large3,
    "qwen3_omni_moe": lambda tensors: (
        (name.replace("thinker.language_model.", "thinker."), array)
        for name, array in split_experts(tensors)
    ),
    "qwen4_exp": qwen4_exp,
    "step3p7": step3p7,
}


def publish(source: Path, target: Path, layout: Callable[[Tensors], Named]) -> Path:
    """Write a converted checkpoint of floats in the published layout."""
    shutil.copytree(source, target)
    (target / "model.safetensors.index.json").unlink()
    tensors = dict(layout(mx.load(str(target / "model.safetensors"))))
    mx.save_safetensors(str(target / "model.safetensors"), tensors)
    return target


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def publish_quantized(
    folder: Path, layer: Callable[[str, tuple[int, ...]], Encoded | None]
) -> None:
    """Quantize a published checkpoint of floats in place; the same decoded goes to "dense".

    Args:
        layer: (name, shape of a matrix) -> published tensors and what they mean, or None: it stays.
    """
    plain: dict[str, Stored] = {}
    quantized: dict[str, Stored] = {}
    decoded: dict[str, Stored] = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        values = np.array(array)
        made = layer(name, values.shape)
        if made is None:
            kind = {"float32": "F32", "int64": "I64", "int32": "I32"}[str(values.dtype)]
            plain[name] = kind, values
        else:
            quantized |= made[0]
            decoded[name] = "F32", made[1]
    (folder / "dense").mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(folder / file, folder / "dense")
    dense = dict(convert_hy_v4(plain | decoded) if layer is hy_v4_formats else plain | decoded)
    write_safetensors(folder / "dense" / "model.safetensors", dense)
    write_safetensors(folder / "model.safetensors", plain | quantized)


def convert_hy_v4(tensors: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
    """mlx-vlm's own names: it takes no floats in stacks."""
    for name, (kind, array) in tensors.items():
        name = f"language_model.{name}"
        if name.endswith("kv_b_proj.weight"):
            path = name.removesuffix("kv_b_proj.weight")
            keys, values = np.split(array.reshape(4, 128, -1), 2, axis=1)
            yield f"{path}embed_q.weight", (kind, np.ascontiguousarray(keys.swapaxes(1, 2)))
            yield f"{path}unembed_out.weight", (kind, values)
        else:
            name = re.sub(r"experts\.(gate_up_proj|down_proj)$", r"switch_mlp.\1.weight", name)
            yield name, (kind, array)


def encode(name: str, shape: tuple[int, ...], kind: str, leaves: dict[str, str]) -> Encoded:
    """A random matrix, or a stack of such, in one of FORMATS.

    Args:
        leaves: the format's names of tensors, and the published ones.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    made = [FORMATS[kind].layer(rng, *shape[-2:]) for _ in range(math.prod(shape[:-2]))]
    published = {}
    for leaf, new in leaves.items():
        array = np.stack([stored[leaf][1] for stored, _ in made]).reshape(
            *shape[:-2], *made[0][0][leaf][1].shape
        )
        published[new] = made[0][0][leaf][0], array
    return published, np.stack([weight for _, weight in made]).reshape(shape)


def deepseek_v4_formats(name: str, shape: tuple[int, ...]) -> Encoded | None:
    """Experts in FP4 with a scale for 32 weights, other layers in FP8 with one for 128 x 128."""
    path = name.removesuffix(".weight")
    if ".experts." in name:
        leaves = {"weight_packed": name, "weight_scale": f"{path}.scale"}
        made, weight = encode(name, shape, "mxfp4", leaves)
        return {
            name: ("I8", made[name][1]),
            f"{path}.scale": ("F8_E8M0", made[f"{path}.scale"][1]),
        }, weight
    if re.search(r"\.attn\.w\w+\.weight|shared_experts", name):
        made, weight = encode(
            name, shape, "ue8m0", {"weight": name, "weight_scale_inv": f"{path}.scale"}
        )
        exponents = np.log2(made[f"{path}.scale"][1]) + 127
        return made | {f"{path}.scale": ("F8_E8M0", exponents.astype(np.uint8))}, weight
    return None


def deepseek_v41_formats(name: str, shape: tuple[int, ...]) -> Encoded | None:
    """Experts in FP4, other layers and Engram's tables in FP8; a scale for 32 weights of a row."""
    path = name.removesuffix(".weight")
    if re.search(r"\.attn\.w\w+\.weight|shared_experts|engram\.(?:embed|wkv)\.", name):
        leaves = {"weight": name, "weight_scale": f"{path}.scale"}
        made, weight = encode(name, shape, "mxfp8", leaves)
        scale = "F8_E8M0", made[f"{path}.scale"][1]
        return {name: made[name], f"{path}.scale": scale}, weight
    return deepseek_v4_formats(name, shape) if ".experts." in name else None


def qwen4_exp_singles(tensors: Tensors) -> Named:
    """As its FP8 checkpoint has it: experts one by one."""
    for name, array in split_experts(nested(tensors)):
        name = re.sub(r"shards\.(\d+)", r"shard_\1", name)
        yield name, array.moveaxis(2, 1) if "conv1d" in name else array


def qwen4_exp_formats(name: str, shape: tuple[int, ...]) -> Encoded | None:
    """Experts in FP8 by blocks; tables of n-grams in FP8 with one scale for all of a layer."""
    if ".experts." in name:
        leaves = {"weight": name, "weight_scale_inv": f"{name}_scale_inv"}
        return encode(name, shape, "block-fp8", leaves)
    if ".shard_" not in name:
        return None
    made, _ = encode(name, shape, "block-fp8", {"weight": name})
    scale = np.array([0.02], np.float32)
    path = name.partition(".shard_")[0]
    return made | {f"{path}.weight_scale": ("F32", scale)}, e4m3(made[name][1]) * scale


def mimo_v2_formats(name: str, shape: tuple[int, ...]) -> Encoded | None:
    """Experts in MXFP4; attention in FP8, whose scales are those of the makers' two ranks."""
    path = name.removesuffix(".weight")
    if ".experts." in name:
        return encode(
            name, shape, "mxfp4", {"weight_packed": name, "weight_scale": f"{name}_scale"}
        )
    if path.endswith("qkv_proj"):
        leaves = {"weight": name, "weight_scale_inv": f"{name}_scale_inv"}
        halves = [
            encode(f"{name}{i}", (shape[0] // 2, shape[1]), "block-fp8", leaves) for i in (0, 1)
        ]
        joined = {
            n: (kind, np.concatenate([half[0][n][1] for half in halves]))
            for n, (kind, _) in halves[0][0].items()
        }
        parts = [np.split(half[1], (128, 192)) for half in halves]  # queries, keys, values of each
        weight = np.concatenate([half[i] for i in range(3) for half in parts])
        return joined, floats(("BF16", bfloat16(weight)))  # as mlx-vlm rounds it
    if path.endswith("o_proj"):
        return encode(
            name, shape, "block-fp8", {"weight": name, "weight_scale_inv": f"{name}_scale_inv"}
        )
    return None


def hy_v4_formats(name: str, shape: tuple[int, ...]) -> Encoded | None:
    """MXFP8: experts in stacks, and the projections of attention."""
    if "_proj" in name and not name.endswith(".bias") and ".indexer." not in name:
        return encode(name, shape, "mxfp8", {"weight": name, "weight_scale": f"{name}_scale"})
    return None


def inkling_formats(name: str, shape: tuple[int, ...]) -> Encoded | None:
    """Experts in NVFP4 with a factor of each expert."""
    if ".experts.w" not in name:
        return None
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    leaves = {"weight": name, "weight_scale": f"{name}.scale"}
    made, _ = encode(name, shape, "modelopt", leaves)
    factors = rng.uniform(2e-4, 4e-4, shape[0]).astype(np.float32)
    weights = [
        read_nvfp4(
            {
                "weight": ("U8", made[name][1][e]),
                "weight_scale": ("U8", made[f"{name}.scale"][1][e]),
                "weight_scale_2": ("F32", factor),
            },
            *shape[1:],
        )
        for e, factor in enumerate(factors)
    ]
    scale = "U8", made[f"{name}.scale"][1]
    return made | {f"{name}.scale": scale, f"{name}.scale2": ("F32", factors)}, np.stack(weights)


QUANTIZED_LAYOUTS = {
    "deepseek_v4": deepseek_v4_formats,
    "deepseek_v41": deepseek_v41_formats,
    "hy_v4": hy_v4_formats,
    "inkling": inkling_formats,
    "mimo_v2": mimo_v2_formats,
    "qwen4_exp": qwen4_exp_formats,
}
QUANTIZATION_CONFIGS = {
    "deepseek_v4": FORMATS["ue8m0"].settings,
    "deepseek_v41": FORMATS["ue8m0"].settings | {"weight_block_size": [32, 32]},
    "hy_v4": {"quant_method": "modelopt", "quant_algo": "MXFP8"},
    "inkling": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
    "mimo_v2": FORMATS["block-fp8"].settings,
    "qwen4_exp": FORMATS["block-fp8"].settings,
}
