"""Multi-token prediction: the layer behind the last one, which drafts the token after the next.

Owns: which tensors of a checkpoint are of such a layer; the layer as a small model of its own.
Does not know: ranks, requests, what becomes of drafts.
In most forms the layer is a decoder layer like the others, before which a projection joins the
embedding of a token and the hidden state of the token before, each behind a norm. DeepSeek, GLM and
Ling have it as layer `num_hidden_layers`, with `eh_proj`, `enorm` and `hnorm`; Qwen as
`mtp.layers.0`, with `mtp.fc` and `mtp.pre_fc_norm_*`; Nemotron as `mtp.layers.0` (attention) and
`.1` (experts). Norm, head and embedding are the model's own where the layer brings none.
How: the layer is read as a checkpoint of one layer with the same config, so that conversions,
formats and kernels are those of the family.
Source: DeepSeek-V3 Technical Report (2024), section 2.2.
Next: `draft_heads.py`, which calls such a model.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.model_config import EXPERT_COUNT_KEYS, Config, text_config
from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .config_file import read_quantization_settings
from .families import family_of, layer_index
from .format_recognition import find_quantized_layers
from .zoo_drafters import NORM, PREFIX_KEY, ZOO_DRAFTERS

INPUT = "draft_input"  # of a model of one layer; a family's own conversion drops names with "mtp."


@dataclass(frozen=True)
class MtpForm:
    """How checkpoints of some families name the tensors of a layer that drafts.

    Args:
        prefixes: before the names of its tensors, of which a checkpoint has one; "{layers}" stands
            for the number of the model's layers.
        layer: what follows the prefix in the names of the decoder layer itself.
        inside: what stands there in the paths of a model of one layer.
        own: what follows the prefix in the names of other modules, "*" for numbers, and their paths
            in such a model.
        needed: what must be there.
        text_path: of the language model in the family's model, with a dot behind it.
        one_layer: keys of the config of such a model; called with the language model's.
        has_low_norms: published norms are stored less 1, those of files that MLX wrote are not.
        is_zoo: mlx-vlm's drafter is the layer, see `zoo_drafters.py`; then `own` is not read.
        other_form: a key of configs whose layer is none of this form.
    """

    prefixes: tuple[str, ...]
    layer: str
    own: Mapping[str, str]
    needed: tuple[str, ...]
    inside: str = "model.layers.0."
    text_path: str = ""
    one_layer: Callable[[Config], Config] = lambda _: {}
    has_low_norms: bool = False
    is_zoo: bool = False
    other_form: str = ""

    def prefix_in(self, checkpoint: Checkpoint) -> str | None:
        """The prefix that a checkpoint has; None: it has no layer of this form."""
        if self.is_other(checkpoint.config):
            return None
        for prefix in self.list_prefixes(checkpoint.config):
            if all(f"{prefix}{name}.weight" in checkpoint.tensors for name in self.needed):
                return prefix
        return None

    def is_other(self, config: Config) -> bool:
        """Whether a checkpoint's layer is of another form."""
        return bool(self.other_form) and bool(text_config(config).get(self.other_form))

    def list_prefixes(self, config: Config) -> tuple[str, ...]:
        """`prefixes`, with the number of a model's layers."""
        layers = text_config(config).get("num_hidden_layers")
        return tuple(prefix.format(layers=layers) for prefix in self.prefixes)

    def rename(self, path: str, prefix: str) -> str | None:
        """A module's path in a model of one layer; None: it has no place there."""
        name = path.removeprefix(prefix)
        if (own := self.own.get(_NUMBER.sub("*", name))) is not None:
            return self.text_path + own
        if not name.startswith(self.layer):
            return None
        return f"{self.text_path}{self.inside}{name.removeprefix(self.layer)}"


_DEEPSEEK = MtpForm(
    prefixes=("model.layers.{layers}.",),
    layer="",
    own={
        "eh_proj": f"{INPUT}.eh_proj",
        "enorm": f"{INPUT}.enorm",
        "hnorm": f"{INPUT}.hnorm",
        "shared_head.norm": "model.norm",
        "shared_head.head": "lm_head",
        "embed_tokens": "model.embed_tokens",
    },
    needed=("eh_proj", "enorm", "hnorm", "input_layernorm"),
    one_layer=lambda _: {"num_hidden_layers": 1, "first_k_dense_replace": 0},
)
_QWEN = MtpForm(
    prefixes=("mtp.", "language_model.mtp."),
    layer="layers.0.",
    own={
        "fc": f"{INPUT}.eh_proj",
        "pre_fc_norm_embedding": f"{INPUT}.enorm",
        "pre_fc_norm_hidden": f"{INPUT}.hnorm",
        "norm": "model.norm",
        "embed_tokens": "model.embed_tokens",
    },
    needed=(
        "fc",
        "pre_fc_norm_embedding",
        "pre_fc_norm_hidden",
        "norm",
        "layers.0.input_layernorm",
    ),
    one_layer=lambda _: {
        "num_hidden_layers": 1,
        "full_attention_interval": 1,
        "layer_types": ["full_attention"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    has_low_norms=True,
)
_BAILING = replace(
    _DEEPSEEK,
    own={
        "eh_proj": f"{INPUT}.eh_proj",
        "enorm": f"{INPUT}.enorm",
        "hnorm": f"{INPUT}.hnorm",
        "final_layernorm": "model.norm",
        "word_embeddings": "model.word_embeddings",
    },
)


def _nemotron_layers(config: Config) -> Config:
    """Of attention and experts; the published ones have one of each.

    Raises:
        CheckpointError: there are others.
    """
    keys = ("mtp_hybrid_override_pattern", "mtp_layers_block_type")
    kinds = next((config[key] for key in keys if config.get(key)), "*E")
    is_known = isinstance(kinds, str | list)
    pattern = [_NEMOTRON_KINDS.get(str(kind), "") for kind in kinds] if is_known else []
    if not all(pattern) or not pattern:
        raise CheckpointError(f"expected layers of attention (*) and experts (E), got {kinds}")
    return {"num_hidden_layers": len(pattern), "hybrid_override_pattern": pattern}


_NEMOTRON = MtpForm(
    prefixes=("mtp.",),
    layer="layers.",
    inside="backbone.layers.",
    own={
        "layers.*.eh_proj": f"{INPUT}.eh_proj",
        "layers.*.enorm": f"{INPUT}.enorm",
        "layers.*.hnorm": f"{INPUT}.hnorm",
        "layers.*.final_layernorm": "backbone.norm_f",
    },
    needed=("layers.0.eh_proj", "layers.0.enorm", "layers.0.hnorm", "layers.0.norm"),
    one_layer=_nemotron_layers,
)
_DEEPSEEK_V4 = MtpForm(
    prefixes=("mtp.0.", "mtp.1.", "mtp."),
    layer="",
    own={},
    needed=("e_proj", "h_proj", "enorm", "hnorm", "attn_norm", "norm"),
    is_zoo=True,
    other_form="dspark_target_layer_ids",
)
_GLM5_NEXT = MtpForm(
    prefixes=(
        "model.language_model.layers.{layers}.",
        "language_model.model.layers.{layers}.",
        "model.layers.{layers}.",
    ),
    layer="",
    own={},
    needed=("eh_proj", "enorm", "hnorm", "input_layernorm"),
    is_zoo=True,
)
_HY_V4 = MtpForm(
    prefixes=("model.mtp_layers.0.",),
    layer="",
    own={},
    needed=("eh_proj", "enorm", "hnorm", "input_layernorm", "final_layernorm"),
    is_zoo=True,
)
_INKLING = MtpForm(
    prefixes=("model.mtp.layers.0.", "model.mtp."),
    layer="",
    own={},
    needed=("embed_norm", "hidden_norm", "input_proj"),
    one_layer=lambda config: {key: 0 for key in EXPERT_COUNT_KEYS if key in config},  # dense
    is_zoo=True,
)
_QWEN4 = MtpForm(
    prefixes=("mtp.", "language_model.mtp.", "model.mtp."),
    layer="",
    own={},
    needed=("fc_embedding", "fc_hidden", "pre_fc_norm_embedding", "pre_fc_norm_hidden"),
    is_zoo=True,
)
FORMS = {
    "bailing_moe": _BAILING,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "deepseek_v4": _DEEPSEEK_V4,
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "glm5_next": _GLM5_NEXT,
    "glm_moe_dsa": _DEEPSEEK,
    "hy_v4": _HY_V4,
    "inkling": _INKLING,
    "nemotron_h": _NEMOTRON,
    "qwen3_5_moe": replace(_QWEN, text_path="language_model."),
    "qwen3_next": _QWEN,
    "qwen4_exp": _QWEN4,
}
MTP_FAMILIES = tuple(FORMS)
"""Families whose published checkpoints have such a layer, and whose caches can drop drafts."""

# What the layer has of the model where it brings none of its own.
_SHARED = re.compile(
    r"(?:model\.|language_model\.|backbone\.)*"
    r"(embed_tokens|word_embeddings|embeddings|norm|lm_head)\.\w+"
)
_ZOO_SHARED = re.compile(
    r"(?:model\.|language_model\.|llm\.)*"
    r"(?P<kind>embed_tokens|embed|lm_head|head|unembed|norm)\.(?P<leaf>\w+)"
)
_ZOO_PATHS = {
    "embed_tokens": "model.embed_tokens",
    "embed": "model.embed_tokens",
    "lm_head": "lm_head",
    "head": "lm_head",
    "unembed": "lm_head",
    "norm": NORM.removesuffix("."),
}
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "embeddings")
_EPS = ("rms_norm_eps", "layer_norm_epsilon")
_NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")
_NEMOTRON_KINDS = {"*": "*", "attention": "*", "full_attention": "*", "E": "E", "moe": "E"}
_LOW_NORMS = ("norm", "enorm", "hnorm", "layernorm")  # the ends of their names
# Layers of all forms, also of those that are not read.
_ANY_LAYER = re.compile(r"(?:.*\.)?(?:mtp|mtp_layers|mtp_block|mtp_\w+|nextn)\..*")


def is_mtp_tensor(name: str, family: str, config: Config) -> bool:
    """Whether a tensor of a checkpoint is of a layer that drafts, in the family's form."""
    form = FORMS.get(family)
    if form is None:
        return False
    if form.layer or form.is_zoo:
        return name.startswith(form.list_prefixes(config))
    layer = layer_index(name)
    return layer is not None and layer >= text_config(config)["num_hidden_layers"]


def has_mtp(checkpoint: Checkpoint, family: str) -> bool:
    """Whether a checkpoint has a layer that drafts, in the form that is read here."""
    form = FORMS.get(family)
    if form is None or checkpoint.gguf is not None:
        return False
    return form.prefix_in(checkpoint) is not None


def describe_unused(checkpoint: Checkpoint, family: str) -> str | None:
    """Why a checkpoint's layer for multi-token prediction cannot draft, in one line; None: it can,
    or there is none."""
    if has_mtp(checkpoint, family) or not (count := _count_layers_tensors(checkpoint)):
        return None
    reason = f"drafts with that of {family} are not supported"
    if family in FORMS and FORMS[family].is_other(checkpoint.config):
        reason = f"it has {FORMS[family].other_form}, a form that is not supported"
    elif family in FORMS:
        reason = "it is not complete" if checkpoint.gguf is None else "GGUF files are read without"
    return f"the layer for multi-token prediction ({count} tensors) is not used: {reason}"


def describe_misfit(checkpoint: Checkpoint, family: str, error: str) -> str:
    """Why a layer that was found cannot draft: an error of reading it, with the names of the
    files."""
    form = FORMS[family]
    prefix = form.prefix_in(checkpoint)
    paths = {f"{form.text_path}{path}": f"{prefix}{inside}" for inside, path in form.own.items()}
    error = error.removeprefix(f"{checkpoint.folder}: ")
    if form.is_zoo:
        drafter, layer = ZOO_DRAFTERS[family], form.inside
        for own, published in drafter.published:
            error = error.replace(f"{layer}{own}", f"{layer}{published}")
    layer = f"{prefix}{form.layer}".removesuffix(".")
    paths[f"{form.text_path}{form.inside}".removesuffix(".")] = layer
    for path, inside in paths.items():
        error = re.sub(rf"(?<![\w.]){re.escape(path)}(?=\.)", inside, error)
    return f"the layer for multi-token prediction is not used: {error}"


def _count_layers_tensors(checkpoint: Checkpoint) -> int:
    layers = text_config(checkpoint.config).get("num_hidden_layers")
    count = 0
    for name in checkpoint.text_tensors:
        index = layer_index(name)
        is_behind = index is not None and isinstance(layers, int) and index >= layers
        count += is_behind or _ANY_LAYER.fullmatch(name) is not None
    return count


def mtp_checkpoint(checkpoint: Checkpoint, family: str) -> Checkpoint:
    """The first of a checkpoint's layers that draft, as a checkpoint of a model of one layer."""
    form = FORMS[family]
    prefix = form.prefix_in(checkpoint)
    assert prefix is not None, "see has_mtp"
    names = _rename(checkpoint, form, prefix, family)
    tensors = {
        new: replace(tensor, name=new)
        for old, tensor in checkpoint.tensors.items()
        if (new := names.get(old)) is not None
    }
    config = _config_of_layer(checkpoint.config, form, prefix)
    settings = read_quantization_settings(checkpoint.folder, checkpoint.config)
    quantized = find_quantized_layers(
        str(checkpoint.folder), tensors, config, settings, family_of(family).own_formats
    )
    low = [
        new
        for old, new in names.items()
        if form.has_low_norms and old.startswith(prefix) and _is_low_norm(new)
    ]
    if low and _is_written_by_mlx(tensors[low[0]].file):
        low = []
    return replace(
        checkpoint,
        config=config,
        tensors=tensors,
        quantized=quantized,
        renamed=names,
        low_norms=frozenset(low),
    )


def _config_of_layer(config: Config, form: MtpForm, prefix: str) -> Config:
    changed = form.one_layer(text_config(config))
    if form.is_zoo:
        config = {**config, PREFIX_KEY: form.list_prefixes(config)[0]}
    if isinstance(text := config.get("text_config"), dict):
        config = {**config, "text_config": {**text, **changed}}
    else:
        config = {**config, **changed}
    for key in ("quantization", "quantization_config"):
        if isinstance(config.get(key), dict):
            config[key] = {
                (form.rename(name, prefix) or name) if name.startswith(prefix) else name: value
                for name, value in config[key].items()
            }
    return config


def _rename(checkpoint: Checkpoint, form: MtpForm, prefix: str, family: str) -> dict[str, str]:
    names: dict[str, str] = {}
    if form.is_zoo:
        for name in checkpoint.tensors:
            if name.startswith(prefix):
                names[name] = f"{form.inside}{name.removeprefix(prefix)}"
            elif (match := _ZOO_SHARED.fullmatch(name)) is not None and (
                match["kind"] != "norm" or ZOO_DRAFTERS[family].has_models_norm
            ):
                names[name] = f"{_ZOO_PATHS[match['kind']]}.{match['leaf']}"
        return names
    for name in checkpoint.tensors:
        if name.startswith(prefix):
            # A stack of experts may be a parameter without a name of its own.
            path, _, leaf = name.rpartition(".")
            if (new := form.rename(path, prefix)) is not None:
                names[name] = f"{new}.{leaf}"
    kinds = {match[1] for name in names.values() if (match := _SHARED.fullmatch(name))}
    for name in checkpoint.tensors:
        match = _SHARED.fullmatch(name)
        if match is not None and match[1] not in kinds:
            names[name] = name
    return names


def _is_low_norm(name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and path.endswith(_LOW_NORMS)


def _is_written_by_mlx(file: Path) -> bool:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        metadata = json.loads(opened.read(length)).get("__metadata__")
    return isinstance(metadata, dict) and metadata.get("format") == "mlx"


def raise_norms(tensors: dict[str, mx.array], low_norms: Mapping[str, mx.array]) -> None:
    """Add 1 to norms that are stored less 1, in place, unless the family's conversion did."""
    for name, array in low_norms.items():
        if tensors[name] is array:
            tensors[name] = array + 1


class MtpInput(nn.Module):
    """Joins what a layer that drafts reads.

    Args:
        width: of a hidden state.
        eps: of the norms.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(width, eps=eps)
        self.hnorm = nn.RMSNorm(width, eps=eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)

    def __call__(self, embeddings: mx.array, hidden: mx.array) -> mx.array:
        """Of tokens, and of the tokens before them: [batch, length, width] twice -> the same."""
        joined = mx.concatenate([self.enorm(embeddings), self.hnorm(hidden)], axis=-1)
        return self.eh_proj(joined)


@cache
def with_mtp_input(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a model of one layer, with `draft_input`, which makes its input."""

    def build(self: Any, arguments: Any) -> None:
        base.__init__(self, arguments)  # type: ignore[call-arg]
        text = language_model(self)
        eps = next(getattr(text.args, name) for name in _EPS if hasattr(text.args, name))
        text[INPUT] = MtpInput(text.args.hidden_size, eps)

    return type(base.__name__, (base,), {"__init__": build})


def language_model(model: Any) -> Any:
    """The part of a model that has its layers and its output head."""
    return model.get("language_model", model)


def decoder(model: Any) -> Any:
    """The part of a model that makes hidden states of ids."""
    text = language_model(model)
    return text.get("backbone") or text.model


RecordStates = Callable[[mx.array], None]
"""Called with hidden states behind the final norm, [batch, length, width], or those that the
family's drafter reads, all streams of a token in one row."""


def find_embedding_name(decoder: Any) -> str:
    """Of the embedding of tokens in a decoder."""
    return next(name for name in _EMBEDDINGS if name in decoder)


def record_hidden_states(model: Any, record: RecordStates) -> None:
    """Have a model tell the hidden states of each pass, in place."""
    inner = decoder(model)
    drafter = ZOO_DRAFTERS.get(getattr(model, "_family", ""))
    if drafter is not None and drafter.streams:
        _add_call(inner[drafter.streams], lambda x, _: record(x.reshape(*x.shape[:2], -1)))
    else:
        _add_call(inner, lambda _, states: record(states))


def _add_call(module: nn.Module, tell: Callable[[mx.array, mx.array], None]) -> None:
    """Have a module tell its first input and its output."""
    kind = type(module)

    def call(self: Any, x: mx.array, *args: Any, **keywords: Any) -> mx.array:
        output: mx.array = kind.__call__(self, x, *args, **keywords)
        tell(x, output)
        return output

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def record_layer_outputs(model: Any, layers: Sequence[int], record: RecordStates) -> None:
    """Have a model tell what some of its layers give in each pass, in place.

    Args:
        layers: their numbers, ascending.
        record: called with the outputs of all, side by side: [batch, length, layers * width].
    """
    outputs: list[mx.array] = []

    def wrap(layer: Any) -> None:
        kind = type(layer)

        def call(self: Any, *args: Any, **keywords: Any) -> Any:
            output = kind.__call__(self, *args, **keywords)
            if self._number == 0:
                outputs.clear()
            # Some families give more beside it.
            outputs.append(output[0] if isinstance(output, tuple) else output)
            if self._number == len(layers) - 1:
                record(mx.concatenate(outputs, axis=-1))
                outputs.clear()
            return output

        layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})

    for number, index in enumerate(layers):
        layer = model.layers[index]
        layer._number = number
        wrap(layer)


def find_embedding(model: Any) -> Any | None:
    """The embedding of a model's tokens; None: it has none that is known."""
    text = language_model(model)
    inner = text.get("backbone") or text.get("model") or {}
    return next((inner[name] for name in _EMBEDDINGS if name in inner), None)


def find_head(model: Any) -> Any | None:
    """The output head of a model, or the embedding in its place; None: it has none that is
    known."""
    text = language_model(model)
    return text["lm_head"] if "lm_head" in text else find_embedding(model)
