"""The native kernels against plain MLX, and models that use them against the same without."""

import json
from itertools import product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import deepseek_v41, gemma4_text, gpt_oss, kimi_k3, step3p5
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from one_process import load_rank, spec_of, tiny_model

from cenacle import native
from cenacle.collective.base import RoutingDecision
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.model.expert_parallel import CompactedExperts, NativeExperts, reference_experts
from cenacle.model.families import list_families
from cenacle.model.step_timer import StepTimer
from cenacle.model.synth import synth
from cenacle.model.zoo import WeightedExperts
from cenacle.planning import load_balancer
from support.products import in_turn

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason())
KERNELS = native.extension().available_kernels() if native.is_available() else []
FLOATS = [mx.float32, mx.bfloat16, mx.float16]
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
AFFINE = [*product(BITS, GROUPS)]
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 64, 65, 70)
# Of the norm: float sums, activations of 16 bits, and of 8.
EXACT, ROUNDED, COARSE = 1e-6, 6e-5, 1e-2
RUNNABLE = [row.name for row in list_families() if row.refused is None]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def quantized(w: mx.array, bits: int, group: int, mode: str = "affine"):
    """The kernels' weights and the same as a float32 matrix."""
    rows = w.shape[0]
    # MLX makes nvfp4 of whole groups of 32 numbers only, whatever the width.
    q, s, *b = mx.quantize(mx.pad(w, ((0, rows % 2), (0, 0))), group, bits, mode=mode)
    wide = [a.astype(mx.float32) for a in (s, *b)] if b else [s]
    exact = mx.dequantize(q, *wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
    q, s, *b = (mx.contiguous(a[:rows]) for a in (q, s, *b))
    made = native.extension().Weights(q, s, b[0] if b else None, None, bits, group, mode)
    return made, exact[:rows]


def packs(kernels, bits: int, mode: str) -> bool:
    """Whether the selected kernels keep such a matrix packed."""
    sets = ("vnni", "avx2") if bits == 4 or mode == "affine" else ("vnni",)
    return kernels.selected_kernels() in sets


def assert_close(got: mx.array, x: mx.array, w: mx.array, tolerance: float) -> None:
    expected = np.array(x, np.float64) @ np.array(w, np.float64).T
    assert got.shape == expected.shape
    assert got.dtype == mx.float32
    # What an output is made of, not the output, which may be a small difference.
    scale = np.linalg.norm(x) * np.linalg.norm(w) / x.shape[-1] ** 0.5
    assert np.linalg.norm(np.array(got) - expected) <= tolerance * scale


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 20), (37, 96), (100, 515), (64, 2048)])
def test_float_layer(kernels, dtype, rows, width):
    w = normal(rows, width).astype(dtype)
    made = kernels.Weights(w, None, None, None, 0, 0, "")
    for tokens in TOKENS:
        x = normal(tokens, width, seed=tokens)
        assert_close(kernels.linear(x, made), x, w.astype(mx.float32), EXACT)


def dtypes_of(bits: int, group: int, kernels: str) -> list[mx.Dtype]:
    return in_turn(FLOATS, BITS.index(bits) + GROUPS.index(group) + KERNELS.index(kernels))


def test_all_bits_have_every_type_with_all_kernels():
    for bits, kernels in product(BITS, KERNELS):
        assert {t for group in GROUPS for t in dtypes_of(bits, group, kernels)} == set(FLOATS)


@pytest.mark.parametrize(("bits", "group"), AFFINE)
def test_quantized_layer(kernels, bits, group):
    shapes = [(5, group), (33, 3 * group), (100, 10 * group), (64, 1024)]
    dtypes = dtypes_of(bits, group, kernels.selected_kernels())
    for (rows, width), dtype in product(shapes, dtypes):
        made, w = quantized(normal(rows, width).astype(dtype), bits, group)
        for tokens in TOKENS:
            x = normal(tokens, width, seed=tokens)
            assert_close(kernels.linear(x, made), x, w, ROUNDED)


FLOAT_FORMATS = [(4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8")]


@pytest.mark.parametrize(("bits", "group", "mode"), FLOAT_FORMATS)
def test_quantized_floats(kernels, bits, group, mode):
    # mxfp8 is multiplied as floats, and so is anything by the portable kernels.
    exact = mode == "mxfp8" or kernels.selected_kernels() == "portable"
    for rows, groups in [(5, 1), (33, 3), (100, 10), (64, 32), (17, 13)]:
        made, w = quantized(normal(rows, groups * group), bits, group, mode)
        for tokens in (*TOKENS, 33):
            x = normal(tokens, groups * group, seed=tokens)
            assert_close(kernels.linear(x, made), x, w, EXACT if exact else ROUNDED)


def e4m3_with_scales(rows: int, width: int, group: int, dtype: mx.Dtype):
    """All codes of e4m3 but NaN, with a float for each group: words, scales and the matrix."""
    random = np.random.default_rng(rows)
    codes = random.integers(0, 127, (rows, width)) | random.integers(0, 2, (rows, width)) * 128
    words = mx.array(codes.astype(np.uint8))
    scales = (normal(rows, width // group) / 64).astype(dtype)
    matrix = mx.from_fp8(words, mx.float32) * mx.repeat(scales.astype(mx.float32), group, axis=1)
    return words.view(mx.uint32), scales, matrix


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_e4m3_with_scales_of_floats(kernels, group, dtype):
    for rows, groups in [(5, 1), (33, 3), (64, 8)]:
        words, scales, w = e4m3_with_scales(rows, groups * group, group, dtype)
        made = kernels.Weights(words, scales, None, None, 8, group, "fp8")
        for tokens in (1, 2, 8, 33):
            x = normal(tokens, groups * group, seed=tokens)
            assert_close(kernels.linear(x, made), x, w, EXACT)


@pytest.mark.parametrize(("bits", "group", "mode"), [*FLOAT_FORMATS, (4, 64, "affine")])
def test_a_scale_of_rows_comes_before_the_bias(kernels, bits, group, mode):
    q, s, *b = mx.quantize(normal(37, 192), group, bits, mode=mode)
    arguments = (q, s, b[0] if b else None)
    plain = kernels.Weights(*arguments, None, bits, group, mode)
    scale, bias, x = normal(37, seed=1), normal(37, seed=2), normal(9, 192, seed=3)
    made = kernels.Weights(*arguments, bias, bits, group, mode, output_scale=scale)
    expected = np.array(kernels.linear(x, plain)) * np.array(scale) + np.array(bias)
    assert np.allclose(kernels.linear(x, made), expected, rtol=1e-6, atol=1e-6)
    ids = mx.array([3, 36, 0])
    rows = np.array(kernels.embed(ids, plain)) * np.array(scale)[np.array(ids), None]
    assert np.array_equal(kernels.embed(ids, made), rows)


@pytest.mark.parametrize(("bits", "group", "mode"), FLOAT_FORMATS)
def test_rows_of_quantized_floats(kernels, bits, group, mode):
    made, w = quantized(normal(37, 4 * group), bits, group, mode)
    ids = mx.array([36, 0, 17, 17])
    assert np.array_equal(kernels.embed(ids, made), np.array(w)[np.array(ids)])
    back = made.arrays()
    assert len(back) == (2 if packs(kernels, bits, mode) else 0)
    if back:
        again = mx.dequantize(*back, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        assert mx.array_equal(again, w)


@pytest.mark.parametrize(("bits", "group", "mode"), [(4, 16, "nvfp4"), (8, 32, "mxfp8")])
def test_nan_among_weights_has_no_kernels(kernels, bits, group, mode):
    q, s = mx.quantize(normal(37, 192), group, bits, mode=mode)
    codes = q.view(mx.uint8) if mode == "mxfp8" else s
    codes[36, -1] = 0xFF
    parts = (codes.view(mx.uint32), s) if mode == "mxfp8" else (q, codes)
    with pytest.raises(ValueError, match="NaN"):
        kernels.Weights(*parts, None, None, bits, group, mode)


@pytest.fixture
def int8(kernels):
    kernels.set_activation_bits(8)
    yield kernels
    kernels.set_activation_bits(16)


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(4, 64, "affine"), (8, 32, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4")],
)
def test_int8_activations(int8, bits, group, mode):
    rounds = packs(int8, bits, mode) and (bits == 4 or int8.selected_kernels() == "vnni")
    for rows, width in [(33, 3 * group), (64, 1024)]:
        made, w = quantized(normal(rows, width), bits, group, mode)
        for tokens in TOKENS:
            x = normal(tokens, width, seed=tokens)
            got = int8.linear(x, made)
            assert_close(got, x, w, COARSE if rounds else ROUNDED)
    exact = np.array(x) @ np.array(w).T
    coarse = np.linalg.norm(np.array(got) - exact) > ROUNDED * np.linalg.norm(exact)
    assert coarse == rounds  # nowhere else are there kernels for it


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_arrays_can_be_unpacked(kernels, bits):
    q, s, b = mx.quantize(normal(3, 20, 128), 64, bits)
    back = kernels.Weights(q, s, b, None, bits, 64, "affine").arrays()
    assert len(back) == (3 if packs(kernels, bits, "affine") else 0)
    assert all(mx.array_equal(x, y) for x, y in zip(back, (q, s, b), strict=False))


@pytest.mark.parametrize("bits", [4, 8])
def test_outlier_spoils_only_its_own_group(kernels, bits):
    x = np.array(normal(2, 512))
    x[0, 100] = 1e4
    rest = np.array(normal(64, 512))
    rest[:, 64:128] = 0  # the outlier's group does not matter to these rows
    q, s, b = mx.quantize(mx.array(rest), 64, bits)
    made = kernels.Weights(q, s, b, None, bits, 64, "affine")
    w = mx.dequantize(q, s, b, 64, bits)
    x = mx.array(x)
    small = mx.array(np.where(np.abs(np.array(x)) > 1e3, 0, np.array(x)))
    got, expected = np.array(kernels.linear(x, made)), np.array(small @ w.T)
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_passed_on_to_its_own_token(kernels, bad, bits):
    x = np.array(normal(3, 256))
    x[1, 70] = bad
    made, _ = quantized(normal(40, 256), bits, 64)
    finite = np.isfinite(np.array(kernels.linear(mx.array(x), made))).all(axis=1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize(("bits", "group", "mode"), [(4, 64, "affine"), *FLOAT_FORMATS])
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e30])
def test_values_at_the_ends_of_the_range(kernels, value, bits, group, mode):
    made, w = quantized(normal(40, 256), bits, group, mode)
    x = mx.full((2, 256), value)
    got, expected = np.array(kernels.linear(x, made)), np.array(x @ w.T)
    assert np.abs(got - expected).max() <= max(1e-4 * np.abs(expected).max(), 1e-30)


def test_bias_strides_types_and_shapes(kernels):
    w, bias = normal(24, 64), normal(24)
    made = kernels.Weights(w, None, None, bias, 0, 0, "")
    x = normal(64, 5, 3, seed=1).transpose(1, 2, 0)
    expected = np.array(x) @ np.array(w).T + np.array(bias)
    assert np.allclose(kernels.linear(x, made), expected, atol=1e-4)
    assert np.allclose(kernels.linear(x.astype(mx.bfloat16), made), expected, atol=0.3)
    assert kernels.linear(x[:0], made).shape == (0, 3, 24)


def test_every_number_of_threads_gives_the_same_bits(kernels, threads):
    x, w = normal(70, 512), normal(333, 512)
    layers = [quantized(w, 4, 64)[0], quantized(w, 3, 64)[0]]
    layers.append(kernels.Weights(w.astype(mx.bfloat16), None, None, None, 0, 0, ""))
    seen = []
    for n in (1, 2, 3, 7):
        threads(n)
        seen.append([np.array(kernels.linear(x, layer)).tobytes() for layer in layers])
    assert all(s == seen[0] for s in seen)


def test_a_token_gives_the_same_bits_alone_and_among_others(kernels):
    x, w = normal(9, 512), normal(50, 512)
    for layer in (quantized(w, 4, 64)[0], quantized(w, 8, 32)[0]):
        whole = np.array(kernels.linear(x, layer))
        for t in range(9):
            assert np.array_equal(np.array(kernels.linear(x[t : t + 1], layer))[0], whole[t])


def test_unsupported_input_is_rejected():
    weights = native.extension().Weights
    w = normal(8, 64)
    q, s, b = mx.quantize(w, 64, 4)
    for arguments in (
        (w.T, None, None, None, 0, 0, ""),  # strided
        (w.astype(mx.int32), None, None, None, 0, 0, ""),
        (q, s, b, None, 7, 64, "affine"),
        (q, s, b, None, 8, 64, "affine"),
        (q, s, None, None, 4, 64, "affine"),
        (q, s, b, None, 4, 64, "nvfp4"),
        (w, None, None, normal(7), 0, 0, ""),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            weights(*arguments)
    with pytest.raises(ValueError, match="width 64"):
        native.extension().linear(normal(1, 32), weights(w, None, None, None, 0, 0, ""))
    with pytest.raises(ValueError, match="no kernels named"):
        native.extension().select_kernels("abacus")


# ---- experts ------------------------------------------------------------------------------------

WIDTH, HIDDEN, COUNT = 128, 64, 6
GATED = [
    None,
    gpt_oss.SwigluOAI(),
    gemma4_text.GeGLU(),
    deepseek_v41.DeepseekV41SwiGLU(0.7),
    deepseek_v41.DeepseekV41SwiGLU(0.0),
    step3p5.ClampedSwiGLU(0.5),
    kimi_k3.SiTU(1.5),
    kimi_k3.SiTU(1.5, 0.7),
]
PLAIN = [None, nn.GELU(approx="none"), nn.GELU(approx="fast"), nn.ReLU2()]
KINDS = [(SwitchGLU, a) for a in GATED] + [(SwitchMLP, a) for a in PLAIN]


def stack(kind, act, bias=False, bits=None, dtype=mx.float32, mode="affine") -> nn.Module:
    mx.random.seed(7)
    experts = kind(WIDTH, HIDDEN, COUNT, bias=bias, **({} if act is None else {"activation": act}))
    for name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"):
        if name in experts:
            experts[name].weight = experts[name].weight * 3
            if bias:
                experts[name].bias = mx.random.normal(experts[name].bias.shape)
    experts.set_dtype(dtype)
    if bits:
        nn.quantize(experts, group_size=16 if mode == "nvfp4" else 32, bits=bits, mode=mode)
    return experts


def check(experts: nn.Module, held, tokens: int, k: int, tolerance: float) -> None:
    """`held` of the whole stack through `NativeExperts`, against the reference in float32."""
    random = np.random.default_rng(tokens)
    ids = mx.array(np.stack([random.permutation(COUNT)[:k] for _ in range(tokens)]))
    x = normal(1, tokens, WIDTH)
    expected = np.array(reference_experts(experts, x, ids[None], held))
    part = NativeExperts(stacked_rows(experts, held), held, COUNT, 0, StepTimer())
    got = np.array(part(x, ids[None].astype(mx.uint32)))
    assert got.shape == expected.shape
    assert np.linalg.norm(got - expected) <= tolerance * max(np.linalg.norm(expected), 1e-6)
    assert not got[0][~np.isin(np.array(ids), held)].any()


def stacked_rows(experts: nn.Module, held) -> nn.Module:
    part = type(experts)(WIDTH, HIDDEN, COUNT, activation=experts.activation)
    for name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"):
        if name in experts:
            part[name] = experts[name]
            kept = {k: v[mx.array(list(held))] for k, v in experts[name].parameters().items()}
            part[name] = _copy(experts[name], kept)
    return part


def _copy(layer: nn.Module, arrays) -> nn.Module:
    twin = type(layer).__new__(type(layer))
    nn.Module.__init__(twin)
    for key in ("bits", "group_size", "mode"):
        if hasattr(layer, key):
            setattr(twin, key, getattr(layer, key))
    for key, value in arrays.items():
        twin[key] = value
    return twin


@pytest.mark.parametrize(
    "tokens", [1, 4, 8, 40]
)  # few and many for an expert: tasks of other lengths
def test_experts_give_the_same_bits_on_every_number_of_threads(kernels, threads, tokens):
    mx.random.seed(7)
    experts = SwitchGLU(128, 416, COUNT)
    nn.quantize(experts, group_size=32, bits=4)
    part = NativeExperts(experts, range(COUNT), COUNT, 0, StepTimer())
    x, ids = normal(1, tokens, 128), mx.random.randint(0, COUNT, (1, tokens, 2)).astype(mx.uint32)
    seen = []
    for n in (1, 2, 3, 7):
        threads(n)
        seen.append(np.array(part(x, ids)).tobytes())
    assert all(s == seen[0] for s in seen)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "act"), KINDS)
def test_every_activation(kernels, kind, act, bias):
    experts = stack(kind, act, bias)
    assert NativeExperts.supports(experts)
    for tokens in (1, 5, 70):
        check(experts, (0, 2, 3), tokens, 2, 2e-6)


@pytest.mark.parametrize(
    "mode",
    [(2, "affine"), (4, "affine"), (6, "affine"), (4, "mxfp4"), (4, "nvfp4"), (8, "mxfp8")],
)
@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
def test_quantized_experts(kernels, kind, mode):
    experts = stack(kind, None, True, mode[0], mode=mode[1])
    for held in [(0, 1), (2, 3, 4), (5,), tuple(range(COUNT))]:
        for tokens in (1, 3, 70):
            check(experts, held, tokens, 4, 3e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_experts_of_half_floats(kernels, dtype):
    experts, exact = stack(SwitchGLU, None, True, None, dtype), stack(SwitchGLU, None, True)
    exact.update(experts.parameters())
    exact.set_dtype(mx.float32)
    x, ids = normal(1, 4, WIDTH), mx.array([[[0, 1], [2, 3], [4, 5], [5, 0]]])
    got = NativeExperts(experts, range(COUNT), COUNT, 0, StepTimer())(x, ids)
    assert mx.abs(got - exact(x, ids)).max() <= 1e-5 * mx.abs(got).max()


def test_expert_id_out_of_range_is_an_error_and_the_stream_stays_usable(kernels):
    part = NativeExperts(stack(SwitchGLU, None), range(COUNT), COUNT, 0, StepTimer())
    x = normal(1, 1, WIDTH)
    with pytest.raises(RuntimeError, match="expert id 9"):
        mx.eval(part(x, mx.array([[[9, 0]]])))
    assert mx.isfinite(part(x, mx.array([[[1, 0]]]))).all()


def test_unknown_activation_stays_on_plain_mlx():
    assert not NativeExperts.supports(stack(SwitchMLP, nn.Tanh()))


# ---- models -------------------------------------------------------------------------------------

PROMPT = [(37 * i + 11) % 251 for i in range(24)]


def both(folder):
    """(logits, greedy tokens) of a checkpoint with the kernels and without.

    Experts that round between their layers (deepseek_v41) have none.
    """
    plan, results = Plan.whole(spec_of(folder), 1), []
    for kernels in ("native", "mlx"):
        model = load_rank(folder, plan, SingleRank(), kernels=kernels)
        kinds = {type(m) for m in model.modules()}
        assert (NativeExperts in kinds) == (kernels == "native" and WeightedExperts not in kinds)
        assert (CompactedExperts in kinds) != (NativeExperts in kinds)
        logits = model(mx.array([PROMPT]))
        assert logits.dtype == mx.float32
        steps = generate_step(mx.array(PROMPT), model, max_tokens=3, prefill_step_size=16)
        results.append((logits, [token for token, _ in steps]))
    return results


def error(got: mx.array, expected: mx.array) -> float:
    return float(mx.abs(got - expected).max() / mx.abs(expected).max())


def do_not_round(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """deepseek_v41 rounds to 8 and 4 bits, so that a small difference may become a step."""
    if family == "deepseek_v41":
        monkeypatch.setattr("mlx_vlm.models.deepseek_v41.fakequant.DISABLE", True)


@pytest.mark.parametrize("family", RUNNABLE)
def test_every_family_in_float32(family, monkeypatch):
    do_not_round(family, monkeypatch)
    (got, tokens), (want, expected) = both(tiny_model(family))
    # jamba's recurrence makes more of float32's own rounding, natively or not.
    assert error(got, want) <= (5e-5 if family == "jamba" else 1e-5)
    assert tokens == expected


class RecordedRouting(SingleRank):
    """Remembers which experts each token chose."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[mx.array] = []

    def _all_sum(self, x: mx.array, routing: RoutingDecision | None) -> mx.array:
        if routing is not None:
            self.chosen.append(mx.sort(routing.ids.reshape(len(PROMPT), -1), axis=-1))
        return x


def logits_and_routing(folder: Path, kernels: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [tokens, vocabulary], and each layer's experts [tokens, k]."""
    plan, recorded = Plan.whole(spec_of(folder), 1), RecordedRouting()
    model = load_rank(folder, plan, recorded, kernels=kernels)
    recorded.chosen.clear()
    logits = np.array(model(mx.array([PROMPT])).astype(mx.float32))
    return logits[0], [np.array(ids) for ids in recorded.chosen]


def attend_to_all(folder: Path) -> None:
    """Let the indexer, if there is one, choose all positions: rounding could change its choice."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {})):
        if "index_topk" in part:
            part["index_topk"] = 64
    path.write_text(json.dumps(config))


# The largest that was measured: 1.1e-3 and 1.6e-5 (jamba 5.0e-3), 53 families, 4 and 8 bits, groups
# of 32 and 64, 3 seeds, AVX-512 and AVX2. Jamba's recurrence makes more of any rounding.
ROUNDED_LOGITS, EXACT_LOGITS = 2e-3, 5e-5
ROUNDED_LOGITS_OF = {"jamba": 1e-2}


BITS_AND_GROUPS = ((4, 32), (8, 64))
ROUNDED_CASES = [
    (family, *form)
    for number, family in enumerate(RUNNABLE)
    for form in in_turn(BITS_AND_GROUPS, number)
]


def test_every_family_is_rounded_and_both_formats_are():
    assert {family for family, *_ in ROUNDED_CASES} == set(RUNNABLE)
    assert {tuple(form) for _, *form in ROUNDED_CASES} == set(BITS_AND_GROUPS)


@pytest.mark.parametrize(("family", "bits", "group_size"), ROUNDED_CASES)
def test_rounding_of_activations_explains_quantized_logits(
    family, bits, group_size, tmp_path, monkeypatch
):
    """With the portable kernels, which do not round, nothing is left of the difference.

    Tokens count up to the first that chose another expert: from there on it is another sum.
    """
    do_not_round(family, monkeypatch)
    synth(tmp_path / "m", family=family, quantize=bits, group_size=group_size)
    attend_to_all(tmp_path / "m")
    expected, chosen = logits_and_routing(tmp_path / "m", "mlx")
    extension = native.extension()
    before = extension.selected_kernels()
    errors, compared = {}, {}
    try:
        for kernels in KERNELS:
            extension.select_kernels(kernels)
            got, natively_chosen = logits_and_routing(tmp_path / "m", "native")
            pairs = zip(chosen, natively_chosen, strict=True)
            same = np.all([(a == b).all(axis=-1) for a, b in pairs], axis=0)
            compared[kernels] = int(np.argmin([*same, False]))
            difference = np.abs(got - expected)[: compared[kernels]]
            errors[kernels] = float(difference.max(initial=0) / np.abs(expected).max())
    finally:
        extension.select_kernels(before)
    assert errors.pop("portable") <= EXACT_LOGITS
    assert compared["portable"] == len(PROMPT)
    assert max(errors.values(), default=0) <= ROUNDED_LOGITS_OF.get(family, ROUNDED_LOGITS)


@pytest.mark.parametrize(("activations", "most"), [(16, ROUNDED_LOGITS), (8, 0.15)])
def test_error_of_integer_activations_in_logits(activations, most, tmp_path):
    synth(tmp_path / "m", family="qwen3_moe", quantize=4, group_size=64)
    native.extension().set_activation_bits(activations)
    try:
        (got, _), (expected, _) = both(tmp_path / "m")
    finally:
        native.extension().set_activation_bits(16)
    assert error(got, expected) <= most


# Replicas


@pytest.mark.parametrize("seed", range(40))
def test_replicas_are_assigned_as_in_python(seed):
    random = np.random.default_rng(seed)
    ranks, experts = int(random.integers(1, 7)), int(random.integers(1, 40))
    holders = [
        sorted(random.permutation(ranks)[: random.integers(0, ranks + 1)].tolist())
        for _ in range(experts)
    ]
    speeds = random.integers(1, 1000, ranks).tolist()
    assigner = native.extension().ReplicaAssigner(holders, speeds, 0)
    for most in (2, 8, 200):
        counts = random.integers(0, most, experts).tolist()
        assert assigner.assign(counts) == load_balancer.assign_replicas(counts, holders, speeds)


def test_invalid_ranks_are_rejected():
    extension = native.extension()
    with pytest.raises(ValueError, match="holders: expected ranks that have a speed"):
        extension.ReplicaAssigner([[0, 2]], [1, 1], 0)
    with pytest.raises(ValueError, match="counts: expected one for every expert"):
        extension.ReplicaAssigner([[0]], [1], 0).assign([1, 2])
