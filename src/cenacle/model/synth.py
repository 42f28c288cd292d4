"""Random checkpoints of any MoE family and any size, written without ever holding the model.

Owns: the tiny configs (one per family), the catalogue of full-size configs, and the random values
that make a checkpoint worth testing: nothing stays at the zeros and ones that mlx-lm starts from,
and scales are such that logits are well spread.
Does not know: plans, ranks, how experts are computed.
How: mlx-lm builds the model lazily, and converts and quantises it as `mlx_lm.convert` does; of that
only names, shapes and types are used. Values are drawn tensor by tensor, a few MiB at a time, from
a stream named after the tensor, straight into the file; a quantised tensor's words are drawn as
they are stored.
Invariant: the same config, options and seed give the same bytes; config.json is written last, so an
interrupted folder cannot be loaded.
Next: `weights.py`, which reads such folders; `architecture.py`, which finds the MoE blocks.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.dbrx import SparseMoeBlock
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import quantize_model, save_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..core.model_config import CONTEXT_LENGTH_KEYS, find_int
from ..errors import CheckpointError, InputError
from . import architecture

Config = dict[str, Any]
Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""

CONFIGS = Path(__file__).parent / "configs"
GIB = 1 << 30
CHUNK = 1 << 21  # values drawn at a time

# Standard deviations. A linear layer maps unit variance to LINEAR**2; logits have about HEAD.
LINEAR = 1.5
HEAD = 3.0
TIED_HEAD = 0.5  # more, and a tied model sees little but its last token and repeats it
ATTENTION = 0.5  # it averages tokens: with more, a deep model's positions are all alike
EMBEDDING = 1.0
NOISE = 0.1  # around the default, for everything that is not a weight: norms, biases, corrections

DTYPES = ("float32", "bfloat16", "float16")
_NAMES = {
    mx.float32: "F32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}
_E2M1_RMS = math.sqrt(68.5 / 8)  # of the 16 values of mxfp4's elements: 0, 0.5, ..., 4, 6

# Keys of config.json, at any depth, that change when a model is cut to its first layers.
_LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers")
_PER_LAYER = (
    "compress_ratios",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
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
_LAYER_IDS_FROM_1 = ("full_attn_layers", "kda_layers")
_ATTENTION_OUTPUTS = ("dense", "o_b_proj", "o_proj", "out_proj")
# Full attention in the last layer of each period.
_PERIODS = ("full_attention_interval", "layer_group_size")

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
IM_END, END_OF_TEXT = 257, 258


@dataclass(frozen=True)
class CatalogEntry:
    """A model of the catalogue.

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


@dataclass(frozen=True)
class SynthResult:
    """What was written.

    Args:
        path: the folder.
        family: mlx-lm's module that runs it (for solar_open that is glm4_moe).
        parameters: number of weights, each counted once however it is stored.
        tensors: number of tensors in the files, with quantisation's scales and biases.
        bytes: of all tensors.
        shards: number of files.
        layers: number of layers.
        seconds: how long it took.
    """

    path: Path
    family: str
    parameters: int
    tensors: int
    bytes: int
    shards: int
    layers: int
    seconds: float


def family_names() -> list[str]:
    """Names of the tiny configs: mlx-lm's module names of all its MoE families."""
    return sorted(p.stem for p in (CONFIGS / "tiny").glob("*.json"))


@cache
def model_catalogue() -> dict[str, CatalogEntry]:
    """The full-size models by name."""
    raw = json.loads((CONFIGS / "models.json").read_text())
    return {name: CatalogEntry(**entry) for name, entry in raw.items()}


def tiny_config(family: str) -> Config:
    """A small config of a family, with the family's peculiarities switched on.

    Raises:
        InputError: there is no such family; names the nearest.
    """
    path = CONFIGS / "tiny" / f"{family}.json"
    if family not in family_names():
        raise _unknown("family", family, family_names())
    return json.loads(path.read_text())


def full_config(name: str) -> Config:
    """The config of a model of the catalogue.

    Raises:
        InputError: the catalogue has no such model; names the nearest.
    """
    if name not in model_catalogue():
        raise _unknown("name", name, sorted(model_catalogue()))
    return copy.deepcopy(model_catalogue()[name].config)


def synth(
    out: Path,
    *,
    family: str | None = None,
    name: str | None = None,
    config: Config | Path | None = None,
    layers: int | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    mode: str = "affine",
    dtype: str | None = None,
    seed: int = 0,
    shard_bytes: int = 2 * GIB,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SynthResult:
    """Write a random checkpoint that mlx-lm loads.

    Args:
        out: folder to write; it must be empty or not exist.
        family: a tiny config, see `families` (in float32 unless `dtype` says otherwise).
        name: a model of the catalogue, see `catalogue` (in bfloat16 unless `dtype` says otherwise).
        config: a config, or the path of a config.json (bfloat16). Exactly one of the three.
        layers: keep only the first layers.
        quantize: bits: 2, 3, 4, 5, 6 or 8; None: not quantised, unless `mode` is "mxfp4".
        group_size: weights that share a scale: 32, 64 or 128; "mxfp4" always has 32.
        mode: "affine" or "mxfp4", as in `mlx.core.quantize`.
        dtype: of what is not quantised.
        seed: another seed, another model.
        shard_bytes: a file ends before the tensor that would pass this.
        overwrite: replace the checkpoint in a folder that is not empty.
        progress: called with bytes written and bytes in all.

    Raises:
        InputError: an unknown name (names the nearest), impossible options, a folder that is not
            empty, or too little space.
    """
    started = time.monotonic()
    source, default_dtype = _choose(family, name, config)
    dtype = dtype or default_dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}", "dtype")
    bits, group_size = _quantisation(quantize, group_size, mode)
    if layers is not None:
        source = first_layers(source, layers)
    source = _with_tokens(source) | {"torch_dtype": dtype}
    vocab_size = _vocab_size(source)

    model = build_lazy_model(source, seed)
    _cast(model, getattr(mx, dtype))
    draws = _draws(model, source)
    total = sum(value.size for value in _parameters(model).values())
    if bits is not None:
        source = _quantise(model, source, bits, group_size, mode)
    tensors = _tensors(model, draws, seed)
    shards = _shards(tensors, shard_bytes)
    size = sum(t.nbytes for t in tensors)

    _prepare(out, size, overwrite)
    written = 0
    for i, shard in enumerate(shards):
        with (out / _shard_name(i, len(shards))).open("wb") as file:
            for n in _write_shard(file, shard):
                written += n
                if progress is not None:
                    progress(written, size)
    write_tokenizer(out, vocab_size, _context(source))
    _write_json(
        out / "model.safetensors.index.json",
        {
            "metadata": {"total_size": size, "total_parameters": total},
            "weight_map": dict(
                sorted(
                    (t.name, _shard_name(i, len(shards)))
                    for i, shard in enumerate(shards)
                    for t in shard
                )
            ),
        },
    )
    _write_json(
        out / "generation_config.json",
        {"eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": END_OF_TEXT, "do_sample": False},
    )
    save_config(source, out / "config.json", keep_vision_config=True)
    return SynthResult(
        path=out,
        family=architecture.resolve_family(source),
        parameters=total,
        tensors=len(tensors),
        bytes=size,
        shards=len(shards),
        layers=layer_count(source),
        seconds=time.monotonic() - started,
    )


# ---- configs


def _unknown(field: str, given: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(given, known, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
    return InputError(f"{field}: nothing is called {given!r}; {hint}", field)


def _choose(
    family: str | None, name: str | None, config: Config | Path | None
) -> tuple[Config, str]:
    """The config asked for, and its default dtype."""
    if sum(x is not None for x in (family, name, config)) != 1:
        raise InputError("give exactly one of family, name and config")
    if family is not None:
        return tiny_config(family), "float32"
    if name is not None:
        return full_config(name), "bfloat16"
    if isinstance(config, Path):
        try:
            config = json.loads(config.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"config: cannot read {config}: {error}", "config") from error
    assert isinstance(config, dict)
    config = copy.deepcopy(config)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    return config, "bfloat16"


def text_config(config: Config) -> Config:
    """The part of a config that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def layer_count(config: Config) -> int:
    """Number of layers that a config gives."""
    text = text_config(config)
    for key in _LAYER_COUNTS:
        if isinstance(text.get(key), int):
            return text[key]
    for key in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
        if key in text:
            return len(text[key])
    raise InputError(f"config: expected one of {', '.join(_LAYER_COUNTS)}, got none", "config")


def first_layers(config: Config, layers: int) -> Config:
    """The config of the model's first `layers` layers.

    Raises:
        InputError: more layers than there are, or too few for mlx-lm to run the family.
    """
    total = layer_count(config)
    if not 1 <= layers <= total:
        raise InputError(f"layers: expected 1 to {total}, got {layers}", "layers")
    text = text_config(config)
    least = _least_layers(text)
    if layers < min(least, total):
        raise InputError(
            f"layers: mlx-lm needs the first full-attention layer of this family, number {least}; "
            f"ask for at least {least} layers, got {layers}",
            "layers",
        )

    def cut(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {k: cut(v, k) for k, v in node.items()}
        if key in _LAYER_COUNTS and node == total:
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


def _least_layers(text: Config) -> int:
    """Layers up to the first one with full attention, where mlx-lm sizes its masks by that one."""
    if text.get("model_type") == "llama4_text":
        return 4
    least = [text[key] for key in _PERIODS if isinstance(text.get(key), int)]
    least += text.get("linear_attn_config", {}).get("full_attn_layers", [])[:1]
    least += (
        [text["hybrid_override_pattern"].index("*") + 1]
        if "*" in (text.get("hybrid_override_pattern") or "")
        else []
    )
    return max(least, default=1)


def _vocab_size(config: Config) -> int:
    # Where a wrapper states it too (gemma4), mlx-lm reads the wrapper's.
    levels = (config, text_config(config))
    sizes = [level.get(key) for level in levels for key in ("vocab_size", "num_vocab")]
    size = next((s for s in sizes if isinstance(s, int)), 0)
    least = 256 + len(SPECIALS)
    if size < least:
        raise InputError(
            f"config: vocab_size must be at least {least} (256 bytes and {len(SPECIALS)} special "
            f"tokens), got {size or 'none'}",
            "config",
        )
    return size


def _context(config: Config) -> int:
    return find_int(config, CONTEXT_LENGTH_KEYS) or 4096


def _with_tokens(config: Config) -> Config:
    """The config with the ids of our tokenizer's special tokens."""
    ids = {"eos_token_id": IM_END, "pad_token_id": END_OF_TEXT, "bos_token_id": None}
    config = copy.deepcopy(config)
    text_config(config).update(ids)
    return config | ids


# ---- the model as a list of tensors


def build_lazy_model(config: Config, seed: int = 0) -> nn.Module:
    """mlx-lm's model of a config. Nothing is evaluated: any size fits in memory.

    Raises:
        InputError: mlx-lm refuses the config, or the model has no routed experts.
    """
    # The few defaults that are random themselves (A_log) must follow the seed too.
    mx.random.seed(seed)
    try:
        model_class: Any
        model_class, args_class = architecture.model_classes(config)
        model = model_class(args_class.from_dict(config))
    except CheckpointError:
        raise
    except Exception as error:
        kind = config.get("model_type")
        raise InputError(
            f"config: mlx-lm cannot build this {kind} model: {type(error).__name__}: {error}",
            "config",
        ) from error
    has_experts = architecture.find_blocks(model) or any(
        isinstance(m, SparseMoeBlock) for m in model.modules()
    )
    if not has_experts:
        raise InputError(
            "config: no layer of this model holds routed experts; with `layers`, ask for more",
            "layers",
        )
    return model


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    """All arrays of a model by name, in its own order."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """As `mlx_lm.convert` does."""
    keep = getattr(model, "cast_predicate", lambda _: True)

    def change(name: str, value: mx.array) -> mx.array:
        if keep(name) and mx.issubdtype(value.dtype, mx.floating):
            return value.astype(dtype)
        return value

    model.update(tree_map_with_path(change, model.parameters()))


def _quantise(model: nn.Module, config: Config, bits: int, group_size: int, mode: str) -> Config:
    """As `mlx_lm.convert` does; returns the config with its "quantization"."""
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, group_size, bits, mode=mode)
    if not any("Quantized" in type(m).__name__ for m in model.modules()):
        raise InputError(
            f"group_size: no layer of this model has a width that is a multiple of {group_size}",
            "group_size",
        )
    return config


def _quantisation(bits: int | None, group_size: int, mode: str) -> tuple[int | None, int]:
    if mode == "mxfp4":
        if bits not in (None, 4):
            raise InputError(f"quantize: mxfp4 has 4 bits, got {bits}", "quantize")
        return 4, 32
    if mode != "affine":
        raise InputError(f"mode: expected affine or mxfp4, got {mode!r}", "mode")
    if bits not in (None, 2, 3, 4, 5, 6, 8):
        raise InputError(f"quantize: expected 2, 3, 4, 5, 6 or 8 bits, got {bits}", "quantize")
    if group_size not in (32, 64, 128):
        raise InputError(f"group_size: expected 32, 64 or 128, got {group_size}", "group_size")
    return bits, group_size


@dataclass(frozen=True)
class RandomTensor:
    """How a tensor's values are drawn: `default` (or 0) plus noise of standard deviation `std`."""

    std: float
    default: np.ndarray | None = None


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to write. `values` yields its bytes in order."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]
    values: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.size


def _draws(model: nn.Module, config: Config) -> dict[str, RandomTensor]:
    """How to draw each parameter of a model that is not quantised, by name."""
    modules = dict(model.named_modules())
    params = _parameters(model)
    tied = not any(name.startswith(("lm_head.", "language_model.lm_head.")) for name in params)
    # Some families divide or multiply the logits by a constant of the config: undo it.
    text = text_config(config)
    head = (
        (TIED_HEAD if tied else HEAD)
        * text.get("logits_scaling", 1.0)
        / text.get("output_multiplier", 1.0)
    )

    def draw(name: str, value: mx.array) -> RandomTensor:
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        width = value.shape[-1] if value.ndim else 1
        if isinstance(owner, nn.Embedding):
            return RandomTensor(head / math.sqrt(width) if tied else EMBEDDING)
        if "lm_head" in name and value.ndim == 2:
            return RandomTensor(head / math.sqrt(width))
        if leaf == "weight" and isinstance(owner, nn.Linear | SwitchLinear | MultiLinear):
            mixes = path.rpartition(".")[2] in _ATTENTION_OUTPUTS
            return RandomTensor((ATTENTION if mixes else LINEAR) / math.sqrt(width))
        if leaf == "weight" and isinstance(owner, nn.Conv1d):
            return RandomTensor(LINEAR / math.sqrt(math.prod(value.shape[1:])))
        if leaf == "bias" and isinstance(owner, nn.Linear | SwitchLinear | nn.Conv1d):
            return RandomTensor(NOISE)
        default = np.array(value.astype(mx.float32))
        if value.ndim == 2 and not default.any():  # a router kept as a bare matrix
            return RandomTensor(LINEAR / math.sqrt(width))
        return RandomTensor(NOISE, default.reshape(-1))

    return {name: draw(name, value) for name, value in params.items()}


def _tensors(model: nn.Module, draws: dict[str, RandomTensor], seed: int) -> list[OutputTensor]:
    """The parameters of a model, quantised or not, in its own order."""
    modules = dict(model.named_modules())

    def values(name: str, value: mx.array) -> Callable[[], Iterator[np.ndarray]]:
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        packed = hasattr(owner, "bits") and leaf != "bias"
        if not packed:
            return partial(_floats, seed, name, value.size, draws[name], value.dtype)
        if leaf == "weight":
            return partial(_words, seed, name, value.size)
        assert owner is not None
        std = draws[f"{path}.weight"].std
        if owner.mode == "mxfp4":
            return partial(_exponents, seed, name, value.size, std)
        groups = partial(_groups, seed, path, value.size, std, owner.bits, leaf)
        return partial(_encoded, groups, value.dtype)

    return [
        OutputTensor(n, v.dtype, tuple(v.shape), values(n, v))
        for n, v in _parameters(model).items()
    ]


# ---- values


class _RandomStream:
    """Random bits that depend on the seed and the tensor's name only."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        self._bits = np.random.SFC64(int.from_bytes(digest, "little"))

    def words(self, n: int) -> np.ndarray:
        """`n` random uint32."""
        return self._bits.random_raw((n + 1) // 2).view(np.uint32)[:n]

    def unit(self, n: int) -> np.ndarray:
        """`n` float32, uniform in (-1, 1), in 65536 steps."""
        steps = self._bits.random_raw((n + 3) // 4).view(np.uint16)[:n]
        return (steps.astype(np.float32) - 32767.5) / 32768


def _chunks(n: int) -> Iterator[int]:
    for start in range(0, n, CHUNK):
        yield min(CHUNK, n - start)


def _encode(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """float32 values as the file stores them."""
    if dtype == mx.bfloat16:
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even
    return values.astype({mx.float32: np.float32, mx.float16: np.float16}[dtype])


def _encoded(groups: Callable[[], Iterator[np.ndarray]], dtype: mx.Dtype) -> Iterator[np.ndarray]:
    for chunk in groups():
        yield _encode(chunk, dtype)


def _floats(
    seed: int, name: str, n: int, draw: RandomTensor, dtype: mx.Dtype
) -> Iterator[np.ndarray]:
    stream, done = _RandomStream(seed, name), 0
    scale = np.float32(draw.std * math.sqrt(3))
    for m in _chunks(n):
        values = stream.unit(m) * scale
        if draw.default is not None:
            values += draw.default[done : done + m]
        done += m
        yield _encode(values, dtype)


def _words(seed: int, name: str, n: int) -> Iterator[np.ndarray]:
    """Packed elements: uniform over all levels, whatever the number of bits."""
    stream = _RandomStream(seed, name)
    for m in _chunks(n):
        yield stream.words(m)


def _groups(seed: int, path: str, n: int, std: float, bits: int, leaf: str) -> Iterator[np.ndarray]:
    """Scales or biases of affine groups: w = scale * q + bias, q in 0 .. 2**bits - 1.

    As in real checkpoints scales have both signs and differ by group, and zero is not in the middle
    of the levels. Weights have the standard deviation `std`.
    """
    levels = 2**bits
    step = std / math.sqrt((levels**2 - 1) / 12)
    scales, zeros = _RandomStream(seed, f"{path}.scales"), _RandomStream(seed, f"{path}.biases")
    for m in _chunks(n):
        u = scales.unit(m)
        scale = np.copysign(np.float32(step) * (0.5 + np.abs(u)), u)
        if leaf == "scales":
            yield scale
        else:
            yield -scale * ((levels - 1) / 2 + zeros.unit(m) * np.float32(levels / 8))


def _exponents(seed: int, name: str, n: int, std: float) -> Iterator[np.ndarray]:
    """Scales of mxfp4 groups: powers of two around what gives the standard deviation `std`."""
    stream = _RandomStream(seed, name)
    nearest = math.log2(std / _E2M1_RMS) + 127
    for m in _chunks(n):
        yield np.floor(nearest + 0.5 + stream.unit(m) / 2).astype(np.uint8)


# ---- files


def _prepare(out: Path, size: int, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is not a folder", "out")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(
                f"out: expected an empty folder, {out} is not; empty it or ask to overwrite", "out"
            )
        for old in [*out.glob("model*.safetensors"), *out.glob("*.json")]:
            old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if size > free:
        raise InputError(
            f"out: the model needs {size / GIB:.1f} GiB, {out} has {free / GIB:.1f} GiB left", "out"
        )


def _shards(tensors: list[OutputTensor], limit: int) -> list[list[OutputTensor]]:
    """Consecutive tensors, at most `limit` bytes a shard (a larger tensor has its own)."""
    shards: list[list[OutputTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _write_shard(file: BinaryIO, tensors: list[OutputTensor]) -> Iterator[int]:
    """Write one safetensors file; yields the bytes of each piece written.

    Wider elements come first, so that every tensor starts at a multiple of its element.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    tensors = sorted(tensors, key=lambda t: -t.dtype.size)
    offset = 0
    for t in tensors:
        header[t.name] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for t in tensors:
        written = 0
        for piece in t.values():
            file.write(piece.data)
            written += piece.nbytes
            yield piece.nbytes
        assert written == t.nbytes, f"{t.name}: {written} of {t.nbytes} bytes"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tokenizer(out: Path, vocab_size: int, context: int) -> None:
    """A byte-level tokenizer: ids 0..255 are the bytes, then the special tokens, then fillers.

    A filler decodes to " t" and its id, so that every id a random model gives is text. There is no
    chat template: to a random model a prompt is just its tokens, for mlx-lm's tools too.
    """
    tokens = [
        *_byte_letters(),
        *SPECIALS,
        *(f"Ġt{i}" for i in range(256 + len(SPECIALS), vocab_size)),
    ]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIALS),
            "clean_up_tokenization_spaces": False,
        },
    )


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (as in GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]
