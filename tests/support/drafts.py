"""Answers with and without drafts: of one engine, and of a loaded model with its ranks."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher

from cenacle import Model
from cenacle.collective.single import SingleRank
from cenacle.core.request import Request, Sampling
from cenacle.core.step import PromptChunk, Step
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.engine.speculative.decoder import Drafter
from cenacle.engine.speculative.ngram import DraftStats
from cenacle.model.step_timer import StepTimer

PROMPT = [5, 80, 200, 17, 9]
DIGITS = LLMatcher.grammar_from_regex("[0-9]{20}")
REQUESTS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 2, "repetition_penalty": 1.3},
    {"grammar": DIGITS},
)


def generate_alone(
    model: Any, drafter: Drafter | None, prompt: Sequence[int], limit: int, **sampling: Any
) -> tuple[list[int], DraftStats]:
    """Tokens of a request that runs alone in this process, and the drafts.

    Args:
        model: of one rank.
        drafter: drafts at every step; None: no drafts.
    """
    options = EngineOptions(speculative="off" if drafter is None else "always")
    engine = Engine(model, SingleRank(), StepTimer(), options, draft_model=drafter)
    request = Request("a", tuple(prompt), limit, (), Sampling(**{"seed": 0, **sampling}))
    chunk = PromptChunk("a", 0, len(prompt))
    events, number = list(engine.step(Step(0, (request,), final_chunks=(chunk,)))[0]), 1
    while not events or events[-1].finish is None:
        events += engine.step(Step(number))[0]
        number += 1
    drafts = engine.take_draft_stats()
    engine.close()
    return [e.token for e in events], drafts


class PlainAnswers:
    """Of a model without drafts: to each of `REQUESTS`, and to one that goes on after the first."""

    def __init__(self, plain: Model, limit: int) -> None:
        self._limit = limit
        self._answers = [plain.generate(PROMPT, limit, **r).tokens for r in REQUESTS]
        self._longer_prompt = [*PROMPT, *self._answers[0], 7]
        self._longer = plain.generate(self._longer_prompt, limit // 2).tokens

    def require_same(self, model: Model) -> None:
        """Require the same tokens of a model that drafts, and that many drafts are accepted: alone,
        from a kept prefix, and where requests join one that drafts."""
        for request, tokens in zip(REQUESTS, self._answers, strict=True):
            assert model.generate(PROMPT, self._limit, **request).tokens == tokens
        drafts = model.group.draft_stats
        assert drafts.by_model_accepted > 0.1 * drafts.by_model > 0
        assert model.generate(self._longer_prompt, self._limit // 2).tokens == self._longer
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            outputs = [pool.submit(model.generate, PROMPT, self._limit, **r) for r in REQUESTS]
            assert [output.result(120).tokens for output in outputs] == self._answers
        assert model.group.draft_stats.by_model_accepted > drafts.by_model_accepted
