"""Streams with caches of their own: nothing is padded, and chunks of prompts share a pass."""

from functools import partial

import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import KVCache, make_prompt_cache
from one_process import load_rank, spec_of, tiny_model

from cenacle import native
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.model import native_blocks
from cenacle.model.kv_dtype import install_kv_dtype
from cenacle.model.step_timer import StepTimer
from cenacle.model.stream_caches import SharedPass, StreamCaches, into_streams
from cenacle.model.stream_support import has_stream_caches, install_stream_caches
from cenacle.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.skipif(not native.is_available(), reason=native.unavailable_reason())
TOLERANCE = 2e-3  # of logits: a pass of several tokens rounds otherwise

# Plain caches as one node of the graph; windows and sinks, by mlx-lm's own attention.
FAMILIES = ["qwen3_moe", "gpt_oss"]


def load_model(family):
    folder = tiny_model(family)
    plan = Plan.whole(spec_of(folder), 1)
    model = load_rank(folder, plan, SingleRank(), StepTimer(), "auto")
    assert install_stream_caches(model)
    install_kv_dtype(model, "bfloat16")
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return load_model(request.param)


def fill(model, tokens):
    caches = make_prompt_cache(model)
    model(mx.array([tokens]), cache=caches)
    return caches


def merge(streams):
    return [layer[0].merge(layer) for layer in zip(*streams, strict=True)]


def own_bytes(caches):
    return sum(cache.nbytes for cache in caches)


LONG, SHORT, PROMPT = [(7 * i + 3) % 250 for i in range(300)], [5, 6, 7], [9] * 150


def test_each_stream_gives_what_it_gives_alone_and_keeps_its_own_length(model):
    alone = [fill(model, LONG), fill(model, SHORT)]
    together = merge([into_streams(fill(model, tokens)) for tokens in (LONG, SHORT)])
    for token in (11, 12, 13):
        expected = [model(mx.array([[token]]), cache=caches) for caches in alone]
        logits = model(mx.array([[token]] * 2), cache=together)
        assert mx.abs(logits - mx.concatenate(expected)).max() < TOLERANCE
    assert [row.offset for row in together[0].rows] == [303, 6]
    for layer, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert isinstance(layer, StreamCaches)
        assert layer.nbytes == own_bytes(parts)
    kept = [row.keys for row in together[0].rows]
    for layer in together:
        layer.filter([1])
    assert together[0].rows[0].keys is kept[1], "nothing is copied when a stream ends"


def test_all_streams_at_once_give_the_bits_of_each_way_and_grow(model, monkeypatch):
    seen = []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(StreamCaches, "attend_next", lambda *_: None)
        streams = [fill(model, tokens) for tokens in (LONG, LONG[:255], SHORT)]
        together = merge([into_streams(s) for s in streams])
        logits = [model(mx.array([[t], [t + 1], [t + 2]]), cache=together) for t in range(4)]
        rows = [row for layer in together for row in layer.rows]
        caches = [a[:, :, : row.offset] for row in rows for a in (row.keys, row.values)]
        seen.append((logits, caches))
        if type(together[0].rows[0]) is KVCache:
            assert [row.keys.shape[2] for row in together[0].rows] == [512, 512, 256]
    for at_once, each in zip(*seen, strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(at_once, each, strict=True))


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_a_stream_that_is_taken_out_and_the_one_that_goes_on_do_not_meet(model):
    """Buffers are written in place: what was taken out must not see it, nor write into them."""

    def follow(caches, tokens):
        logits = [model(mx.array([[t]]), cache=caches) for t in tokens]
        mx.eval(logits)
        return logits

    expected = [follow(fill(model, SHORT), [1, *tokens]) for tokens in ([2, 3], [4, 5])]
    running = merge([into_streams(fill(model, SHORT))])
    follow(running, [1])
    taken = [layer.extract(0) for layer in running]
    kept = [(row.keys[:, :, : row.offset] + 0, row.keys) for row in taken]
    again = merge([into_streams(taken)])
    got = [follow(running, [2]), follow(again, [4])]
    got[0] += follow(running, [3])
    got[1] += follow(again, [5])
    for logits, want in zip(got, expected, strict=True):
        assert mx.abs(mx.concatenate(logits) - mx.concatenate(want[1:])).max() < TOLERANCE
    assert all(mx.array_equal(now[:, :, : keys.shape[2]], keys) for keys, now in kept)


WIDTH, HEADS, KV_HEADS = 32, 4, 2


def make_attention(**changed):
    mx.random.seed(3)
    q, k, v, o = (
        native.extension().Weights(
            mx.random.normal((rows, width)) / 8, None, None, None, bits=0, group_size=0, mode=""
        )
        for rows, width in ((128, 64), (64, 64), (64, 64), (64, 128))
    )
    norm = mx.random.normal((WIDTH,))
    arguments = dict(q=q, k=k, v=v, width=WIDTH, q_norm=norm, k_norm=None, q_eps=1e-6, k_eps=0.0)
    arguments |= dict(dims=WIDTH, traditional=False, base=1e4, scale=1.0)
    projected = partial(native.extension().qkv, **arguments)
    arguments |= dict(attention_scale=WIDTH**-0.5, output=None)
    attention = native.extension().StreamAttention(**(arguments | changed))
    return projected, attention, o


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_attention_of_streams_is_that_of_each(dtype):
    projected, attention, _ = make_attention()
    lengths, owned = (0, 3, 256, 700), [True, False, True, True]
    x = mx.random.normal((len(lengths), 1, 64))
    q, k, v = projected(x, offset=mx.array(lengths))
    shapes = [(2, 1, KV_HEADS, -(-max(n, 1) // 256) * 256, WIDTH) for n in lengths]
    buffers = [mx.random.normal(shape).astype(dtype) for shape in shapes]
    keys, values = [b[0] + 0 for b in buffers], [b[1] + 0 for b in buffers]
    mx.eval(keys, values)
    out, *new = attention(x, keys, values, list(lengths), owned)
    mx.eval(out, new)
    for i, n in enumerate(lengths):
        seen = []
        for old, rows, grown in ((keys, k, new[i]), (values, v, new[len(lengths) + i])):
            row = rows[i : i + 1].astype(dtype)
            assert mx.array_equal(grown[:, :, n : n + 1], row)
            in_place = owned[i] and n < old[i].shape[2]
            if n < old[i].shape[2]:
                assert mx.array_equal(old[i][:, :, n : n + 1], row) == in_place
            assert grown.shape[2] == (512 if n == 256 else old[i].shape[2])
            seen.append(mx.concatenate([old[i][:, :, :n], row], axis=2).astype(mx.float32))
        group = [mx.repeat(a, HEADS // KV_HEADS, axis=1) for a in seen]
        scores = mx.softmax(q[i : i + 1] @ group[0].swapaxes(2, 3) * WIDTH**-0.5, axis=-1)
        assert mx.abs(out[i] - (scores @ group[1]).reshape(1, -1)).max() < 1e-5


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"offsets": [257]}, "as many rows"),
        ({"owned": []}, "for each stream"),
        ({"x": mx.zeros((1, 1, 63))}, "width 64"),
        ({"keys": [mx.zeros((1, 2, 256, WIDTH), dtype=mx.int32)]}, "of floats"),
    ],
)
def test_caches_that_do_not_fit_are_an_error(changed, words):
    attention, buffer = make_attention()[1], mx.zeros((1, KV_HEADS, 256, WIDTH))
    arguments = dict(x=mx.zeros((1, 1, 64)), keys=[buffer], values=[buffer], offsets=[1], owned=[0])
    with pytest.raises(ValueError, match=words):
        attention(**(arguments | changed))


def test_an_output_projection_is_that_of_the_attention():
    _, plain, output = make_attention()
    _, attention, _ = make_attention(output=output)
    x, buffer = mx.random.normal((1, 1, 64)), mx.random.normal((1, KV_HEADS, 256, WIDTH))
    arguments = [buffer], [buffer], [9], [False]
    expected = native.extension().linear(plain(x, *arguments)[0], output)
    assert mx.array_equal(attention(x, *arguments)[0], expected)
    with pytest.raises(ValueError, match="do not fit"):
        make_attention(output=plain_weights())


@pytest.mark.parametrize("lengths", [(3,), (0, 255, 256), (3, 700)])  # the last in parts
@pytest.mark.parametrize("bits", [0, 4])
def test_a_norm_before_attention_and_an_addition_after_it_give_the_bits_of_each_alone(
    lengths, bits, threads
):
    given = {}
    if bits:  # k has another layout of activations than q and v
        sizes = {"q": (128, 64, 4), "k": (64, 64, 8), "v": (64, 64, 4), "output": (64, 128, 4)}
        for name, (rows, width, of_weight) in sizes.items():
            arrays = mx.quantize(mx.random.normal((rows, width)) / 8, 32, of_weight)
            given[name] = native.extension().Weights(*arrays, None, of_weight, 32, "affine")
    output = given.pop("output", None) or make_attention()[2]
    norm = 1 + mx.random.normal((64,)) / 4
    plain = make_attention(**given)[1]
    attention = make_attention(**given, output=output, input_norm=norm, input_eps=1e-5, add=True)[1]
    x = mx.random.normal((len(lengths), 1, 64))
    shapes = [(1, KV_HEADS, -(-max(n, 1) // 256) * 256, WIDTH) for n in lengths]
    keys, values = ([mx.random.normal(shape) for shape in shapes] for _ in range(2))
    arguments = keys, values, list(lengths), [False] * len(lengths)
    normed = native.extension().rms_norm(x, norm, 1e-5)
    expected, *caches = plain(normed, *arguments)
    expected = x + native.extension().linear(expected, output)
    for n in (1, 2, 3):
        threads(n)
        got, *written = attention(x, *arguments)
        assert mx.array_equal(got, expected)
        assert all(mx.array_equal(a, b) for a, b in zip(written, caches, strict=True))
    with pytest.raises(ValueError, match="add: expected"):
        make_attention(**given, add=True)


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_a_layer_of_two_nodes_gives_the_bits_of_its_parts(model):
    layers = [m for _, m in model.named_modules() if isinstance(m, native_blocks.NativeLayer)]
    assert len(layers) == len(model.layers)
    seen = []
    for kind in (native_blocks.NativeLayer, qwen3_moe.Qwen3MoeDecoderLayer):
        for layer in layers:
            layer.__class__ = kind
        together = merge([into_streams(fill(model, tokens)) for tokens in (LONG, SHORT)])
        seen.append([model(mx.array([[t], [t + 1]]), cache=together) for t in range(3)])
    for layer in layers:
        layer.__class__ = native_blocks.NativeLayer
    assert all(mx.array_equal(a, b) for a, b in zip(*seen, strict=True))


def plain_weights():
    weight = mx.zeros((64, 96))
    return native.extension().Weights(weight, None, None, None, bits=0, group_size=0, mode="")


def test_a_chunk_of_a_prompt_shares_the_pass_of_the_streams(model):
    alone, prompt_alone = [fill(model, LONG), fill(model, SHORT)], fill(model, PROMPT)
    together = merge([into_streams(fill(model, tokens)) for tokens in (LONG, SHORT)])
    prompts = [fill(model, PROMPT), fill(model, PROMPT[:1])]
    shared = SharedPass(model)
    chunk = list(range(20, 25))
    shared.add(chunk, prompts[0])
    shared.add(PROMPT[1:3], prompts[1])
    logits = shared(mx.array([[4], [8]]), cache=together)
    assert logits.shape[:2] == (2, 1)
    assert not shared.has_chunks
    expected = [model(mx.array([[t]]), cache=c) for t, c in zip((4, 8), alone, strict=True)]
    assert mx.abs(logits - mx.concatenate(expected)).max() < TOLERANCE
    model(mx.array([chunk]), cache=prompt_alone)
    after, expected_after = (model(mx.array([[3]]), cache=c) for c in (prompts[0], prompt_alone))
    assert mx.abs(after - expected_after).max() < 5 * TOLERANCE  # caches are of 16 bits
    assert [caches[0].offset for caches in prompts] == [156, 3]


def test_prompts_of_several_lengths_share_a_pass_unpadded(model):
    prompts = (LONG[:40], SHORT, PROMPT[:9])
    alone = [fill(model, tokens) for tokens in prompts]
    together = merge([into_streams(make_prompt_cache(model)) for _ in prompts])
    for layer in together:
        layer.prepare(lengths=[len(p) for p in prompts], right_padding=[0, 37, 31])
    model(mx.array([[*p, *[0] * (40 - len(p))] for p in prompts]), cache=together)
    for layer in together:
        layer.finalize()
    assert [row.offset for row in together[0].rows] == [len(p) for p in prompts]
    expected = [model(mx.array([[1]]), cache=caches) for caches in alone]
    logits = model(mx.array([[1]] * 3), cache=together)
    assert mx.abs(logits - mx.concatenate(expected)).max() < 5 * TOLERANCE


def test_a_prompt_beside_an_answer_has_no_passes_of_its_own(model):
    """As many passes as the answer has tokens, but for the few that begin the requests."""
    passes = []

    class Counted(type(model)):
        def __call__(self, ids, **keywords):
            passes.append(ids.shape)
            return super().__call__(ids, **keywords)

    kind, model.__class__ = type(model), Counted
    try:
        options = EngineOptions(speculative="off", prefix_cache_gb=0)
        engine = Engine(model, SingleRank(), StepTimer(), options)
        scheduler = Scheduler(footprint=engine.footprint())
        sampling = Sampling(temperature=0.0, seed=1)
        scheduler.submit(Request("answer", (1, 2, 3), 14, sampling=sampling))
        scheduler.submit(Request("prompt", (4,) * 5, 1, sampling=sampling))
        passes.clear()
        done = []
        while (step := scheduler.next_step()) is not None:
            done += scheduler.on_tokens(engine.step(step)[0])
            if len(done) == 3:
                scheduler.submit(Request("long", (4,) * 100, 1, sampling=sampling))
        engine.close()
    finally:
        model.__class__ = kind
    shared = [rows for rows, length in passes if length == 1 and rows > 2]
    assert sum(rows - 1 for rows in shared) >= 90, "16 tokens of the prompt beside the answer's"
    assert len(passes) <= 24


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4_text"])
def test_what_computes_with_a_cache_keeps_the_batch_caches(family):
    """Also layers that attend to another layer's keys."""
    folder = tiny_model(family)
    model = load_rank(folder, Plan.whole(spec_of(folder), 1), SingleRank(), StepTimer(), "auto")
    assert not install_stream_caches(model)
    assert not has_stream_caches(model)
