"""Replay what transformers on PyTorch answered: a witness that shares no code with MLX.

See tools/record_vectors.py for how tests/vectors was made.
"""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import VECTORS, load_rank, run_ranks

from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.spec_reader import read_model_spec

MAX_RELATIVE_ERROR = 5e-6
PROMPT_LENGTHS = (1, 7, 40)
ALL = (16, 16, 16)  # tokens that follow each prompt, as recorded
FEW = (2, 12, 2)


def replay(model, vectors, lengths) -> None:
    for n, length in zip(PROMPT_LENGTHS, lengths, strict=True):
        tokens, expected = vectors[f"prompt_{n}.tokens"], vectors[f"prompt_{n}.logits"]
        error = mx.abs(model(tokens[None])[0] - expected).max() / mx.abs(expected).max()
        assert error.item() <= MAX_RELATIVE_ERROR

        cache, step, greedy = make_prompt_cache(model), tokens, []
        for _ in range(length):
            greedy.append(mx.argmax(model(step[None], cache=cache)[0, -1]).item())
            step = mx.array(greedy[-1:])
        assert greedy == vectors[f"prompt_{n}.greedy"].tolist()[:length]


# The last four are those in which both packages were wrong: model/zoo_repairs.py.
@pytest.fixture(
    params=["dbrx", "mixtral", "qwen3_moe", "ernie4_5_moe", "gpt_oss", "hunyuan", "jamba"]
)
def folder(request):
    return VECTORS / request.param


def test_one_rank(folder):
    plan = Plan.whole(read_model_spec(Checkpoint.open(folder)), 1)
    vectors = mx.load(str(folder / "vectors.safetensors"))
    replay(load_rank(folder, plan, SingleRank()), vectors, ALL)


@pytest.mark.parametrize(
    ("nodes", "shares", "placement"),
    [
        (2, None, "whole"),
        (3, (5, 2, 1), "whole"),
        (2, None, "sliced"),
        (3, (2, 1, 3), "sliced"),
        (3, (5, 2, 2), "replicated"),
    ],
)
def test_ranks_together(folder, nodes, shares, placement):
    vectors = mx.load(str(folder / "vectors.safetensors"))
    mx.eval(vectors)

    def run(model, collective):
        replay(model, vectors, FEW)

    run_ranks(folder, nodes, run, shares=shares, placement=placement)


@pytest.mark.parametrize("family", ["dbrx", "mixtral", "qwen3_moe"])
def test_spec(family):
    folder = VECTORS / family
    spec = read_model_spec(Checkpoint.open(folder))
    assert (spec.family, spec.layers, spec.top_k) == (family, 2, 2)
    assert (spec.context_length, spec.vocab_size, spec.dtype) == (512, 256, "float32")
    assert [(m.layer, m.experts, m.expert_bytes) for m in spec.moe] == [
        (0, 8, 3 * 64 * 24 * 4),
        (1, 8, 3 * 64 * 24 * 4),
    ]
    assert spec.total_bytes == Checkpoint.open(folder).nbytes()
