"""The cache that is planned for is the cache that mlx-lm makes."""

from types import SimpleNamespace

import mlx.core as mx
import psutil
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import VECTORS

import cenacle
from cenacle import PlanError
from cenacle.core.model_config import kv_cache_elements_per_token
from cenacle.model.checkpoint import Checkpoint
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


def test_too_little_memory_is_reported_before_any_rank_starts(monkeypatch):
    memory_info = SimpleNamespace(available=300_000 * 1024)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory_info)
    with pytest.raises(PlanError, match=r"needs 53.* of its neighbors\), but 307.2 MB are availa"):
        cenacle.load(str(VECTORS / "mixtral"), 2)
