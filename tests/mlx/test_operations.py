"""Norms, rotary positions, attention and logsumexp of ours against MLX's own compositions."""

from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gear

from cenacle import native
from cenacle.model import native_layers
from support.products import in_turn

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason())
KERNELS = native.extension().available_kernels() if native.is_available() else []
MLX = native_layers._MLX  # MLX's own, whatever the process uses now
TOLERANCE = 5e-6  # of the largest value: float32 sums in another order


@pytest.fixture
def random():
    return np.random.default_rng(0)


def normal(random, *shape: int) -> mx.array:
    return mx.array(random.standard_normal(shape).astype(np.float32))


def assert_close(got: mx.array, expected: mx.array, tolerance: float = TOLERANCE) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    scale = max(float(mx.abs(expected).max()), 1e-6)
    assert float(mx.abs(got - expected).max()) <= tolerance * scale


SHAPES = [(3, 7), (1, 1, 2048), (2, 5, 4, 96), (1000, 130), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_norms(kernels, random, shape):
    x, weight, bias = normal(random, *shape), normal(random, shape[-1]), normal(random, shape[-1])
    for strided in (x, mx.contiguous(x.swapaxes(0, -1)).swapaxes(0, -1), x[..., ::1]):
        for w in (weight, None, mx.repeat(weight, 2)[::2]):
            assert_close(kernels.rms_norm(strided, w, 1e-6), MLX["rms_norm"](x, w, 1e-6))
            for b in (bias, None):
                got = kernels.layer_norm(strided, w, b, 1e-5)
                assert_close(got, MLX["layer_norm"](x, w, b, 1e-5), 2e-5)


def test_logsumexp(kernels, random):
    for x in (normal(random, 3, 1001), normal(random, 2, 3, 64) * 50, mx.full((2, 5), -mx.inf)):
        for keepdims in (False, True):
            got = kernels.logsumexp(x, axis=-1, keepdims=keepdims)
            expected = MLX["logsumexp"](x, axis=-1, keepdims=keepdims)
            assert got.shape == expected.shape
            assert np.allclose(got, expected, rtol=1e-6)
    y = normal(random, 4, 6)
    assert np.allclose(kernels.logsumexp(y), MLX["logsumexp"](y))
    assert np.allclose(kernels.logsumexp(y, axis=0), MLX["logsumexp"](y, axis=0))


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [32, 64])
@pytest.mark.parametrize("offset", [0, 7, 30000, "each"])
@pytest.mark.parametrize("shape", [(1, 4, 1, 128), (2, 3, 5, 80), (2, 1, 300, 64), (3, 9, 64)])
def test_rope(kernels, random, shape, offset, dims, traditional):
    x = normal(random, *shape)
    if len(shape) == 4:
        x = mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)
    at = mx.arange(shape[0]) * 900 - 1 if offset == "each" else offset
    freqs = mx.abs(normal(random, dims // 2)) * 100 + 1
    for base, frequencies in ((1e6, None), (None, freqs)):
        args = {"traditional": traditional, "base": base, "scale": 0.5, "freqs": frequencies}
        got = kernels.rope(x, dims, offset=at, **args)
        assert_close(got, MLX["rope"](x, dims, offset=at, **args))


def mask_of(kind, random, batch: int, heads: int, length: int, keys: int):
    if kind == "window":
        rows, columns = np.arange(keys - length, keys)[:, None], np.arange(keys)
        return mx.array((columns <= rows) & (columns > rows - 40))
    if kind == "padded":  # as for prompts of unlike lengths; some queries see nothing at all
        left = np.arange(batch)[:, None, None, None] * (keys // 2)
        rows = np.arange(keys - length, keys)[:, None]
        return mx.array((np.arange(keys) >= left) & (np.arange(keys) <= rows))
    if kind == "added":
        return normal(random, batch, heads, length, keys)
    return kind


MASKS = (None, "causal", "window", "padded", "added")
HEADS = ((4, 4), (8, 2), (6, 1), (40, 2))


def sinks_of(mask, heads, kernels) -> list[bool]:
    return in_turn((False, True), MASKS.index(mask) + HEADS.index(heads) + KERNELS.index(kernels))


def test_every_two_of_mask_heads_and_kernels_have_both():
    axes = MASKS, HEADS, KERNELS
    cases = [(*case, sinks) for case in product(*axes) for sinks in sinks_of(*case)]
    for axis, values in enumerate(axes):
        assert {(case[axis], case[3]) for case in cases} == {*product(values, (False, True))}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS)
def test_attention(kernels, random, heads, mask):
    for sinks in sinks_of(mask, heads, kernels.selected_kernels()):
        check_attention(kernels, random, *heads, mask, sinks)


def check_attention(kernels, random, heads, kv_heads, mask, sinks):
    cases = [(1, 1, 1, 128, 128), (1, 1, 1100, 64, 64), (2, 1, 70, 80, 20), (2, 5, 70, 24, 256)]
    cases += [(2, 130, 130, 96, 64), (1, 70, 300, 192, 128), (1, 3, 130, 10, 7)]
    for batch, length, keys, width, v_width in cases:
        q = normal(random, batch, length, heads, width).swapaxes(1, 2)
        k = normal(random, batch, kv_heads, keys + 5, width)[:, :, :keys]  # as in a cache
        v = normal(random, batch, kv_heads, keys + 5, v_width)[:, :, :keys]
        args = {
            "scale": width**-0.5,
            "mask": mask_of(mask, random, batch, heads, length, keys),
            "sinks": normal(random, heads) if sinks else None,
        }
        got = kernels.scaled_dot_product_attention(q, k, v, **args)
        assert_close(got, MLX["scaled_dot_product_attention"](q, k, v, **args))
        # What a layer does next: free of copies, so its layout must be what it says.
        flat = got.swapaxes(1, 2).reshape(batch, length, -1)
        assert np.array_equal(flat, np.array(got).swapaxes(1, 2).reshape(batch, length, -1))


# batch, heads, heads of keys, length, keys, width, width of values
KEPT_SHAPES = [(1, 8, 2, 1, 1100, 128, 128), (3, 16, 1, 1, 150, 72, 20), (2, 4, 4, 70, 90, 96, 64)]
KEPT_SHAPES += [(1, 3, 1, 1, 129, 10, 7), (2, 6, 2, 3, 700, 64, 64)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_attention_over_kept_keys_of_each_type(kernels, random, dtype):
    """float32's sums, whatever keys and values are kept in; capped scores too."""
    for batch, heads, kv_heads, length, keys, width, v_width in KEPT_SHAPES:
        q = normal(random, batch, heads, length, width)
        k = normal(random, batch, kv_heads, keys + 5, width).astype(dtype)[:, :, :keys]
        v = normal(random, batch, kv_heads, keys + 5, v_width).astype(dtype)[:, :, :keys]
        wide = k.astype(mx.float32), v.astype(mx.float32)
        scale = width**-0.5
        for kind in (None, "causal", "window", "padded", "added"):
            sinks = normal(random, heads) if kind in (None, "window") else None
            args = {
                "scale": scale,
                "mask": mask_of(kind, random, batch, heads, length, keys),
                "sinks": sinks,
            }
            got = kernels.scaled_dot_product_attention(q, k, v, **args)
            assert_close(got, MLX["scaled_dot_product_attention"](q, *wide, **args))
        mask = mask_of("window", random, batch, heads, length, keys)
        got = kernels.attend_capped(q, k, v, scale, softcap=0.5, mask=mask)
        assert_close(got, gear._softcap_attention(q, *wide, scale, 0.5, mask))


def test_keys_of_16_bits_are_read_exactly(kernels):
    """Every number: subnormal, negative zero, infinite; one key has all the weight."""
    bits = mx.arange(1 << 16).astype(mx.uint16).reshape(1, 1, 4096, 16)
    q, k = mx.zeros((1, 1, 1, 16)), mx.zeros((1, 1, 1, 16))
    for dtype in (mx.bfloat16, mx.float16):
        numbers = bits.view(dtype)
        for row in (0, 1, 7, 2048, 2050, 4095):
            v = numbers[:, :, row : row + 1]
            got = kernels.scaled_dot_product_attention(q, k.astype(dtype), v, scale=1.0)
            assert np.array_equal(got, v.astype(mx.float32), equal_nan=True)


def test_attention_over_columns(kernels, random):
    q, k, v = (normal(random, 1, 2, 32, 9).swapaxes(2, 3) for _ in range(3))
    got = kernels.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal")
    assert_close(got, MLX["scaled_dot_product_attention"](q, k, v, scale=0.2, mask="causal"))


def test_forbidden_by_minus_infinity_and_nan(kernels, random):
    q, k, v = (
        normal(random, 1, 4, 2, 16),
        normal(random, 1, 4, 200, 16),
        normal(random, 1, 4, 200, 16),
    )
    mask = np.zeros((2, 200), np.float32)
    mask[:, :150] = -np.inf
    args = {"scale": 0.25, "mask": mx.array(mask)}
    got = kernels.scaled_dot_product_attention(q, k, v, **args)
    assert_close(got, MLX["scaled_dot_product_attention"](q, k, v, **args))
    bad = np.array(k)
    bad[0, 1, 7, 3] = np.nan
    got = np.array(kernels.scaled_dot_product_attention(q, mx.array(bad), v, scale=0.25))
    assert np.isnan(got[0, 1]).all()
    assert np.isfinite(got[0, [0, 2, 3]]).all()


def test_every_number_of_threads_gives_the_same_bits(kernels, random):
    q, k, v = (normal(random, 2, h, n, 64) for h, n in ((8, 3), (2, 1500), (2, 1500)))
    long = normal(random, 2, 8, 300, 64)
    before, seen = kernels.threads(), []
    for n in (1, 2, 5):
        kernels.set_threads(n)
        few = kernels.scaled_dot_product_attention(q, k, v, scale=0.1)
        many = kernels.scaled_dot_product_attention(long, k, v, scale=0.1, mask="causal")
        half = kernels.scaled_dot_product_attention(
            q, k.astype(mx.float16), v.astype(mx.float16), scale=0.1
        )
        turned = kernels.rope(long, 64, traditional=False, base=1e4, scale=1.0, offset=3)
        normed = kernels.rms_norm(long, None, 1e-6)
        seen.append([np.array(a).tobytes() for a in (few, many, half, turned, normed)])
    kernels.set_threads(before)
    assert seen[0] == seen[1] == seen[2]


def test_what_ours_do_not_know_goes_to_mlx(kernels, random):
    half = normal(random, 2, 4, 3, 16).astype(mx.float16)
    assert kernels.rms_norm(half, None, 1e-6).dtype == mx.float16
    assert (
        kernels.rope(half, 16, traditional=False, base=1e4, scale=1.0, offset=0).dtype == mx.float16
    )
    got = kernels.scaled_dot_product_attention(half, half, half, scale=0.1)
    assert got.dtype == mx.float16
    with pytest.raises(ValueError, match="rms_norm"):
        kernels.rms_norm(normal(random, 4), normal(random, 5), 1e-6)
    x = normal(random, 1, 4, 3, 16)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        kernels.scaled_dot_product_attention(x, x, x, scale=0.1, mask="acausal")


def test_embedding_of_a_token_that_is_not_there(kernels):
    table = nn.Embedding(8, 4)
    made = native_layers.native_weights(table)
    ids = mx.array([[7, 0]])
    assert mx.array_equal(kernels.embed(ids, made), table(ids))
    with pytest.raises(RuntimeError, match="token 8 of 8"):
        mx.eval(kernels.embed(mx.array([8]), made))


def test_they_stand_in_mlx_s_place_and_can_be_taken_back():
    native_layers.install_operations(True)
    assert mx.fast.rms_norm is native.extension().rms_norm
    assert mx.logsumexp is native.extension().logsumexp
    native_layers.install_operations(False)
    assert mx.fast.rms_norm is MLX["rms_norm"]
    assert mx.logsumexp is MLX["logsumexp"]
