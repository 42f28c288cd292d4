"""Which format the quantized layers of a checkpoint have.

Owns: `find_quantized_layers`: a format is recognized by the names, types and shapes of a layer's
tensors, whatever the family; config.json says only what they do not tell.
Does not know: families, ranks, what the values mean.
Invariant: the tensors of a recognized layer fit together; a layer that is not understood is refused
with its name and a reason.
Next: `quantized_layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from ..core.model_config import Config
from ..errors import CheckpointError
from .disk_tables import is_table_tensor
from .fp8_layers import GROUPS as FP8_GROUPS
from .quantized_layers import AxisLayout, QuantizedLayers, StoredLayer, StoredTensor
from .tensor_info import TensorInfo
from .tensor_reader import TensorPiece, TensorView, read_piece

MARKERS = ("weight_scale_inv", "weight_scale", "weight_packed", "qweight", "weight_scale_2")
"""A layer that has one of these tensors is quantized."""
PUBLISHED_FORMATS = ("fp8", "compressed-tensors", "modelopt", "awq", "gptq")
"""What tools other than mlx-lm write, of any family."""
_LEAVES = (
    *("weight", "weight_global_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
    *("qzeros", "scales", "g_idx", "pre_quant_scale", *MARKERS),
)
# Beside quantized layers, for runtimes that quantize activations or the KV cache.
_IGNORED = (
    *("input_scale", "input_global_scale", "input_zero_point", "activation_scale"),
    *("output_scale", "k_scale", "v_scale", "q_scale", "prob_output_scale"),
)
_FLOATS = ("F32", "F16", "BF16")
_WORDS = ("I32", "U32")
_CODES = ("F8_E4M3", "U8", "I8")
_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUPS = (128, 64, 32)


def find_quantized_layers(
    folder: str,
    tensors: Mapping[str, TensorInfo],
    config: Config,
    settings: Config,
    own_formats: tuple[str, ...] = (),
) -> QuantizedLayers:
    """Recognize the layers that are quantized in other formats than MLX's own.

    Args:
        settings: the config's quantization_config.
        own_formats: see `Family`.

    Raises:
        CheckpointError: a format that is not supported, or tensors that do not fit together.
    """
    paths: dict[str, dict[str, TensorInfo]] = {}
    ignored = []
    for name, info in tensors.items():
        path, _, leaf = name.rpartition(".")
        if is_table_tensor(name):
            continue
        if leaf == "scale" and (weight := tensors.get(f"{path}.weight")) is not None:
            leaf = "weight_scale_inv" if weight.dtype in _CODES else leaf  # DeepSeek-V4's name
        if leaf in _LEAVES:
            paths.setdefault(path, {})[leaf] = info
        elif leaf in _IGNORED:
            ignored.append(name)
    recognizer = _Recognizer(folder, settings, _dtype_of(config))
    layers: dict[str, StoredLayer] = {}
    roles: dict[str, tuple[StoredLayer, str]] = {}
    for path, leaves in paths.items():
        if not any(marker in leaves for marker in MARKERS) or path.endswith(own_formats):
            continue
        layer = recognizer.recognize(path, leaves)
        layers[path] = layer
        used = {tensor.info.name: role for role, tensor in layer.tensors.items()}
        roles |= {name: (layer, role) for name, role in used.items()}
        ignored += [info.name for info in leaves.values() if info.name not in used]
    return QuantizedLayers(layers, roles, frozenset(ignored) if layers else frozenset())


def _dtype_of(config: Config) -> mx.Dtype:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in ("float32", "float16", "bfloat16"):
                return getattr(mx, part[key])
    return mx.bfloat16


@dataclass(frozen=True)
class _Recognizer:
    folder: str
    settings: Config
    dtype: mx.Dtype

    def recognize(self, path: str, leaves: dict[str, TensorInfo]) -> StoredLayer:
        if "pre_quant_scale" in leaves:
            raise self._error(path, "ModelOpt's AWQ (pre_quant_scale) is not supported")
        if "qweight" in leaves:
            return self._integers_by_column(path, leaves)
        weight, scale = self._pair(path, leaves)
        if "weight_packed" in leaves and weight.dtype in _WORDS:
            return self._packed_int(path, leaves, weight, scale)
        if weight.dtype == "U8" or (weight.dtype == "I8" and scale.dtype in ("U8", "F8_E8M0")):
            return self._fp4(path, leaves, weight, scale)
        if weight.dtype == "F8_E4M3":
            return self._fp8(path, weight, scale)
        if weight.dtype == "I8":
            return self._int8(path, leaves, weight, scale)
        raise self._error(
            path, f"expected weights of 4 or 8 bits beside scales, got {weight.dtype}"
        )

    def _error(self, path: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {path}: {reason}")

    def _pair(self, path: str, leaves: dict[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
        weight = leaves.get("weight_packed") or leaves.get("weight")
        scale = leaves.get("weight_scale_inv") or leaves.get("weight_scale")
        if weight is None or scale is None:
            missing = "weight" if weight is None else "weight_scale"
            raise self._error(
                path, f"expected {missing} beside {', '.join(leaves)}; download it again"
            )
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise self._error(path, f"expected a matrix, got {list(weight.shape)}")
        return weight, scale

    def _fp8(self, path: str, weight: TensorInfo, scale: TensorInfo) -> StoredLayer:
        outputs, inputs = weight.shape
        is_e8m0 = scale.dtype in ("U8", "F8_E8M0")
        if not is_e8m0 and scale.dtype not in _FLOATS:
            raise self._error(path, f"expected scales that are floats, got {scale.dtype}")
        rows, columns = self._scale_axes(path, weight.shape, scale)
        powers = is_e8m0 or self.settings.get("scale_fmt") == "ue8m0"
        # A scale of rows stays a float beside mxfp8's; scales of blocks must be powers of two.
        exact = inputs % 32 == 0 and (columns is None or (powers and columns.features % 32 == 0))
        tensors = {"weight": _matrix(weight), "scale": StoredTensor(scale, rows, columns)}
        if exact:
            return self._layer(path, "fp8", tensors, (outputs, inputs), "mxfp8", 8, 32)
        block = columns.features if columns is not None else 0
        groups = [g for g in FP8_GROUPS if block % g == 0 and inputs % g == 0]
        if block and groups and not is_e8m0:
            return self._layer(path, "fp8", tensors, (outputs, inputs), "fp8", 8, groups[0])
        return self._layer(path, "fp8", tensors, (outputs, inputs), "dense")

    def _scale_axes(
        self, path: str, size: tuple[int, ...], scale: TensorInfo
    ) -> tuple[AxisLayout | None, AxisLayout | None]:
        """How the scales of a matrix lie: one, one per row, or one per block."""
        (outputs, inputs), shape = size, scale.shape
        if shape in ((), (1,), (1, 1)):
            return None, None
        if shape in ((outputs,), (outputs, 1)):
            return AxisLayout(0), None
        for rows, columns in self._block_shapes(inputs, shape):
            if len(shape) == 2 and shape == (-(-outputs // rows), -(-inputs // columns)):
                return AxisLayout(0, rows), AxisLayout(1, columns)
        raise self._error(
            path,
            f"expected one scale, one for each of {outputs} rows, or one for each block of "
            f"{outputs} x {inputs} weights, got {list(shape)}; download it again",
        )

    def _block_shapes(self, inputs: int, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        stated = [self.settings.get("weight_block_size")]
        stated += [weights.get("block_structure") for weights in self._config_groups()]
        blocks = [
            (block[0], block[1])
            for block in stated
            if isinstance(block, list)
            and len(block) == 2
            and all(isinstance(n, int) and n > 0 for n in block)
        ]
        if len(shape) == 2 and shape[1] and inputs % shape[1] == 0:
            blocks.append((1, inputs // shape[1]))  # groups within rows
        return [*blocks, (128, 128)]

    def _config_groups(self) -> list[Config]:
        groups = self.settings.get("config_groups")
        members = groups.values() if isinstance(groups, dict) else []
        weights = [group.get("weights") for group in members if isinstance(group, dict)]
        return [entry for entry in weights if isinstance(entry, dict)]

    def _fp4(
        self, path: str, leaves: dict[str, TensorInfo], weight: TensorInfo, scale: TensorInfo
    ) -> StoredLayer:
        outputs, inputs = weight.shape[0], 2 * weight.shape[1]
        group, held = (16, "nvfp4") if scale.dtype == "F8_E4M3" else (32, "mxfp4")
        if scale.dtype not in ("F8_E4M3", "U8", "F8_E8M0"):
            raise self._error(
                path, f"expected scales of 8 bits beside 4-bit floats, got {scale.dtype}"
            )
        if inputs % group or scale.shape != (outputs, inputs // group):
            raise self._error(
                path,
                f"expected scales of [{outputs}, {inputs} / {group}] for {held}, got "
                f"{list(scale.shape)}; download it again",
            )
        tensors = {
            "weight": StoredTensor(weight, AxisLayout(0), AxisLayout(1, 2)),
            "scale": StoredTensor(scale, AxisLayout(0), AxisLayout(1, group)),
        }
        whole = leaves.get("weight_global_scale") or leaves.get("weight_scale_2")
        if whole is not None:
            if whole.shape not in ((), (1,), (1, 1)) or whole.dtype not in _FLOATS:
                raise self._error(
                    path,
                    f"expected one float that scales the tensor, got {whole.dtype} "
                    f"{list(whole.shape)}",
                )
            tensors["global_scale"] = StoredTensor(whole)
        divide = "weight_global_scale" in leaves
        return self._layer(path, held, tensors, (outputs, inputs), held, 4, group, divide=divide)

    def _int8(
        self, path: str, leaves: dict[str, TensorInfo], weight: TensorInfo, scale: TensorInfo
    ) -> StoredLayer:
        rows, columns = self._scale_axes(path, weight.shape, scale)
        tensors = {"weight": _matrix(weight), "scale": StoredTensor(scale, rows, columns)}
        zero = leaves.get("weight_zero_point")
        if zero is not None:
            if zero.shape != scale.shape:
                raise self._error(
                    path,
                    f"expected zero points like scales, {list(scale.shape)}, got "
                    f"{list(zero.shape)}",
                )
            tensors["zero"] = StoredTensor(zero, rows, columns)
        self._require_zero(path, zero)
        group = columns.features if columns is not None else weight.shape[1]
        return self._affine(path, "int8", tensors, weight.shape, 8, group, zero is None)

    def _packed_int(
        self, path: str, leaves: dict[str, TensorInfo], weight: TensorInfo, scale: TensorInfo
    ) -> StoredLayer:
        if "weight_g_idx" in leaves:
            raise self._error(path, "activation order (weight_g_idx) is not supported")
        outputs = weight.shape[0]
        bits, inputs = self._packed_size(path, leaves, weight, scale)
        rows, columns = self._scale_axes(path, (outputs, inputs), scale)
        tensors = {
            "weight": StoredTensor(weight, AxisLayout(0), AxisLayout.packed(1, bits)),
            "scale": StoredTensor(scale, rows, columns),
        }
        zero = leaves.get("weight_zero_point")
        if zero is not None:
            expected = (-(-outputs * bits // 32), scale.shape[1] if len(scale.shape) > 1 else 1)
            if zero.shape != expected or outputs % 32 or zero.dtype not in _WORDS:
                raise self._error(
                    path,
                    f"expected zero points {list(expected)} for {outputs} rows of {bits} bits, got "
                    f"{zero.dtype} {list(zero.shape)}",
                )
            tensors["zero"] = StoredTensor(zero, AxisLayout.packed(0, bits), columns)
        self._require_zero(path, zero)
        group = columns.features if columns is not None else inputs
        return self._affine(path, "int", tensors, (outputs, inputs), bits, group, zero is None)

    def _require_zero(self, path: str, zero: TensorInfo | None) -> None:
        groups = self._config_groups()
        if zero is None and groups and all(group.get("symmetric") is False for group in groups):
            raise self._error(
                path,
                "expected weight_zero_point, because config.json says that weights are not "
                "symmetric; download it again",
            )

    def _packed_size(
        self, path: str, leaves: dict[str, TensorInfo], weight: TensorInfo, scale: TensorInfo
    ) -> tuple[int, int]:
        """Bits and input features of packed integers."""
        outputs, words = weight.shape
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        sizes = set()
        for weights in self._config_groups():
            bits, group = weights.get("num_bits"), weights.get("group_size")
            if type(bits) is not int or bits not in _BITS or words * 32 % bits:
                continue
            inputs = words * 32 // bits
            if groups == 1 or (isinstance(group, int) and group * groups == inputs):
                sizes.add((bits, inputs))
        if len(sizes) == 1:
            return sizes.pop()
        shape = leaves.get("weight_shape")
        if shape is None or shape.shape != (2,) or shape.dtype not in ("I64", "I32"):
            raise self._error(path, "expected weight_shape, or a config.json that tells the bits")
        rows, inputs = cast(
            "list[int]", read_piece(TensorPiece(shape, TensorView((1, 2))))[0].tolist()
        )
        stated = rows, inputs
        fitting = [b for b in _BITS if stated == (outputs, words * 32 // b) and words * 32 % b == 0]
        if not fitting:
            raise self._error(
                path,
                f"expected packed weights of the shape that weight_shape has, {list(stated)}, got "
                f"{list(weight.shape)} words",
            )
        return fitting[0], inputs

    def _integers_by_column(self, path: str, leaves: dict[str, TensorInfo]) -> StoredLayer:
        weight, scale, zero = leaves["qweight"], leaves.get("scales"), leaves.get("qzeros")
        if scale is None or any(len(t.shape) != 2 or 0 in t.shape for t in (weight, scale)):
            raise self._error(path, "expected qweight and scales, two matrices; download it again")
        packed = (weight,) if zero is None else (weight, zero)
        if scale.dtype not in _FLOATS or any(t.dtype not in _WORDS for t in packed):
            types = ", ".join(t.dtype for t in (*packed, scale))
            raise self._error(
                path, f"expected words of 32 bits and scales that are floats, got {types}"
            )
        method = self.settings.get("quant_method")
        if method in ("auto-round", "intel/auto-round"):
            method = "awq" if "awq" in str(self.settings.get("packing_format")) else "gptq"
        if method not in ("awq", "gptq"):
            raise self._error(
                path, f"expected quant_method awq or gptq beside qweight, got {method!r}"
            )
        if method == "awq":
            return self._awq(path, weight, scale, zero)
        return self._gptq(path, leaves.get("g_idx"), weight, scale, zero)

    def _awq(
        self, path: str, weight: TensorInfo, scale: TensorInfo, zero: TensorInfo | None
    ) -> StoredLayer:
        groups, outputs = scale.shape
        version = self.settings.get("version") or self.settings.get("format") or "gemm"
        if str(version).lower() != "gemm":
            raise self._error(path, f"AWQ of version {version!r} is not supported; only gemm is")
        inputs = weight.shape[0]
        expected = (groups, outputs // 8)
        fits = weight.shape[1] * 8 == outputs and inputs % groups == 0
        fits = fits and (zero is not None or self.settings.get("zero_point") is False)
        if not fits or (zero is not None and zero.shape != expected):
            raise self._error(
                path,
                f"expected AWQ's 4-bit qweight [in, {outputs} / 8] and qzeros {list(expected)}, "
                f"got {list(weight.shape)} and {list(zero.shape) if zero else None}",
            )
        rows = AxisLayout(1, 8)
        columns = AxisLayout(0, inputs // groups)
        tensors = {
            "weight": StoredTensor(weight, rows, AxisLayout(0)),
            "scale": StoredTensor(scale, AxisLayout(1), columns),
        }
        if zero is not None:
            tensors["zero"] = StoredTensor(zero, rows, columns)
        return self._affine(
            path, "awq", tensors, (outputs, inputs), 4, inputs // groups, zero is None
        )

    def _gptq(
        self,
        path: str,
        index: TensorInfo | None,
        weight: TensorInfo,
        scale: TensorInfo,
        zero: TensorInfo | None,
    ) -> StoredLayer:
        groups, outputs = scale.shape
        layout = self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq"
        if layout not in ("gptq", "gptq_v2"):
            raise self._error(path, f"GPTQ's checkpoint_format {layout!r} is not supported")
        stated = self.settings.get("bits")
        words = weight.shape[0]
        inputs = index.shape[0] if index is not None and len(index.shape) == 1 else 0
        if not inputs and type(stated) is int and stated in _BITS:
            inputs = words * 32 // stated
        bits = words * 32 // inputs if inputs else 0
        fits = bits in _BITS and words * 32 == inputs * bits and weight.shape[1] == outputs
        if not fits or inputs % groups or zero is None:
            raise self._error(
                path,
                f"expected GPTQ's qweight [in * bits / 32, {outputs}] and qzeros, got "
                f"{list(weight.shape)} for {inputs} inputs in {groups} groups",
            )
        expected = (groups, -(-outputs * bits // 32))
        if zero.shape != expected or (outputs * bits) % 32:
            raise self._error(path, f"expected qzeros {list(expected)}, got {list(zero.shape)}")
        act_order = index is not None and self.settings.get("desc_act") is True and groups > 1
        group = inputs // groups
        columns = None if act_order else AxisLayout(0, group)
        tensors = {
            "weight": StoredTensor(weight, AxisLayout(1), AxisLayout.packed(0, bits)),
            "scale": StoredTensor(scale, AxisLayout(1), columns),
            "zero": StoredTensor(zero, AxisLayout.packed(1, bits), columns),
        }
        if index is not None and groups > 1:
            tensors["g_idx"] = StoredTensor(index, None, AxisLayout(0))
        offset = 1 if layout == "gptq" else 0
        symmetric = self.settings.get("sym") is True
        size = (outputs, inputs)
        if act_order:
            return self._layer(
                path, "gptq", tensors, size, "dense", bits, zero_offset=offset, act_order=True
            )
        return self._affine(path, "gptq", tensors, size, bits, group, symmetric, zero_offset=offset)

    def _affine(
        self,
        path: str,
        kind: str,
        tensors: dict[str, StoredTensor],
        size: tuple[int, ...],
        bits: int,
        stored_group: int,
        symmetric: bool,
        **options: Any,
    ) -> StoredLayer:
        scale = tensors["scale"].info
        if scale.dtype not in _FLOATS:
            raise self._error(path, f"expected scales that are floats, got {scale.dtype}")
        group = next((g for g in _AFFINE_GROUPS if stored_group % g == 0), None)
        if group is None:
            raise self._error(
                path,
                f"expected groups of a multiple of 32 weights, got {stored_group}; MLX has no "
                f"such layout",
            )
        return self._layer(
            path, kind, tensors, size, "affine", bits, group, symmetric=symmetric, **options
        )

    def _layer(
        self,
        path: str,
        kind: str,
        tensors: dict[str, StoredTensor],
        size: tuple[int, ...],
        held: str,
        bits: int = 0,
        group_size: int = 0,
        **options: Any,
    ) -> StoredLayer:
        outputs, inputs = size
        return StoredLayer(
            path, kind, tensors, outputs, inputs, held, self.dtype, bits, group_size, **options
        )


def _matrix(info: TensorInfo) -> StoredTensor:
    return StoredTensor(info, AxisLayout(0), AxisLayout(1))
