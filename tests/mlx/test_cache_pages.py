"""Caches that were written in pages and read again are the caches that they were."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache
from mlx_lm.utils import load_model

from cenacle.engine.cache.kv_cache import EXACT, SequenceCache, leaves
from cenacle.model.synth import synth

PROMPT = [(131 * i * i + 17 * i + 5) % 257 for i in range(700)]
ENDS = (256, 512, 600)


def state(sequence):
    """All arrays and numbers of its caches, by place, as far as they have been written."""
    found = {}
    for number, cache in enumerate(leaves(sequence.caches)):
        keys, *rest = cache.state
        if not isinstance(cache, EXACT) and keys is not None:
            keys, rest = keys[..., : cache.offset, :], [rest[0][..., : cache.offset, :], *rest[1:]]
        found |= {f"{number}.{place}": x for place, x in tree_flatten([keys, *rest])}
    return found


# Plain attention, a sliding window with sinks, linear attention, latent attention in lists.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "glm_moe_dsa"])
def test_pages_make_the_cache_that_was_cut(family, tmp_path):
    model, _ = load_model(synth(tmp_path / "model", family=family, dtype="float32").path)
    whole = SequenceCache(make_prompt_cache(model))
    for begin, end in zip((0, *ENDS), (*ENDS, len(PROMPT)), strict=True):
        model(mx.array([PROMPT[begin:end]]), cache=whole.caches)
        mx.eval([cache.state for cache in whole.caches])
        whole.mark(end)
    pages = []
    for begin, end in zip((0, *ENDS), ENDS, strict=False):
        pages.append((end, tmp_path / f"{end}.safetensors"))
        pages[-1][1].write_bytes(whole.page(begin, end, {"mark": "m"}).getbuffer())
    assert load_prompt_cache(str(pages[0][1]), return_metadata=True)[1] == {"mark": "m"}
    for count in (1, 3):
        end = ENDS[count - 1]
        read, cut = SequenceCache.read(pages[:count]).cut(end), whole.cut(end)
        expected, got = state(cut), state(read)
        assert expected.keys() == got.keys()
        for place, value in expected.items():
            same = value == got[place]
            assert bool(mx.all(same) if isinstance(same, mx.array) else same), place
        rest = mx.array([PROMPT[end : end + 5]])
        assert mx.array_equal(model(rest, cache=read.caches), model(rest, cache=cut.caches))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_stays_what_it_is(dtype, tmp_path):
    cache = KVCache()
    arrays = [mx.random.normal((1, 2, 300, 8)).astype(dtype) for _ in range(2)]
    cache.update_and_fetch(*arrays)
    path = tmp_path / "page.safetensors"
    path.write_bytes(SequenceCache([cache]).page(10, 266, {}).getbuffer())
    (read,) = SequenceCache.read([(256, path)]).caches
    assert read.keys.dtype == dtype
    assert read.offset == 256
    for got, wanted in zip((read.keys, read.values), arrays, strict=True):
        assert mx.array_equal(got, wanted[..., 10:266, :])
