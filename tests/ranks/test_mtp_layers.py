"""A checkpoint's own drafting layer on two nodes: the answers of one node without it."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from llguidance import LLMatcher

import cenacle
from support.mtp_checkpoint import write_mtp

# One of each kind of cache; tests/mlx/test_mtp.py has all.
FAMILIES = ("deepseek_v32", "glm4_moe_lite", "qwen3_5_moe", "nemotron_h", "deepseek_v4")
PROMPT = [5, 80, 200, 17, 9]
DIGITS = LLMatcher.grammar_from_regex("[0-9]{20}")
REQUESTS = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 2, "repetition_penalty": 1.3},
    {"grammar": DIGITS},
    {"temperature": 1.0, "seed": 3, "grammar": DIGITS},
)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_node_without_it(tmp_path, family):
    folder = str(write_mtp(tmp_path / family, family, "trained"))
    with cenacle.load(folder, 1, speculative="off") as plain:
        expected = [plain.generate(PROMPT, 30, **options).tokens for options in REQUESTS]
        longer = plain.generate([*PROMPT, *expected[0], 7], 20).tokens
    with cenacle.load(folder, 2, speculative="always", trunk="sharded") as model:
        for options, tokens in zip(REQUESTS, expected, strict=True):
            assert model.generate(PROMPT, 30, **options).tokens == tokens
        drafts = model.group.draft_stats
        assert drafts.by_model_accepted > 0.1 * drafts.by_model > 0
        # From a kept prefix; and requests that join one that drafts.
        assert model.generate([*PROMPT, *expected[0], 7], 20).tokens == longer
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            asked = [pool.submit(model.generate, PROMPT, 30, **o) for o in REQUESTS]
            assert [a.result(120).tokens for a in asked] == expected
        assert model.group.draft_stats.by_model_accepted > drafts.by_model_accepted


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
