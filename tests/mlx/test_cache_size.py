"""The cache that is planned for is the cache that mlx-lm makes."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import psutil
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import VECTORS

import cenacle
from cenacle import InputError, PlanError
from cenacle.core.model_config import kv_cache_elements_per_token
from cenacle.core.plan import Plan
from cenacle.engine.memory import estimate_memory
from cenacle.engine.options import EngineOptions
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.config_catalog import tiny_config
from cenacle.model.loader import build_model
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth
from cenacle.planning import memory

LENGTH = 256  # mlx-lm's caches grow in steps of this


@pytest.mark.parametrize("family", ["dbrx", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_cache_elements_per_token_match_mlx_lm(family, tmp_path):
    folder = VECTORS / family
    if not folder.exists():
        folder = tmp_path / family
        synth(folder, family=family)
    checkpoint = Checkpoint.open(folder)
    model = build_model(checkpoint, None, 0)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, LENGTH), mx.int32), cache=cache))
    held = sum(c.nbytes for c in cache)
    elements = kv_cache_elements_per_token(checkpoint.config, read_model_spec(checkpoint).layers)
    assert held == memory.kv_cache_bytes(elements, LENGTH, None, None, 4)


@pytest.mark.parametrize(
    ("family", "dtype", "kernels", "kv_dtype", "size"),
    [
        ("mixtral", "float32", "auto", "auto", 4),
        ("mixtral", "float32", "auto", "float16", 2),
        ("mixtral", "bfloat16", "native", "auto", 2),
        ("mixtral", "bfloat16", "native", "float32", 4),
        ("mixtral", "bfloat16", "mlx", "float32", 2),  # what the model computes
        ("deepseek_v3", "bfloat16", "native", "auto", 4),  # latent attention
        ("minimax_m3", "bfloat16", "native", "auto", 4),  # of each request alone
    ],
)
def test_estimated_caches_have_the_size_of_their_type(family, dtype, kernels, kv_dtype, size):
    config = tiny_config(family)
    spec = replace(read_model_spec(Checkpoint.open(VECTORS / "mixtral")), family=family)
    plan = Plan.whole(replace(spec, dtype=dtype, context_length=64), 1)
    options = EngineOptions(kv_dtype=kv_dtype)
    estimate = estimate_memory(config, plan, 0, options, kernels)
    assert estimate.kv_cache == 64 * size * kv_cache_elements_per_token(config, spec.layers)


def test_an_unknown_type_of_cache_is_refused():
    with pytest.raises(InputError, match=r"kv_dtype: expected one of auto, .*, got 'int8'"):
        cenacle.inspect(str(VECTORS / "mixtral"), kv_dtype="int8")


def test_too_little_memory_is_reported_before_any_rank_starts(monkeypatch):
    memory_info = SimpleNamespace(available=300_000 * 1024)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory_info)
    with pytest.raises(PlanError, match=r"needs 53.* of its neighbors\), but 307.2 MB are availa"):
        cenacle.load(str(VECTORS / "mixtral"), 2)
