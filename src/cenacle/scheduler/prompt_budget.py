"""How many prompt tokens a step reads beside requests that are answering.

Owns: what a decode step and a prompt token take, as steps were timed, and the budget from it.
Does not know: requests, clocks, which prompts are read.
Invariant: a step beside answers reads at least one token, except in the few steps that time
decoding alone; by the times so far it takes less than twice as long as one without a prompt.
Ranks compute a step while they report the one before, or the one that was ordered, as their batch
does: so a time counts only if its step and the one before it were alike.
Next: `scheduler.py` divides the budget among prompts.
"""

from __future__ import annotations

from collections import deque
from statistics import median

SHARE, MAX_SHARE = 0.6, 0.8  # of a decode step's time that prompt tokens add: mean, most
INITIAL_TOKENS = 16  # until steps were timed
REFRESH_STEPS = 64  # with prompts, after which decoding alone is timed again
FIRST_REFRESH_STEPS = 4  # the same where this many answers were never timed
DECODE_STEPS = 3  # in a row, to time decoding alone: the first follows a prompt's
DECODE_SAMPLES, TOKEN_SAMPLES = 12, 9  # of which the lower quartile and the median count


class PromptBudget:
    """Learns from the times of steps."""

    def __init__(self) -> None:
        self._decode_s: dict[int, deque[float]] = {}  # by the number of answers
        self._token_s: deque[float] = deque(maxlen=TOKEN_SAMPLES)
        self._last: tuple[int, int] | None = None  # answers and prompt tokens of the step before
        self._credit = 0.0  # tokens that rounding down left
        self._steps_with_prompt = 0
        self._decode_steps = 0  # that are still to come without a prompt

    def take(self, answers: int, limit: int) -> int:
        """Prompt tokens for the next step, for which prompts wait; call it once for each.

        Args:
            answers: number of requests that get a token in this step.
            limit: on the tokens of any step.

        Returns:
            0 to `limit`; `limit` if nobody answers.
        """
        if not answers:
            self._decode_steps = 0
            return limit
        if self._decode_steps:
            self._decode_steps -= 1
            return 0
        if self._last is not None:  # else nobody times steps
            self._steps_with_prompt += 1
            refresh_steps = REFRESH_STEPS if answers in self._decode_s else FIRST_REFRESH_STEPS
            if self._steps_with_prompt > refresh_steps:
                self._steps_with_prompt, self._decode_steps = 0, DECODE_STEPS - 1
                return 0
        decode_s = self._estimate_decode_s(answers)
        if decode_s is None:
            return min(limit, INITIAL_TOKENS)
        # Until it is timed: a token of a prompt takes no longer than one of an answer.
        token_s = self._estimate_token_s() or decode_s / answers
        self._credit = min(self._credit, 1.0) + SHARE * decode_s / token_s
        tokens = max(1, min(int(self._credit), int(MAX_SHARE * decode_s / token_s), limit))
        self._credit = max(0.0, self._credit - tokens)
        return tokens

    def on_step(self, answers: int, tokens: int, seconds: float | None) -> None:
        """Learn from a step.

        Args:
            answers, tokens: answering requests, and prompt tokens that it read.
            seconds: None: it also did something else.
        """
        last, self._last = self._last, (answers, tokens)
        if seconds is None or last is None or last[0] != answers:
            return
        if not answers:
            if tokens and last[1] and not self._token_s:
                self._token_s.append(2 * seconds / (tokens + last[1]))
        elif not (tokens or last[1]):
            self._decode_s.setdefault(answers, deque(maxlen=DECODE_SAMPLES)).append(seconds)
        elif tokens and last[1] and abs(tokens - last[1]) <= 1 + tokens // 8:
            decode_s = self._estimate_decode_s(answers)
            added_s = seconds / 2 if decode_s is None else max(seconds - decode_s, seconds / 16)
            self._token_s.append(2 * added_s / (tokens + last[1]))

    def _estimate_token_s(self) -> float | None:
        return max(median(self._token_s), 1e-7) if self._token_s else None

    def _estimate_decode_s(self, answers: int) -> float | None:
        """Rather too short than too long, where this number of answers was never timed."""
        if not self._decode_s:
            return None
        nearest = min(self._decode_s, key=lambda known: abs(known - answers))
        # What a busy machine adds is no part of a step. Were it counted, the bound would grow with
        # it, and prompt tokens would seem cheap too.
        samples = sorted(self._decode_s[nearest])
        return samples[len(samples) // 4] * min(1.0, answers / nearest)
