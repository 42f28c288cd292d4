"""Random checkpoints of any MoE family and any size, written without ever holding the model.

Owns: writing a checkpoint's files: config, tokenizer, index and weights.
Does not know: plans, ranks, how experts are computed.
How: mlx-lm builds the model lazily, and converts and quantizes it as `mlx_lm.convert` does; of that
only names, shapes and types are used. Random values go straight into the files
(`random_tensors.py`).
Invariant: the same config, options and seed give the same bytes; config.json is written last, so an
interrupted folder cannot be loaded.
Next: `checkpoint.py`, which opens such folders.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models.dbrx import SparseMoeBlock
from mlx_lm.utils import quantize_model, save_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..core.model_config import (
    CONTEXT_LENGTH_KEYS,
    EXPERT_COUNT_KEYS,
    VOCAB_SIZE_KEYS,
    Config,
    find_int,
    get_int,
    text_config,
)
from ..errors import CheckpointError, InputError
from . import architecture, vision, zoo
from .architecture import named_parameters
from .config_catalog import first_layers, full_config, layer_count, tiny_config, with_tower
from .random_tensors import OutputTensor, list_tensors, random_parameters

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""

GIB = 1 << 30
DTYPES = ("float32", "bfloat16", "float16")
_SAFETENSORS_NAMES = {
    mx.float32: "F32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.int64: "I64",
    mx.int32: "I32",
    mx.uint32: "U32",
    mx.uint8: "U8",
}
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GLM_IMAGE_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
IM_END, END_OF_TEXT = 257, 258
# Without a template a prompt is just its tokens; images come only in chats.
_IMAGE_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IMAGE_PIXELS = {"shortest_edge": 1024, "longest_edge": 65536}


@dataclass(frozen=True)
class SynthResult:
    """What was written.

    Args:
        path: the folder.
        family: mlx-lm's module that runs it (for solar_open that is glm4_moe).
        parameters: number of weights, each counted once however it is stored.
        tensors: number of tensors in the files, with quantization's scales and biases.
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


@dataclass(frozen=True)
class SynthOptions:
    """Which checkpoint to write.

    Args:
        family: a tiny config, see `families` (in float32 unless `dtype` says otherwise).
        name: a model of the catalog (in bfloat16 unless `dtype` says otherwise).
        config: a config, or the path of a config.json (bfloat16). Exactly one of the three.
        layers: keep only the first layers.
        quantize: bits: 2, 3, 4, 5, 6 or 8; None: not quantized, unless `mode` is "mxfp4".
        group_size: weights that share a scale: 32, 64 or 128; "mxfp4" always has 32.
        mode: "affine" or "mxfp4", as in `mlx.core.quantize`.
        dtype: of what is not quantized.
        seed: another seed, another model.
        images: with a tiny vision tower and a chat template; only with `family`.
    """

    family: str | None = None
    name: str | None = None
    config: Config | Path | None = None
    layers: int | None = None
    quantize: int | None = None
    group_size: int = 64
    mode: str = "affine"
    dtype: str | None = None
    seed: int = 0
    images: bool = False


def synth(
    out: Path,
    *,
    shard_bytes: int = 2 * GIB,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> SynthResult:
    """Write a random checkpoint that mlx-lm loads.

    Args:
        out: folder to write; it must be empty or not exist.
        shard_bytes: a file ends before the tensor that would pass this.
        overwrite: replace the checkpoint in a folder that is not empty.
        progress: called with bytes written and bytes in all.
        options: see `SynthOptions`.

    Raises:
        InputError: an unknown name (names the nearest), impossible options, a folder that is not
            empty, or too little space.
    """
    started_s = time.monotonic()
    chosen = SynthOptions(**options)
    config, tensors, parameters = _draw_tensors(chosen)
    size = sum(t.nbytes for t in tensors)

    _prepare_folder(out, size, overwrite)
    shards = _split_shards(tensors, shard_bytes)
    _write_weights(out, shards, progress)
    _write_index(out, shards, parameters)
    context = find_int(config, CONTEXT_LENGTH_KEYS) or 4096
    image_tokens: tuple[str, ...] = ()
    if chosen.images:
        image_tokens = GLM_IMAGE_TOKENS if chosen.family == "glm4v_moe" else IMAGE_TOKENS
    _write_tokenizer(out, _vocab_size(config), context, image_tokens)
    if chosen.images:
        _write_image_settings(out, config)
    save_config(config, out / "config.json", keep_vision_config=True)
    return SynthResult(
        path=out,
        family=architecture.resolve_family(config),
        parameters=parameters,
        tensors=len(tensors),
        bytes=size,
        shards=len(shards),
        layers=layer_count(config),
        seconds=time.monotonic() - started_s,
    )


def _draw_tensors(options: SynthOptions) -> tuple[Config, list[OutputTensor], int]:
    """The config, the tensors of the files, and the number of parameters."""
    config, default_dtype = _choose_config(options)
    dtype = options.dtype or default_dtype
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}", "dtype")
    bits, group_size = _check_quantization(options.quantize, options.group_size, options.mode)
    if options.layers is not None:
        config = first_layers(config, options.layers)
    config = _with_special_tokens(config) | {"torch_dtype": dtype}
    _vocab_size(config)  # raises before any work

    model = build_lazy_model(config, options.seed)
    _cast(model, getattr(mx, dtype))
    distributions = random_parameters(model, config)
    parameters = sum(value.size for _, value in named_parameters(model))
    if bits is not None:
        config = _quantize(model, config, bits, group_size, options.mode)
    experts = find_int(config, EXPERT_COUNT_KEYS)
    tensors = list_tensors(model, distributions, options.seed, experts)
    if options.images:
        holder = nn.Module()
        holder.vision_tower = vision.build_tower(config, config["model_type"])
        _cast(holder, getattr(mx, dtype))
        parameters += sum(value.size for _, value in named_parameters(holder))
        tensors += list_tensors(holder, random_parameters(holder, config), options.seed)
    return config, tensors, parameters


def _write_weights(out: Path, shards: list[list[OutputTensor]], progress: Progress | None) -> None:
    size = sum(tensor.nbytes for shard in shards for tensor in shard)
    written = 0
    for i, shard in enumerate(shards):
        with (out / _shard_name(i, len(shards))).open("wb") as file:
            for n in _write_shard(file, shard):
                written += n
                if progress is not None:
                    progress(written, size)


def _write_index(out: Path, shards: list[list[OutputTensor]], parameters: int) -> None:
    size = sum(tensor.nbytes for shard in shards for tensor in shard)
    weight_map = {
        tensor.name: _shard_name(i, len(shards))
        for i, shard in enumerate(shards)
        for tensor in shard
    }
    _write_json(
        out / "model.safetensors.index.json",
        {
            "metadata": {"total_size": size, "total_parameters": parameters},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )


def _choose_config(options: SynthOptions) -> tuple[Config, str]:
    """The config, and its default dtype."""
    family, name, config = options.family, options.name, options.config
    if sum(x is not None for x in (family, name, config)) != 1:
        raise InputError("family: expected exactly one of family, name and config", "family")
    if family is not None:
        tiny = tiny_config(family)
        return (with_tower(tiny, family) if options.images else tiny), "float32"
    if options.images:
        raise InputError("images: give a family, of which there is a tiny vision tower", "images")
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


def _vocab_size(config: Config) -> int:
    # Where a wrapper states it too (gemma4), mlx-lm reads the wrapper's.
    size = get_int(config, VOCAB_SIZE_KEYS) or get_int(text_config(config), VOCAB_SIZE_KEYS) or 0
    least = 256 + len(SPECIAL_TOKENS)
    if size < least:
        raise InputError(
            f"config: vocab_size: expected at least {least} (256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens), got {size or 'none'}",
            "config",
        )
    return size


def _with_special_tokens(config: Config) -> Config:
    """The config with the ids of our tokenizer's special tokens."""
    ids = {"eos_token_id": IM_END, "pad_token_id": END_OF_TEXT, "bos_token_id": None}
    config = copy.deepcopy(config)
    text_config(config).update(ids)
    return config | ids


def build_lazy_model(config: Config, seed: int = 0) -> nn.Module:
    """The model of a config. Nothing is evaluated: any size fits in memory.

    Raises:
        InputError: its package refuses the config, or the model has no routed experts.
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
            f"config: this {kind} model cannot be built: {type(error).__name__}: {error}",
            "config",
        ) from error
    has_experts = architecture.find_blocks(model) or any(
        isinstance(m, SparseMoeBlock) or zoo.is_vlm_stack(m) for m in model.modules()
    )
    if not has_experts:
        raise InputError(
            "config: no layer of this model holds routed experts; with `layers`, ask for more",
            "layers",
        )
    return model


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """As `mlx_lm.convert` does."""
    keep = getattr(model, "cast_predicate", lambda _: True)

    def change(name: str, value: mx.array) -> mx.array:
        if keep(name) and mx.issubdtype(value.dtype, mx.floating):
            return value.astype(dtype)
        return value

    model.update(tree_map_with_path(change, model.parameters()))


def _quantize(model: nn.Module, config: Config, bits: int, group_size: int, mode: str) -> Config:
    """As `mlx_lm.convert` does; returns the config with "quantization"."""
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, group_size, bits, mode=mode)
    if not any("Quantized" in type(m).__name__ for m in model.modules()):
        raise InputError(
            f"group_size: no layer of this model has a width that is a multiple of {group_size}",
            "group_size",
        )
    return config


def _check_quantization(bits: int | None, group_size: int, mode: str) -> tuple[int | None, int]:
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


def _prepare_folder(out: Path, size: int, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out: expected a folder, {out} is a file", "out")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(
                f"out: expected an empty folder, {out} is not empty; use "
                f"--overwrite or another folder",
                "out",
            )
        for old in [*out.glob("model*.safetensors"), *out.glob("*.json")]:
            old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if size > free:
        raise InputError(
            f"out: the model needs {size / GIB:.1f} GiB, {out} has {free / GIB:.1f} GiB left", "out"
        )


def _split_shards(tensors: list[OutputTensor], limit: int) -> list[list[OutputTensor]]:
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
            "dtype": _SAFETENSORS_NAMES[t.dtype],
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


def _write_image_settings(out: Path, config: Config) -> None:
    tower = config["vision_config"]
    sizes = {
        "patch_size": tower["patch_size"],
        "merge_size": tower["spatial_merge_size"],
        "temporal_patch_size": tower["temporal_patch_size"],
    }
    colors = {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.5, 0.5, 0.3]}
    _write_json(out / "preprocessor_config.json", {**sizes, **colors, "size": _IMAGE_PIXELS})


def _write_tokenizer(
    out: Path, vocab_size: int, context: int, image_tokens: Sequence[str] = ()
) -> None:
    """Write a byte-level tokenizer: ids 0..255 are the bytes, then special tokens, then fillers.

    A filler decodes to " t" and its id, so that every id a random model gives is text. There is no
    chat template: to a random model a prompt is just its tokens, for mlx-lm's tools too. With
    images there is one, since only messages have them.
    """
    special = (*SPECIAL_TOKENS, *image_tokens)
    template = ""
    if image_tokens:
        begin, end, image, _ = image_tokens
        template = _IMAGE_TEMPLATE.replace("IMAGE", f"{begin}{image}{end}")
    tokens = [
        *_byte_letters(),
        *special,
        *(f"Ġt{i}" for i in range(256 + len(special), vocab_size)),
    ]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    _write_json(
        out / "generation_config.json",
        {"eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": END_OF_TEXT, "do_sample": False},
    )
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(special),
            "clean_up_tokenization_spaces": False,
            **({"chat_template": template} if template else {}),
        },
    )


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (as in GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]
