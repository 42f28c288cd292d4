"""A checkpoint's own drafting layer on two nodes: the answers of one node without it."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import cenacle
from support.drafts import PROMPT, REQUESTS, PlainAnswers
from support.mtp_checkpoint import write_mtp

# One of each kind of cache; tests/mlx/test_mtp.py has all.
FAMILIES = ("deepseek_v32", "glm4_moe_lite", "qwen3_5_moe", "nemotron_h", "deepseek_v4")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_node_without_it(tmp_path, family):
    folder = str(write_mtp(tmp_path / family, family, "trained"))
    with cenacle.load(folder, 1, speculative="off") as plain:
        expected = PlainAnswers(plain, 30)
    with cenacle.load(folder, 2, speculative="always", trunk="sharded") as model:
        expected.require_same(model)


def test_it_can_be_left_out(tmp_path):
    folder = str(write_mtp(tmp_path / "glm", "glm4_moe", "trained"))
    with cenacle.load(folder, 1, speculative="always", mtp=False) as model:
        model.generate(PROMPT, 30)
        assert model.group.draft_stats.by_model == 0


def test_answers_go_on_when_a_rank_is_lost_while_drafts_are_made(tmp_path):
    folder = str(write_mtp(tmp_path / "glm", "glm4_moe", "trained"))
    requests, limit = REQUESTS[:3], 120
    with cenacle.load(folder, 1, speculative="off") as plain:
        expected = [plain.generate(PROMPT, limit, **o).tokens for o in requests]
    with (
        cenacle.load(folder, 2, speculative="always", latency_s=0.002) as model,
        ThreadPoolExecutor(len(requests)) as pool,
    ):
        began = [threading.Event() for _ in requests]

        def ask(stream: int) -> list[int]:
            tokens = []
            for chunk in model.stream(PROMPT, limit, **requests[stream]):
                tokens.append(chunk.token)
                if len(tokens) == 10:
                    began[stream].set()
            return tokens

        answers = [pool.submit(ask, stream) for stream in range(len(requests))]
        for event in began:
            assert event.wait(120)
        before = model.group.draft_stats.by_model_accepted
        os.kill(model.ranks.pids[1], signal.SIGKILL)
        assert [a.result(120) for a in answers] == expected
        assert model.group.state.recoveries == 1
        assert model.group.draft_stats.by_model_accepted > before > 0
