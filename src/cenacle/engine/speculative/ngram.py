"""Cheap proposals of the next tokens, and how many of them pay.

Owns: `NgramProposer`, drafts from the text itself; `DraftLengthController`, the number of tokens to
draft; `DraftStats`.
Does not know: MLX, models, ranks.
Invariant: what all ranks do depends only on tokens, counts, and numbers that rank 0 has sent;
clocks matter on rank 0 alone, and only for what it proposes.
Next: `decoder.py` lets the model verify the drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import add, sub

NGRAM = 3  # tokens; with fewer in common the next one seldom agrees


@dataclass(frozen=True)
class DraftStats:
    """Drafted and accepted tokens; `by_model`, `by_model_accepted`: those of a draft model."""

    drafted: int = 0
    accepted: int = 0
    by_model: int = 0
    by_model_accepted: int = 0

    def __add__(self, other: DraftStats) -> DraftStats:
        return DraftStats(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: DraftStats) -> DraftStats:
        return DraftStats(*map(sub, astuple(self), astuple(other)))


class NgramProposer:
    """Prompt lookup: proposes what followed the last few tokens before.

    Source: Saxena, Prompt Lookup Decoding (2023), https://github.com/apoorvumang/prompt-lookup-decoding.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._next_position: dict[tuple[int, ...], int] = {}  # latest position after an n-gram
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            if len(self._tokens) >= NGRAM:
                self._next_position[tuple(self._tokens[-NGRAM:])] = len(self._tokens)
            self._tokens.append(token)

    @property
    def length(self) -> int:
        """Number of tokens of the text."""
        return len(self._tokens)

    @property
    def has_proposal(self) -> bool:
        """Whether the last tokens occurred before."""
        return tuple(self._tokens[-NGRAM:]) in self._next_position

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens; a copy that reaches the end of the text continues with itself."""
        position = self._next_position.get(tuple(self._tokens[-NGRAM:]))
        if position is None:
            return []
        draft = self._tokens[position:]
        for i in range(limit - len(draft)):
            draft.append(draft[i])
        return draft[:limit]


def reference_proposal(tokens: Sequence[int], limit: int) -> list[int]:
    """`NgramProposer(tokens).propose(limit)`, by looking at every position."""
    text, end = list(tokens), len(tokens)
    for position in range(end - 1, NGRAM - 1, -1):
        if text[position - NGRAM : position] == text[end - NGRAM :]:
            for i in range(limit):
                text.append(text[position + i])
            return text[end:]
    return []


class DraftLengthController:
    """Chooses the number of drafted tokens that gives the most tokens a second.

    With p the probability that a drafted token is accepted, k of them give (1 - p^(k+1)) / (1 - p)
    tokens (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023), in
    the measured time of a step of k + 1 tokens. If no k is faster than plain decoding, drafting
    pauses, longer each time, and is then tried again.

    Whatever the estimates say, there is an account of time: plain tokens bring `BUDGET` of theirs,
    a draft what it won or lost, and no draft is made while it is overdrawn.

    Args:
        fixed: always draft this many tokens; None: as many as pay.
    """

    MAX_TOKENS = 16
    INITIAL_TOKENS = 4
    MIN_GAIN = 1.05  # smaller gains are within the error of measurement
    PAUSE_TOKENS = (32, 1024)  # the first and the longest pause
    INITIAL_COUNTS = (2.0, 0.5)  # accepted and rejected, before anything is known
    DECAY = 0.9  # of the counts, per draft
    PROBE_TOKENS = 2  # drafted after a pause
    PROBE_COUNTS = (1.0, 0.5)
    BUDGET = 0.04  # of the time of plain tokens that drafts may lose
    MAX_CREDIT = 10.0  # steps of plain decoding that past wins let it lose
    PROBE_COST = 1.0  # steps that there must be for another try
    KEPT_PAUSE_TOKENS = 128  # of a pause that another text inherits

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._step_s: dict[int, float] = {}  # by drafted tokens
        self._pause_left = self._pauses = 0
        self.limit = 0
        self.stats = DraftStats()
        self._accepted = self._rejected = self._credit = 0.0
        self.reset()

    def reset(self, *, is_same_source: bool = False) -> None:
        """Start another text: the acceptance of the last one does not apply.

        Args:
            is_same_source: it says something: a model drafts for this text too. Then a pause goes
                on, and so does what is known while there is none.
        """
        if is_same_source:
            self._pause_left = min(self._pause_left, self.KEPT_PAUSE_TOKENS)
            return
        self._accepted, self._rejected = self.INITIAL_COUNTS
        self._pause_left = self._pauses = 0
        self._credit = max(self._credit, 0.0)
        self.limit = self.INITIAL_TOKENS if self._fixed is None else self._fixed

    def on_undrafted(self, tokens: int = 1) -> None:
        """Count tokens that were generated without a draft of this kind."""
        if self._pause_left:
            self._pause_left = max(0, self._pause_left - tokens)
            if not self._pause_left:
                self._accepted, self._rejected = self.PROBE_COUNTS
                for k in [k for k in self._step_s if k]:
                    del self._step_s[k]
                self.limit = self.PROBE_TOKENS

    def on_verified(self, drafted: int, accepted: int, proposal: int) -> None:
        """Count a verified draft.

        Args:
            proposal: rank 0's `propose`.
        """
        self._learn(drafted, accepted, int(accepted < drafted), proposal)

    def _learn(self, drafted: int, accepted: int, rejected: int, proposal: int) -> None:
        self.stats += DraftStats(drafted, accepted)
        self._accepted = self.DECAY * self._accepted + accepted
        self._rejected = self.DECAY * self._rejected + rejected
        if self._fixed is not None:
            return
        self.limit = proposal if proposal <= self.MAX_TOKENS else 0
        if not self.limit:
            shortest, longest = self.PAUSE_TOKENS
            least = max(proposal - self.MAX_TOKENS, 0)
            self._pause_left = max(min(shortest << self._pauses, longest), least)
            self._pauses += 1

    def on_step_time(self, drafted: int, seconds: float, tokens: float = 1) -> None:
        """Learn how long a step with so many drafted tokens takes.

        Args:
            tokens: that it gave, to each request.
        """
        self._keep_account(drafted, seconds, tokens)
        known = self._step_s.get(drafted)
        if known is None:
            self._step_s[drafted] = seconds
        else:
            self._step_s[drafted] = 0.7 * known + 0.3 * min(seconds, 2 * known)

    def _keep_account(self, drafted: int, seconds: float, tokens: float) -> None:
        plain_s = self._step_s.get(0)
        if plain_s is None:
            return
        if drafted:
            # One step that had to wait for something else says nothing about drafts.
            self._credit += tokens - min(seconds / plain_s, 4 + drafted)
        else:
            self._credit += self.BUDGET
        self._credit = min(self._credit, self.MAX_CREDIT)

    def propose(self, min_tokens_per_s: float = 0.0) -> int:
        """Rank 0's proposal: the best number of tokens to draft; 0: none.

        Beyond `MAX_TOKENS`: none for at least as many tokens as it is beyond.

        Args:
            min_tokens_per_s: speed without these drafts, if it is known to exceed that of plain
                decoding.
        """
        best, tokens_per_s = self._best()
        if not tokens_per_s:
            return self.limit
        worthwhile = max(self.MIN_GAIN / self._step_s[0], min_tokens_per_s)
        if self._credit < 0 and self._fixed is None:
            return self.MAX_TOKENS + math.ceil((self.PROBE_COST - self._credit) / self.BUDGET)
        return best if tokens_per_s > worthwhile else 0

    @property
    def tokens_per_s(self) -> float:
        """Expected speed with its drafts; 0.0 while it does not draft, or nothing is known."""
        return self._best()[1] if self.limit and len(self._step_s) > 1 else 0.0

    def _best(self) -> tuple[int, float]:
        """The best number of tokens to draft, and tokens a second with it (0.0: unknown)."""
        if 0 not in self._step_s:
            return self.limit, 0.0
        p = min(self._accepted / (self._accepted + self._rejected), 0.999)
        longest = min(self.MAX_TOKENS, 2 * max(self._step_s) or self.INITIAL_TOKENS)
        speeds = {
            k: self._expected_tokens(p, k) / self._expected_step_s(k) for k in range(1, longest + 1)
        }
        best = max(speeds, key=lambda k: speeds[k])
        return best, speeds[best]

    def _expected_tokens(self, p: float, drafted: int) -> float:
        return float((1 - p ** (drafted + 1)) / (1 - p))

    def _expected_step_s(self, drafted: int) -> float:
        """Linear between measurements, and beyond the last one."""
        known = sorted(self._step_s.items())
        if len(known) == 1:
            return known[0][1] * (1 + 0.25 * drafted)
        above = next((i for i, (k, _) in enumerate(known) if k >= drafted), len(known) - 1)
        (k0, s0), (k1, s1) = known[max(above - 1, 0)], known[above]
        if k1 < drafted:
            k0, s0 = known[0]
        if k1 == k0:
            return s1
        return max(s0 + (s1 - s0) * (drafted - k0) / (k1 - k0), s0)


class GroupLengthController(DraftLengthController):
    """Chooses the length of drafts in passes for several requests.

    Steps are timed by the number of requests. Each request has an acceptance of its own, which
    begins as that of all. Beginning to draft and ending cost steps: a debt that the account pays
    off part by part while drafts are made, and all of it when they end.
    """

    BUDGET = 0.03  # a try that fails costs steps, not parts of one
    INITIAL_CREDIT = 1.0
    END_COST = 1.0
    MAX_BEGIN_COST = 6.0  # steps; one that waited for something else says nothing
    PAID_PER_PASS = 0.25  # steps of the debt
    PRIOR = 2.0  # tokens that the acceptance of all counts as, for one request

    def __init__(self, fixed: int | None = None) -> None:
        self._by_requests: dict[int, dict[int, float]] = {}
        self._counts: list[tuple[float, float]] = []  # accepted and rejected, of each request
        self._debt = 0.0
        super().__init__(fixed)
        self._credit = self.INITIAL_CREDIT
        if fixed is None:
            self.limit = self.PROBE_TOKENS  # a longer one may cost many steps

    def select(self, requests: int) -> None:
        """From now on steps are for so many requests."""
        self._step_s = self._by_requests.setdefault(requests, {})

    @property
    def is_timed(self) -> bool:
        """Whether it is known how long plain decoding takes."""
        return 0 in self._step_s

    def begin(self, requests: int) -> None:
        """Begin to draft."""
        self.select(requests)
        self._counts = [(0.0, 0.0)] * requests
        self._debt = self.END_COST

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some of the requests."""
        self.select(len(rows))
        self._counts = [self._counts[row] for row in rows]

    def on_group_verified(self, results: Sequence[tuple[int, int]], proposal: int) -> None:
        """Count a pass.

        Args:
            results: drafted and accepted tokens of each request.
            proposal: rank 0's `propose`.
        """
        drafts = [(drafted, accepted) for drafted, accepted in results if drafted]
        if not drafts:
            return
        self._counts = [
            (self.DECAY * old + accepted, self.DECAY * rejected + (accepted < max(drafted, 1)))
            for (old, rejected), (drafted, accepted) in zip(self._counts, results, strict=True)
        ]
        self._learn(
            sum(drafted for drafted, _ in drafts),
            sum(accepted for _, accepted in drafts),
            sum(accepted < drafted for drafted, accepted in drafts),
            proposal,
        )
        if not self.limit:
            self._pay(self._debt)

    def _pay(self, steps: float) -> None:
        self._credit -= min(steps, self._debt)
        self._debt -= min(steps, self._debt)

    def on_first_pass(self, seconds: float, tokens: float) -> None:
        """Count the pass in which drafting began."""
        plain_s = self._step_s.get(0)
        if plain_s is not None:
            self._debt += max(min(seconds / plain_s, self.MAX_BEGIN_COST) - tokens, 0.0)

    def propose(self, min_tokens_per_s: float = 0.0) -> int:
        """See `DraftLengthController`; a pause lasts until the debt is paid off too."""
        proposal = super().propose(min_tokens_per_s)
        if 0 < proposal <= self.MAX_TOKENS or not self._debt:
            return proposal
        missing = self.PROBE_COST - self._credit + self._debt
        return self.MAX_TOKENS + max(math.ceil(missing / self.BUDGET), 1)

    def on_empty_pass(self, seconds: float) -> None:
        """Count a pass in which nothing was drafted."""
        self._keep_account(1, seconds, 1)

    def on_step_time(self, drafted: int, seconds: float, tokens: float = 1) -> None:
        """See `DraftLengthController`."""
        if drafted:
            self._pay(self.PAID_PER_PASS)
        super().on_step_time(drafted, seconds, tokens)

    def _expected_tokens(self, p: float, drafted: int) -> float:
        """The mean of all requests."""
        if not self._counts:
            return super()._expected_tokens(p, drafted)
        own = [
            min((accepted + self.PRIOR * p) / (accepted + rejected + self.PRIOR), 0.999)
            for accepted, rejected in self._counts
        ]
        return sum(super(GroupLengthController, self)._expected_tokens(q, drafted) for q in own) / (
            len(own)
        )
