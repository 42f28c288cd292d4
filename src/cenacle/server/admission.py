"""What the requests of each API key use at once and in a day.

Owns: running answers and reserved tokens, by key; the refusals for both.
Does not know: HTTP, what an answer is.
Invariant: a key has no more answers running than it may have, and its answers cannot become longer
than what is left of its tokens of the day: they are reserved before, and given back at the end.
Next: `middleware.py` opens an admission for each request, `app.py` fills it in.
"""

from __future__ import annotations

from collections import Counter

from ..errors import Busy
from .api.validation import RequestError
from .auth import ApiKey, KeyStore


class QuotaUsed(RequestError):
    """The tokens of the day are used, or reserved by answers that are still running."""

    def __init__(self, limit: int, needed: int, remaining: int, retry_after_s: int) -> None:
        super().__init__(
            None,
            f"this API key has {max(remaining, 0)} of its {limit} tokens of this day (UTC) left, "
            f"and the request needs at least {needed}",
            "insufficient_quota",
            429,
        )
        self.retry_after_s = retry_after_s


class Admissions:
    """All running requests.

    Args:
        keys: the existing keys, and what they have used.
        max_answers: at once, in total.
        max_answers_per_key: at once, of each key without a limit of its own.
    """

    def __init__(self, keys: KeyStore, max_answers: int, max_answers_per_key: int) -> None:
        self._keys, self._max_answers = keys, max_answers
        self._max_answers_per_key = max_answers_per_key
        self._answers: Counter[str] = Counter()
        self._reserved_tokens: Counter[str] = Counter()

    def open(self, name: str, key: ApiKey | None) -> Admission:
        """Admit a request with one answer.

        Args:
            name: of the key; "": none.
            key: None: there is none.

        Raises:
            Busy: too many answers are running.
        """
        admission = Admission(self, name, key)
        admission.add_answers(1)
        return admission


class Admission:
    """One request's part; to be closed when the response has ended."""

    def __init__(self, all_admissions: Admissions, name: str, key: ApiKey | None) -> None:
        self._all, self._name, self._key = all_admissions, name, key
        self._answers = self._reserved_tokens = 0

    def add_answers(self, count: int) -> None:
        """Admit more answers of the request.

        Raises:
            RequestError: it asks for more than may ever run at once.
            Busy: too many are running.
        """
        all_answers, answers = self._all, self._answers + count
        limit = all_answers._max_answers_per_key
        if self._key is not None and self._key.max_concurrent:
            limit = self._key.max_concurrent
        # Without keys all requests are one user's, who may take the total.
        limit = min(limit, all_answers._max_answers) if self._name else all_answers._max_answers
        if answers > limit:
            reason = f"expected at most {limit} answers at once, got {answers}; ask for fewer"
            raise RequestError("n", reason)
        if all_answers._answers.total() + count > all_answers._max_answers:
            raise _too_many(f"the server gives {all_answers._max_answers} answers already")
        if self._name and all_answers._answers[self._name] + count > limit:
            raise _too_many(f"{limit} answers for this key are running already")
        all_answers._answers[self._name] += count
        self._answers = answers

    def reserve_tokens(self, prompt_tokens: int, max_tokens: int, answers: int) -> int:
        """Reserve what the answers may cost; give the most tokens that each may have.

        Args:
            prompt_tokens: of all prompts.
            max_tokens: that each answer asks for.
            answers: how many there are.

        Raises:
            QuotaUsed: what is left of the day does not suffice for a token of each.
        """
        if self._key is None or self._key.tokens_per_day is None:
            return max_tokens
        budget, keys, reserved = (
            self._key.tokens_per_day,
            self._all._keys,
            self._all._reserved_tokens,
        )
        remaining = budget - keys.used_today(self._name) - reserved[self._name]
        if remaining < prompt_tokens + answers:
            raise QuotaUsed(budget, prompt_tokens + answers, remaining, keys.seconds_until_reset())
        limit = min(max_tokens, (remaining - prompt_tokens) // answers)
        self._reserved_tokens += prompt_tokens + limit * answers
        reserved[self._name] += prompt_tokens + limit * answers
        return limit

    def close(self) -> None:
        """Give everything back; what was used has been charged."""
        all_answers = self._all
        for counts, amount in (
            (all_answers._answers, self._answers),
            (all_answers._reserved_tokens, self._reserved_tokens),
        ):
            counts[self._name] -= amount
            if not counts[self._name]:
                del counts[self._name]
        self._answers = self._reserved_tokens = 0


def _too_many(reason: str) -> Busy:
    return Busy(f"Too many requests at once: {reason}", 1)
