"""Caches that were written in pages and read again are unchanged."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, load_prompt_cache, make_prompt_cache
from mlx_lm.utils import load_model

from cenacle.engine.cache.kv_cache import NOT_TRUNCATABLE, SequenceCache, flatten_caches
from cenacle.model.synth import synth

PROMPT = [(131 * i * i + 17 * i + 5) % 257 for i in range(700)]
ENDS = (256, 512, 600)


def all_state(sequence):
    """All arrays and numbers of the caches, by place, as far as they were written."""
    values = {}
    for number, cache in enumerate(flatten_caches(sequence.caches)):
        keys, *rest = cache.state
        if not isinstance(cache, NOT_TRUNCATABLE) and keys is not None:
            keys, rest = keys[..., : cache.offset, :], [rest[0][..., : cache.offset, :], *rest[1:]]
        values |= {f"{number}.{place}": x for place, x in tree_flatten([keys, *rest])}
    return values


# Plain attention, a sliding window with sinks, linear attention, latent attention in lists.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "glm_moe_dsa"])
def test_pages_restore_the_truncated_cache(family, tmp_path):
    model, _ = load_model(synth(tmp_path / "model", family=family, dtype="float32").path)
    original = SequenceCache(make_prompt_cache(model))
    for begin, end in zip((0, *ENDS), (*ENDS, len(PROMPT)), strict=True):
        model(mx.array([PROMPT[begin:end]]), cache=original.caches)
        mx.eval([cache.state for cache in original.caches])
        original.checkpoint(end)
    pages = []
    for begin, end in zip((0, *ENDS), ENDS, strict=False):
        pages.append((end, tmp_path / f"{end}.safetensors"))
        pages[-1][1].write_bytes(original.to_page(begin, end, {"mark": "m"}).getbuffer())
    assert load_prompt_cache(str(pages[0][1]), return_metadata=True)[1] == {"mark": "m"}
    for count in (1, 3):
        end = ENDS[count - 1]
        read = SequenceCache.from_pages(pages[:count]).truncate(end)
        truncated = original.truncate(end)
        expected, got = all_state(truncated), all_state(read)
        assert expected.keys() == got.keys()
        for place, value in expected.items():
            same = value == got[place]
            assert bool(mx.all(same) if isinstance(same, mx.array) else same), place
        rest = mx.array([PROMPT[end : end + 5]])
        assert mx.array_equal(model(rest, cache=read.caches), model(rest, cache=truncated.caches))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_preserved(dtype, tmp_path):
    cache = KVCache()
    arrays = [mx.random.normal((1, 2, 300, 8)).astype(dtype) for _ in range(2)]
    cache.update_and_fetch(*arrays)
    path = tmp_path / "page.safetensors"
    path.write_bytes(SequenceCache([cache]).to_page(10, 266, {}).getbuffer())
    (read,) = SequenceCache.from_pages([(256, path)]).caches
    assert read.keys.dtype == dtype
    assert read.offset == 256
    for got, expected in zip((read.keys, read.values), arrays, strict=True):
        assert mx.array_equal(got, expected[..., 10:266, :])
