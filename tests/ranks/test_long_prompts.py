"""Prompts of more than 2,000 tokens in several chunks, and the caches for long contexts.

Other programs are known to corrupt exactly these silently.
"""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import cenacle
from cenacle.model.config_catalog import tiny_config
from cenacle.model.synth import synth

PROMPT = [(131 * i * i + 17 * i + 5) % 257 for i in range(2100)]
CHUNK = 512


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return synth(tmp_path_factory.mktemp("long") / request.param, family=request.param).path


def expected(folder, max_tokens, **options):
    model, _ = load_model(folder)
    steps = generate_step(
        mx.array(PROMPT), model, max_tokens=max_tokens, prefill_step_size=CHUNK, **options
    )
    return [token for token, _ in steps]


def on_nodes(folder, nodes, max_tokens, **options):
    with cenacle.load(str(folder), nodes=nodes, prefill_chunk_size=CHUNK, **options) as model:
        return model.generate(PROMPT, max_tokens=max_tokens).tokens


# Plain attention, a sliding window with sinks, linear attention, chunked attention (sequential).
@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss", "qwen3_next", "llama4"], indirect=True)
def test_long_prompt_gives_the_same_tokens_on_three_nodes(folder):
    reference_tokens = expected(folder, 8)
    assert on_nodes(folder, 1, 8) == reference_tokens
    assert on_nodes(folder, 3, 8) == reference_tokens


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory):
    config = tiny_config("qwen3_moe") | {"head_dim": 32}
    return synth(tmp_path_factory.mktemp("long") / "wide", config=config, dtype="float32").path


@pytest.mark.parametrize("options", [{"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 256}])
def test_quantized_and_rotating_caches(wide_heads, options):
    reference = {**options, "quantized_kv_start": 0} if "kv_bits" in options else options
    assert on_nodes(wide_heads, 2, 8, **options) == expected(wide_heads, 8, **reference)


def test_a_cache_that_cannot_be_quantized_is_refused_at_load(wide_heads):
    with pytest.raises(cenacle.InputError, match=r"kv_bits.*groups of 64"):
        cenacle.load(str(wide_heads), kv_bits=8)
