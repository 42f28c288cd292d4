"""What may come next, guessed cheaply, and how far guessing pays.

Owns: `Lookup`, drafts from the text itself; `Pace`, how many tokens to draft.
Does not know: MLX, models, ranks.
Invariant: what all ranks do depends on tokens, on counts, and on numbers that rank 0 has sent them;
clocks matter on rank 0 alone, and only in what it proposes.
Next: `speculation.py` lets the model check the drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from operator import add, sub

MATCH = 3  # tokens; where fewer agree, the next one seldom does


@dataclass(frozen=True)
class DraftStats:
    """How many tokens were drafted, and how many of them were kept; `by_model`,
    `by_model_accepted`: those of a draft model."""

    drafted: int = 0
    accepted: int = 0
    by_model: int = 0
    by_model_accepted: int = 0

    def __add__(self, other: DraftStats) -> DraftStats:
        return DraftStats(*map(add, astuple(self), astuple(other)))

    def __sub__(self, other: DraftStats) -> DraftStats:
        return DraftStats(*map(sub, astuple(self), astuple(other)))


class NgramProposer:
    """Prompt lookup: what followed when the last few tokens were seen before.

    Source: Saxena, Prompt Lookup Decoding (2023), https://github.com/apoorvumang/prompt-lookup-decoding.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the last place behind these tokens
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        for token in tokens:
            if len(self._tokens) >= MATCH:
                self._after[tuple(self._tokens[-MATCH:])] = len(self._tokens)
            self._tokens.append(token)

    @property
    def length(self) -> int:
        """Number of tokens that it knows."""
        return len(self._tokens)

    @property
    def hopeful(self) -> bool:
        """Whether there is a draft at all."""
        return tuple(self._tokens[-MATCH:]) in self._after

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; where the place that is copied reaches the end,
        the draft copies itself."""
        place = self._after.get(tuple(self._tokens[-MATCH:]))
        if place is None:
            return []
        text = self._tokens[place:]
        for at in range(most - len(text)):
            text.append(text[at])
        return text[:most]


def reference_proposal(tokens: Sequence[int], most: int) -> list[int]:
    """As `Lookup(tokens).draft(most)`, by looking at every place."""
    text, end = list(tokens), len(tokens)
    for place in range(end - 1, MATCH - 1, -1):
        if text[place - MATCH : place] == text[end - MATCH :]:
            for at in range(most):
                text.append(text[place + at])
            return text[end:]
    return []


class DraftLengthController:
    """How many tokens are drafted: as many as give the most tokens a second, by what was seen.

    With p the chance that a drafted token is kept, k of them give (1 - p^(k+1)) / (1 - p) tokens
    (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023), in the time
    that a step of k + 1 tokens took. If no k is faster than one token after another nothing is
    drafted for a while, each time longer, and then it is tried again.

    Args:
        fixed: draft so many always; None: what pays.
    """

    MOST = 16
    FIRST = 4
    GAIN = 1.05  # least: below it measuring errs
    RESTS = (32, 1024)  # tokens

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._seconds: dict[int, float] = {}  # of a step, by tokens drafted
        self._rest = self._tired = 0
        self.limit = 0
        self.drafts = DraftStats()
        self._kept = self._refused = 0.0
        self.begin()

    def begin(self) -> None:
        """Another text: what was seen of the last one's drafts says nothing of it."""
        self._kept, self._refused = 2.0, 0.5
        self._rest = self._tired = 0
        self.limit = self.FIRST if self._fixed is None else self._fixed

    def passed(self, tokens: int = 1) -> None:
        """So many tokens were made without a draft of this kind."""
        if self._rest:
            self._rest = max(0, self._rest - tokens)
            if not self._rest:
                self._kept, self._refused = 2.0, 0.5
                self._seconds = {k: s for k, s in self._seconds.items() if k == 0}
                self.limit = self.FIRST

    def verified(self, drafted: int, accepted: int, proposal: int) -> None:
        """A draft was checked, and rank 0 proposed how to go on."""
        self.drafts += DraftStats(drafted, accepted)
        self._kept = 0.9 * self._kept + accepted
        self._refused = 0.9 * self._refused + (accepted < drafted)
        if self._fixed is not None:
            return
        self.limit = proposal
        if not proposal:
            low, high = self.RESTS
            self._rest = min(low << self._tired, high)
            self._tired += 1

    def took(self, drafted: int, seconds: float) -> None:
        """How long a step with so many drafted tokens was."""
        known = self._seconds.get(drafted)
        if known is None:
            self._seconds[drafted] = seconds
        else:
            self._seconds[drafted] = 0.7 * known + 0.3 * min(seconds, 2 * known)

    def propose(self, least: float = 0.0) -> int:
        """Rank 0's proposal: the best number of tokens to draft; 0: none.

        Args:
            least: tokens a second that there are without these drafts, if it is known to be more
                than one token after another.
        """
        best, speed = self._best()
        if not speed:
            return self.limit
        return best if speed > max(self.GAIN / self._seconds[0], least) else 0

    @property
    def speed(self) -> float:
        """Tokens a second that its drafts are expected to give; 0.0: it does not draft, or nothing
        is known yet."""
        return self._best()[1] if self.limit and len(self._seconds) > 1 else 0.0

    def _best(self) -> tuple[int, float]:
        """The best number of tokens to draft, and tokens a second with it (0.0: unknown)."""
        if 0 not in self._seconds:
            return self.limit, 0.0
        p = min(self._kept / (self._kept + self._refused), 0.999)
        most = min(self.MOST, 2 * max(self._seconds) or self.FIRST)
        speeds = {k: (1 - p ** (k + 1)) / (1 - p) / self._expected(k) for k in range(1, most + 1)}
        best = max(speeds, key=lambda k: speeds[k])
        return best, speeds[best]

    def _expected(self, drafted: int) -> float:
        """Seconds of a step: between what was measured a straight line, beyond it another."""
        known = sorted(self._seconds.items())
        if len(known) == 1:
            return known[0][1] * (1 + 0.25 * drafted)
        above = next((i for i, (k, _) in enumerate(known) if k >= drafted), len(known) - 1)
        (k0, s0), (k1, s1) = known[max(above - 1, 0)], known[above]
        if k1 < drafted:
            k0, s0 = known[0]
        if k1 == k0:
            return s1
        return max(s0 + (s1 - s0) * (drafted - k0) / (k1 - k0), s0)
