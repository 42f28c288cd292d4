"""A drafter that was made for a model, on one and two nodes: the answers of one node without it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from llguidance import LLMatcher

import cenacle
from support.drafter_checkpoint import write_dflash, write_eagle3, write_served

PROMPT = [5, 80, 200, 17, 9]
DIGITS = LLMatcher.grammar_from_regex("[0-9]{20}")
REQUESTS = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 2, "repetition_penalty": 1.3},
    {"grammar": DIGITS},
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return write_served(tmp_path_factory.mktemp("drafters") / "served")


@pytest.fixture(scope="module")
def expected(served):
    """Of each request, and of one that goes on after the first."""
    with cenacle.load(str(served), 1, speculative="off") as plain:
        answers = [plain.generate(PROMPT, 20, **options).tokens for options in REQUESTS]
        longer = plain.generate([*PROMPT, *answers[0], 7], 10).tokens
    return answers, longer


@pytest.mark.parametrize(
    ("nodes", "trunk", "form"),
    [(1, "replicated", "EAGLE-3"), (2, "sharded", "EAGLE-3"), (2, "sharded", "DSpark")],
)
def test_answers_are_those_of_one_node_without_it(tmp_path, served, expected, nodes, trunk, form):
    answers, longer = expected
    if form == "EAGLE-3":
        drafter = write_eagle3(tmp_path / "drafter", served, (0, 1, 2), "trained")
    else:
        drafter = write_dflash(tmp_path / "drafter", served, (0, 2), "trained", is_dspark=True)
    options = {"speculative": "always", "trunk": trunk, "draft_model": str(drafter)}
    with cenacle.load(str(served), nodes, **options) as model:
        for request, tokens in zip(REQUESTS, answers, strict=True):
            assert model.generate(PROMPT, 20, **request).tokens == tokens
        drafts = model.group.draft_stats
        assert drafts.by_model_accepted > 0.1 * drafts.by_model > 0
        # From a kept prefix; and requests that join one that drafts.
        assert model.generate([*PROMPT, *answers[0], 7], 10).tokens == longer
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            asked = [pool.submit(model.generate, PROMPT, 20, **r) for r in REQUESTS]
            assert [a.result(120).tokens for a in asked] == answers
        assert model.group.draft_stats.by_model_accepted > drafts.by_model_accepted
