"""Images for mlx-lm's language models: mlx-vlm's towers, rotary positions, embeddings.

Owns: loading a tower; the features of an image; passes of a model in which some tokens are of
images. What the families have in common: an image is a grid of tokens that a tower makes, a
position is time, row and column, and the first layers add features of deeper layers of the tower.
Does not know: formats of files, requests of a batch (`engine/batch.py`), which rank has the tower.
Invariant: a pass without images is mlx-lm's own, native kernels included; behind an image it is the
same with other positions. `tests/mlx/test_vision.py` compares with mlx-vlm.
Next: `image_settings.py`; `position_caches.py`, where a batch keeps the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_moe, qwen3_next
from mlx_lm.utils import infer_quant_config

from ..core.image import PromptImage, rotary_positions
from ..core.model_config import Config, text_config
from ..errors import CheckpointError
from ..extras import import_extra
from . import architecture, native_layers, zoo
from .checkpoint import Checkpoint
from .families import VISION_PREFIXES
from .image_settings import ImageSettings
from .position_caches import shift_of

_ATTENTION: dict[str, type[nn.Module]] = {
    "qwen3_vl_moe": qwen3_moe.Attention,
    "qwen3_5_moe": qwen3_next.Qwen3NextAttention,
}
SCORES_BYTES = 64 << 20  # of a tower's attention at a time, on a CPU
_SECTIONS_DEFAULT = (24, 20, 20)


def tower_bytes(checkpoint: Checkpoint) -> int:
    """Bytes in memory of a checkpoint's tower; see `load_tower`."""
    is_cpu, has_kernels = _is_on_cpu(), native_layers.is_supported()
    total = 0
    for tensor in checkpoint.vision_tensors.values():
        # Kernels take matrices as they are.
        widened = is_cpu and tensor.dtype in ("BF16", "F16")
        widened &= len(tensor.shape) < 2 or not has_kernels
        total += (tensor.stop - tensor.start) * (2 if widened else 1)
    return total


def _is_on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _vision_package(family: str) -> Any:
    return import_extra(f"mlx_vlm.models.{family}", "vlm")


def build_tower(config: Config, family: str) -> nn.Module:
    """A tower with random weights.

    Raises:
        CheckpointError: mlx-vlm refuses the config.
        InputError: it is not installed.
    """
    package = _vision_package(family)
    try:
        arguments = zoo.vlm_arguments(package, config)
        tower: nn.Module = package.VisionModel(arguments.vision_config)
    except Exception as error:  # whatever its code happens to raise
        raise CheckpointError(
            f"config.json: vision_config: this tower cannot be built: {error!r:.300}"
        ) from error
    return tower


def load_tower(checkpoint: Checkpoint, settings: ImageSettings, kernels: str = "auto") -> nn.Module:
    """The tower of a checkpoint, in memory. On a CPU it computes in float32, with native layers
    unless `kernels` is "mlx".

    Raises:
        CheckpointError: tensors missing, surplus or misshapen.
        InputError: mlx-vlm is not installed.
    """
    folder = checkpoint.folder
    with architecture.discard_random_init():
        tower = build_tower(checkpoint.config, settings.family)
    stored = checkpoint.vision_tensors
    weights: dict[str, mx.array] = {}
    for file in sorted({t.file for t in stored.values()}):
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        weights |= {f"vision_tower.{_local(n)}": a for n, a in arrays.items() if n in stored}
    try:
        weights = tower.sanitize(weights)
        named = [(name.removeprefix("vision_tower."), array) for name, array in weights.items()]
        names = dict(named)
        nn.quantize(
            tower,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized")
                and f"{path}.scales" in names
                and infer_quant_config(path, module, names)
            ),
        )
        tower.load_weights(named, strict=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: the tensors of the vision tower do not fit config.json: {error!s:.300}; "
            f"download it again, or serve it without images (--no-images)"
        ) from error
    tower.eval()
    if _is_on_cpu():
        if kernels != "mlx" and native_layers.is_supported():
            tower.patch_embed = _BlockLinear(tower.patch_embed.proj, (0, 4, 1, 2, 3))
            if "downsample" in tower:
                tower.downsample = _BlockLinear(tower.downsample, (0, 1, 2, 3))
            native_layers.install_native_layers(tower)
        else:
            tower.set_dtype(mx.float32)
        for block in tower.blocks:
            kind: Any = type(block.attn)
            _change_class(block.attn, _attention_in_blocks(kind))
    mx.eval(tower.parameters())
    return tower


class _BlockLinear(nn.Module):
    """A convolution of blocks that do not overlap: a linear layer. [blocks, ...] ->
    [blocks, width].

    Args:
        convolution: its weight is [width, ..., colors].
        order: of the weight's axes, as the values of a block come.
    """

    def __init__(self, convolution: nn.Module, order: Sequence[int]) -> None:
        super().__init__()
        weight = convolution.weight
        self.proj = nn.Linear(weight[0].size, weight.shape[0], bias="bias" in convolution)
        self.proj.weight = mx.contiguous(weight.transpose(*order).reshape(weight.shape[0], -1))
        if "bias" in convolution:
            self.proj.bias = convolution.bias

    def __call__(self, blocks: mx.array) -> mx.array:
        """See the class."""
        embedded: mx.array = self.proj(blocks.reshape(blocks.shape[0], -1))
        return embedded


@cache
def _attention_in_blocks(kind: type[nn.Module]) -> type[nn.Module]:
    """A tower's attention with scores of some patches at a time: on a CPU MLX makes all of them,
    gigabytes for a large image."""
    call: Any = kind.__call__
    fast = SimpleNamespace(scaled_dot_product_attention=_attend_in_blocks)
    own_mx = SimpleNamespace(**{**vars(mx), "fast": fast})
    names = {**call.__globals__, "ensure_fused_sdpa": _attend_in_blocks, "mx": own_mx}
    changed = FunctionType(call.__code__, names, call.__name__, call.__defaults__)
    return type(kind.__name__, (kind,), {"__call__": changed})


def _attend_in_blocks(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: mx.array | None = None,  # noqa: ARG001  (of one image nothing is masked)
) -> mx.array:
    """softmax(q k^T scale) v of [1, heads, patches, width]."""
    rows = max(1, SCORES_BYTES // (4 * k.shape[1] * k.shape[2]))
    parts = []
    for begin in range(0, q.shape[2], rows):
        part = q[:, :, begin : begin + rows]
        parts.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=scale))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=2)


def _local(name: str) -> str:
    return next(name.removeprefix(p) for p in VISION_PREFIXES if name.startswith(p))


def make_patches(image: PromptImage, settings: ImageSettings) -> np.ndarray:
    """The pixels of an image as its tower takes them: float32 [patches, values]."""
    side, merge, patch = settings.token_side, settings.merge_size, settings.patch_size
    shape = (image.rows * side, image.columns * side, 3)
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(shape).transpose(2, 0, 1)
    mean = np.array(settings.mean, np.float32)[:, None, None]
    deviation = np.array(settings.deviation, np.float32)[:, None, None]
    values = (pixels.astype(np.float32) * (1 / 255) - mean) / deviation
    frames = np.repeat(values[None], settings.temporal_patch_size, axis=0)
    tiles = frames.reshape(
        *(settings.temporal_patch_size, 3),
        *(image.rows, merge, patch, image.columns, merge, patch),
    )
    # Patches of a token side by side; in a patch colors, then frames, rows, columns.
    ordered = tiles.transpose(2, 5, 3, 6, 1, 0, 4, 7)
    return ordered.reshape(image.tokens * merge**2, -1)


class ImageEmbedder:
    """Makes the features of images, float32 [tokens, parts * width]: the first part is the
    embedding, the others are for the first layers.

    Args:
        settings: of the checkpoint.
        width: of the language model.
        depth: number of layers that take features.
        tower: None: another rank has it.
    """

    def __init__(
        self, settings: ImageSettings, width: int, depth: int, tower: nn.Module | None = None
    ) -> None:
        self.settings, self.width, self.depth = settings, width, depth
        self.tower = tower

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        settings: ImageSettings,
        *,
        has_tower: bool,
        kernels: str = "auto",
    ) -> ImageEmbedder:
        """The one of a checkpoint, with its tower or without; `kernels`: see `load_tower`."""
        config = checkpoint.config
        depth = len(config["vision_config"].get("deepstack_visual_indexes") or ())
        tower = load_tower(checkpoint, settings, kernels) if has_tower else None
        return cls(settings, text_config(config)["hidden_size"], depth, tower)

    def shape(self, image: PromptImage) -> tuple[int, int]:
        """Of an image's features."""
        return image.tokens, (1 + self.depth) * self.width

    def embed(self, image: PromptImage) -> mx.array:
        """The features of an image; only where the tower is."""
        assert self.tower is not None
        merge = self.settings.merge_size
        patches = mx.array(make_patches(image, self.settings))
        grid = mx.array([[1, image.rows * merge, image.columns * merge]])
        dtype = mx.float32 if _is_on_cpu() else self.tower.patch_embed.proj.weight.dtype
        made = self.tower(patches.astype(dtype), grid)
        embedding, deeper = made if isinstance(made, tuple) else (made, [])
        features = mx.concatenate([embedding, *deeper], axis=-1).astype(mx.float32)
        assert features.shape == self.shape(image), f"{features.shape} for {self.shape(image)}"
        return features


@dataclass
class _Pass:
    """What one pass of a model has of images.

    Args:
        shift: what is added to the positions, of all or of each request; None: nothing.
        positions: [3, length], in the place of positions that count up; None: they do.
        added: what the first layers add, [length, width] each.
    """

    shift: int | mx.array | None = None
    positions: mx.array | None = None
    added: list[mx.array] = field(default_factory=list)


class ImageModel:
    """A language model that can be called with images.

    It changes the classes of the model and some of its modules, in place; after native layers were
    installed.

    Args:
        model: loaded.
        family: one of `image_settings.IMAGE_FAMILIES`.
        config: config.json.
        depth: see `ImageEmbedder`.
    """

    def __init__(self, model: nn.Module, family: str, config: Config, depth: int) -> None:
        self.model, self._pass = model, _Pass()
        self._layers = model.layers
        scaling = _rope_scaling(text_config(config))
        sections = scaling.get("mrope_section") or _SECTIONS_DEFAULT
        is_vlm = isinstance(model, zoo.TextModel)  # its attention takes positions as they are
        for layer in self._layers if not is_vlm else ():
            if (attention := layer.get("self_attn")) is not None:
                attention.rope = _ImageRope(attention.rope, sections, self._pass)
                kind: Any = type(attention)
                _change_class(attention, _image_attention(kind, _ATTENTION[family]))
                attention.image_pass = self._pass
        for index, layer in enumerate(self._layers[:depth]):
            kind = type(layer)
            _change_class(layer, _image_layer(kind))
            layer.image_pass, layer.image_index = self._pass, index
        kind = type(model)
        _change_class(model, _positioned_model(kind) if is_vlm else _image_model(kind))
        model.image_pass = self._pass

    def __call__(
        self,
        tokens: Sequence[int],
        begin: int,
        images: Sequence[tuple[PromptImage, mx.array]],
        caches: list[Any],
    ) -> mx.array:
        """Logits [1, length, vocabulary] of a part of a prompt that has tokens of images.

        Args:
            tokens: of the part.
            begin: its position in the prompt.
            images: of the prompt up to the end of the part, each with its features.
            caches: of the tokens before.
        """
        end = begin + len(tokens)
        ids = mx.array([tokens])
        embedded = self.model.language_model.model.embed_tokens(ids)[0]
        width = embedded.shape[-1]
        pieces: list[Sequence[mx.array]] = []
        at = begin
        for image, features in images:
            if image.end <= begin or image.begin >= end:
                continue
            first, last = max(image.begin, begin), min(image.end, end)
            pieces.append([embedded[at - begin : first - begin]])
            own = features[first - image.begin : last - image.begin].astype(embedded.dtype)
            pieces.append(tuple(mx.split(own, own.shape[-1] // width, axis=-1)))
            at = last
        pieces.append([embedded[at - begin :]])
        depth = max(len(piece) for piece in pieces)
        known = [image for image, _ in images]
        state = self._pass
        state.positions = mx.array(rotary_positions(known, begin, end))
        state.added = [
            mx.concatenate([p[i] if len(p) > 1 else mx.zeros_like(p[0]) for p in pieces])
            for i in range(1, depth)
        ]
        joined = mx.concatenate([piece[0] for piece in pieces])
        try:
            logits: mx.array = self.model(ids, cache=caches, input_embeddings=joined[None])
            return logits
        finally:
            state.positions, state.added = None, []


def _rope_scaling(config: Config) -> dict[str, Any]:
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(name), dict):
            return dict(config[name])
    return {}


def _change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


class _ImageRope(nn.Module):
    """Rotary embedding, of given positions in a pass with images: frequency i turns with the time,
    the row or the column, in turns."""

    def __init__(self, rope: nn.Module, sections: Sequence[int], state: _Pass) -> None:
        super().__init__()
        self._rope, self._pass = rope, state
        half = rope.dims // 2
        axes = np.zeros(half, np.int32)
        for axis in (1, 2):
            axes[axis : min(3 * sections[axis], half) : 3] = axis
        self._axes = mx.array(axes)
        exponents = mx.arange(0, rope.dims, 2, dtype=mx.float32) / rope.dims
        self._frequencies = 1.0 / (rope.base**exponents)

    def __call__(self, x: mx.array, offset: Any = 0) -> mx.array:
        """x [batch, heads, length, dims] -> the same, turned."""
        positions = self._pass.positions
        if positions is None:
            turned: mx.array = self._rope(x, offset=offset)
            return turned
        angles = positions[self._axes].T.astype(mx.float32) * self._frequencies  # [length, half]
        cosine, sine = mx.cos(angles).astype(x.dtype), mx.sin(angles).astype(x.dtype)
        half = angles.shape[-1]
        first, second, rest = mx.split(x, [half, 2 * half], axis=-1)
        return mx.concatenate(
            [first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1
        )


class _ShiftedCache:
    """A cache whose tokens are at other positions than their places."""

    def __init__(self, inner: Any, shift: int | mx.array) -> None:
        self._inner, self._shift = inner, shift

    @property
    def offset(self) -> Any:
        """The position of the next token."""
        return self._inner.offset + self._shift

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@cache
def _image_attention(kind: type[nn.Module], plain: type[nn.Module]) -> type[nn.Module]:
    """A class of attention that looks at the pass.

    Args:
        kind: of the model now, perhaps native.
        plain: mlx-lm's, which calls its `rope`.
    """

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        state: _Pass = self.image_pass
        if state.positions is not None:
            return plain.__call__(self, x, mask, cache)
        if state.shift is not None and cache is not None:
            cache = _ShiftedCache(cache, state.shift)
        return kind.__call__(self, x, mask, cache)

    return type(kind.__name__, (kind,), {"__call__": call})


@cache
def _image_layer(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of layers that add features of images."""

    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        out = kind.__call__(self, *args, **keywords)
        added = self.image_pass.added
        return out + added[self.image_index] if added else out

    return type(kind.__name__, (kind,), {"__call__": call})


@cache
def _positioned_model(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of mlx-vlm's language models that are given the positions of images."""

    def call(
        self: Any, ids: mx.array, cache: Any = None, input_embeddings: mx.array | None = None
    ) -> Any:
        positions = self.image_pass.positions
        if positions is not None:
            positions = positions[:, None]
        elif (shift := shift_of(cache)) is not None:
            positions = self.text_positions(ids, cache, shift)
        return self.forward(ids, cache, positions, input_embeddings)

    return type(kind.__name__, (kind,), {"__call__": call})


@cache
def _image_model(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of models that take the positions behind images from the caches."""

    def call(self: Any, ids: mx.array, cache: Any = None, **keywords: Any) -> Any:
        state: _Pass = self.image_pass
        state.shift = shift_of(cache) if state.positions is None else None
        try:
            return kind.__call__(self, ids, cache=cache, **keywords)
        finally:
            state.shift = None

    return type(kind.__name__, (kind,), {"__call__": call})
