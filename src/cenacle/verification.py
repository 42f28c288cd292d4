"""Does a group compute what it should? Asked once, before it serves people.

Owns: what is asked, what it is compared with, what is remembered of it, and the sentence that says
what differs.
Does not know: HTTP, how ranks are started (`api.load` does, and calls `before` and `after`).
How: fixed prompts of random ids (short ones, whose tokens together use nearly every expert, and one
of more than 2,000) are answered greedily; log-probabilities and tokens are compared with those that
one node alone gave, or that were kept when this checkpoint last passed. Sums of the weights in each
rank's memory are compared too (`model/sums.py`): they find the one wrong byte that hardly changes
an answer, and say on which machine it is. Links are compared with what they gave before and with
what the slowest useful cable gives, an exchange of the working group with its link's latency.
Invariant: nothing is served that failed; what passed once (this plan on these machines with these
versions) is not asked again unless it is wanted; a record is written only after a pass, or when
there was nothing to compare with, and then this is said.
Next: `api.load`.
"""

from __future__ import annotations

import hashlib
import json
import math
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .cluster import node_info
from .cluster.link_probe import Link
from .core.plan import Plan
from .core.request import Request, TokenEvent
from .core.step import Step
from .errors import CenacleError, ClusterError, PlanError
from .model.byte_ranges import is_partial
from .model.checksums import Checksums, compare_checksums

if TYPE_CHECKING:
    from .api import Model
    from .cluster.formation import Formed
    from .model.checkpoint import Checkpoint

FORMAT = 2  # of records; another is as none
SHORT, SHORT_TOKENS, ANSWER_TOKENS = 16, 8, 8
LONG_TOKENS, LONG_ANSWER_TOKENS = 2304, 4
EXCHANGE_TOKENS = 12  # decoded alone, each step measured
TOP = 5  # log-probabilities that are compared at each token
DEADLINE_S = 900.0  # of one token


class Tolerance(NamedTuple):
    """How far log-probabilities (nats) may be apart: nineteen of twenty, and every one."""

    usual: float
    most: float


# Where all that is added is float32 or int32 only the order of additions differs between placements
# (9e-4 seen); in bfloat16 every addition rounds, and a router may then choose another expert (0.07
# and 0.5 seen, random weights).
FINE, COARSE = Tolerance(0.02, 0.02), Tolerance(0.2, 2.0)

# A link that gives less than a third of what it gave, or takes more than three times as long and
# some more, is not the link that it was; the rest is what other traffic does to a measurement.
WORSE = 3.0
WORSE_LATENCY_S = 300e-6
LEAST_BYTES_S = 50e6  # half of what a gigabit cable gives: below it is a broken one
MOST_LATENCY_S = 5e-3  # Wi-Fi, or packets that are lost
BEHIND_THE_OTHERS = 8.0  # with three links and more: how far one may be from the median
EXCHANGE_WORSE, EXCHANGE_S = 10.0, 5e-3  # of the link's latency, and what waiting may add
TRIES = 3  # a link that looks bad is measured again


@dataclass(frozen=True)
class Answer:
    """What a prompt gave: tokens, and at each the most probable ids with log-probabilities."""

    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return {"tokens": list(self.tokens), "top": [list(map(list, t.items())) for t in self.top]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """Read what `to_json` gave."""
        return cls(tuple(data["tokens"]), tuple({int(i): p for i, p in t} for t in data["top"]))


@dataclass(frozen=True)
class Seen:
    """What a group gave.

    Args:
        answers: to `prompts`, in order.
        sums: of every rank's weights.
        devices: what each rank computes with.
        exchange_s: seconds of an exchange while one request is answered, the median; 0: one node.
    """

    answers: tuple[Answer, ...]
    sums: tuple[Checksums, ...]
    devices: tuple[str, ...]
    exchange_s: float


class _Exchanges:
    """Observes a group: how long its exchanges take, without waiting for the slowest rank."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def sent(self, step: Step) -> None:
        """Nothing to see yet."""

    def measured(self, reports: list[dict[str, Any]]) -> None:
        """See `Terms.add`."""
        if all(r["decoding"] for r in reports):
            times = zip(*(r["all_reduces_s"] for r in reports), strict=True)
            self.seconds += [min(of_ranks) for of_ranks in times]


def prompts(vocabulary: int, context: int | None) -> list[tuple[int, ...]]:
    """The fixed prompts: the short ones, then the long one, as long as the context allows."""
    draw = random.Random(1)
    room = (context or LONG_TOKENS * 2) - LONG_ANSWER_TOKENS - ANSWER_TOKENS
    sizes = [SHORT_TOKENS] * SHORT + [max(1, min(LONG_TOKENS, room))]
    return [tuple(draw.randrange(vocabulary) for _ in range(size)) for size in sizes]


def see(model: Model, measure_every: int) -> Seen:
    """Ask a loaded model the prompts, and what an exchange takes.

    Args:
        measure_every: what the group is to measure again afterwards, see `api.load`.

    Raises:
        CenacleError: the group failed.
    """
    ready = model.ranks.ready  # of these, whatever happens meanwhile
    *short, long = prompts(model.spec.vocab_size, model.spec.context_length)
    exchanges = _Exchanges()
    model.group.bypass_caches(True)  # nothing that an earlier one kept on disk
    try:
        answers = _ask(model, short, ANSWER_TOKENS) + _ask(model, [long], LONG_ANSWER_TOKENS)
        if model.plan.nodes > 1:
            model.group.observers.append(exchanges)
            model.group.measure_steps(1)
            _ask(model, short[:1], EXCHANGE_TOKENS)
            model.group.observers.remove(exchanges)
    finally:
        model.group.bypass_caches(False)
    model.group.reset_statistics(measure_every)
    return Seen(
        tuple(answers),
        tuple(r.pop("sums") for r in ready),
        tuple(str(r["device"]) for r in ready),
        statistics.median(exchanges.seconds or [0.0]),
    )


def _ask(model: Model, asked: Sequence[tuple[int, ...]], tokens: int) -> list[Answer]:
    """The answers to prompts that are submitted together."""
    events: queue.Queue[TokenEvent | CenacleError] = queue.Queue()
    names = [f"self-test {tokens} {i}" for i in range(len(asked))]
    given: dict[str, list[TokenEvent]] = {name: [] for name in names}
    for name, prompt in zip(names, asked, strict=True):
        request = Request(name, prompt, tokens, logprobs=TOP)
        model.group.submit(request, events.put)
    open_ = set(names)
    while open_:
        try:
            event = events.get(timeout=DEADLINE_S)
        except queue.Empty:
            raise ClusterError(f"self-test: no token came for {DEADLINE_S:g} s") from None
        if isinstance(event, CenacleError):
            raise event
        given[event.request_id].append(event)
        if event.finish is not None:
            open_.discard(event.request_id)
    return [
        Answer(tuple(e.token for e in given[n]), tuple(dict(e.top) for e in given[n]))
        for n in names
    ]


def apart(expected: Answer, got: Answer) -> Iterator[tuple[int, int, float, float]]:
    """Position, id and both log-probabilities, of what both answers tell.

    Where two tokens are as probable as each other one group may choose the one and another the
    other: behind that the answers are not compared.
    """
    for at, (a, b) in enumerate(zip(expected.top, got.top, strict=False)):
        for token in a.keys() & b.keys():
            yield at, token, a[token], b[token]
        if expected.tokens[at] != got.tokens[at]:
            return


def differs(expected: Answer, got: Answer, tolerance: Tolerance) -> str:
    """What differs in an answer by more than rounding does; empty: nothing."""
    for at, token, before, now in apart(expected, got):
        if not abs(before - now) <= tolerance.most:  # also what is no number
            return (
                f"at token {at} the log-probability of id {token} was {before:.3f}, is {now:.3f} "
                f"(may differ by {tolerance.most:g})"
            )
    for at, (mine, theirs) in enumerate(zip(expected.tokens, got.tokens, strict=False)):
        if mine != theirs:
            top = expected.top[at]
            tie = top[mine] - top.get(theirs, -math.inf) <= 2 * tolerance.usual
            return "" if tie else f"token {at} was {mine}, is {theirs}"
    same = len(expected.tokens) == len(got.tokens)
    return "" if same else f"{len(expected.tokens)} tokens were answered, now {len(got.tokens)}"


def spread(expected: Sequence[Answer], got: Sequence[Answer]) -> float:
    """By how much nineteen of twenty log-probabilities differ at most."""
    every = [
        abs(before - now)
        for a, b in zip(expected, got, strict=True)
        for _, _, before, now in apart(a, b)
    ]
    return sorted(every)[int(0.95 * len(every))] if every else math.inf


def tolerance_of(dtype: str, devices: Sequence[str]) -> Tolerance:
    """How far log-probabilities may be apart.

    Args:
        dtype: the model's, see `ModelSpec`.
        devices: what each rank computes with, as it says when it is ready.
    """
    native = all(" kernels" in d and "int8 activations" not in d for d in devices)
    return FINE if dtype == "float32" or native else COARSE


def bad_links(
    names: Sequence[str],
    found: Mapping[tuple[int, int], Link],
    known: Mapping[tuple[int, int], Link],
) -> dict[tuple[int, int], str]:
    """Links that are not what they should be, each with a sentence.

    Args:
        names: of the machines, by rank.
        found: what was measured now, by pairs of ranks.
        known: what was measured when it passed, where that is known.
    """
    bad: dict[tuple[int, int], str] = {}
    rates = [link.bytes_per_s for link in found.values()]
    for pair, link in found.items():
        between = f"the link between {names[pair[0]]} and {names[pair[1]]}"
        before = known.get(pair)
        if link.bytes_per_s < LEAST_BYTES_S:
            bad[pair] = (
                f"{between} carries {link.bytes_per_s / 1e6:.0f} MB/s, and a sound gigabit "
                f"cable 110"
            )
        elif link.latency_s > MOST_LATENCY_S:
            bad[pair] = (
                f"{between} takes {1e3 * link.latency_s:.1f} ms one way: Wi-Fi, or packets are lost"
            )
        elif before is not None and link.bytes_per_s * WORSE < before.bytes_per_s:
            bad[pair] = (
                f"{between} carries {link.bytes_per_s / 1e6:.0f} MB/s, and carried "
                f"{before.bytes_per_s / 1e6:.0f} when it was tested"
            )
        elif before is not None and link.latency_s > WORSE * before.latency_s + WORSE_LATENCY_S:
            bad[pair] = (
                f"{between} takes {1e6 * link.latency_s:.0f} us one way, and took "
                f"{1e6 * before.latency_s:.0f} when it was tested"
            )
        elif len(rates) > 2 and link.bytes_per_s * BEHIND_THE_OTHERS < statistics.median(rates):
            bad[pair] = (
                f"{between} carries {link.bytes_per_s / 1e6:.0f} MB/s, the others "
                f"{statistics.median(rates) / 1e6:.0f}"
            )
    return bad


class SelfTest:
    """One self-test, of one loading.

    Args:
        folder: where it is remembered what passed.
        always: ask also what has passed before.
        say: told what is done and found, in sentences.
    """

    def __init__(
        self, folder: Path, always: bool = True, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder, self._always, self._say = folder / "selftest", always, say
        self._wanted = False
        self._names: list[str] = []
        self._links: dict[str, Link] = {}  # by both machines' ids
        self._latency_s = 0.0
        self._key = self._digest = ""
        self._record: dict[str, Any] = {}

    def before(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        how: Mapping[str, Any],
        alone: Callable[[], Seen],
        formed: Formed | None = None,
        measure: Callable[[], Mapping[tuple[int, int], Link]] = dict,
    ) -> bool:
        """Before a group is loaded: whether it is to be tested, and then its ranks sum.

        If there is nothing to compare it with, one node is loaded first.

        Args:
            checkpoint, plan: what will be loaded.
            how: whatever else changes what is computed, and how fast.
            alone: loads one node with the whole model here, asks it, ends it.
            formed: the machines, where they are several, and what their links give.
            measure: measures the links again.

        Raises:
            ClusterError: a link is not what it should be.
        """
        members = formed.formation.members if formed is not None else ()
        self._names = [n.name for n in members] or [f"rank {r}" for r in range(plan.nodes)]
        self._digest = node_info.checkpoint_digest(checkpoint.folder.resolve())
        said = {
            "plan": plan.to_json(),
            "machines": [[n.id, n.info.processor] for n in members],
            "exchange": formed.backend if formed is not None else None,
            "versions": node_info.versions(),
            "how": dict(how),
        }
        self._key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        self._record = self._read(f"{self._digest[:32]}.json")
        self._wanted = self._always or self._key not in self._record.get("passed", [])
        if formed is not None:
            self._check_links(formed, measure)
        if not self._wanted:
            return False
        self._say("self-test: what this group computes is checked before it serves")
        if "answers" not in self._record and plan.nodes > 1:
            self._see_one_node(checkpoint, alone)
        return True

    def _see_one_node(self, checkpoint: Checkpoint, alone: Callable[[], Seen]) -> None:
        if is_partial(checkpoint.folder):
            why = "this machine has a part of the checkpoint only"
        else:
            self._say("self-test: first one node alone, to compare with")
            try:
                self._record = self._recorded(alone(), None)
                return
            except PlanError as error:
                why = f"the model does not fit on this machine alone ({error})"
        self._say(f"self-test: nothing to compare with yet: {why}")

    def after(self, model: Model, measure_every: int, latency_s: float = 0.0) -> None:
        """When the group has loaded: ask it, compare, remember.

        Args:
            model: just loaded, its ranks told to sum if `before` said so.
            measure_every: see `see`.
            latency_s: what is added to every exchange, see `api.load`.

        Raises:
            ClusterError: what differs; nothing of it is remembered.
        """
        if not self._wanted:
            return
        began = time.monotonic()
        seen = see(model, measure_every)
        found = self._compare(model, seen)
        limit = EXCHANGE_WORSE * (self._latency_s + latency_s) + EXCHANGE_S
        if seen.exchange_s > limit:
            found.append(
                f"an exchange of the working group takes {1e3 * seen.exchange_s:.1f} ms where the "
                f"links' latency is {1e3 * (self._latency_s + latency_s):.2f} ms (look at cables "
                f"and switches, and at what else runs on the machines)"
            )
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise ClusterError(
                f"self-test: {'; '.join(found[:3])}{more}. Nothing is served. If nothing else is "
                f"said, copy the model to that machine again and test its memory; "
                f"--no-verify serves all the same"
            )
        if "answers" not in self._record:
            self._record = self._recorded(seen, self._key if model.plan.nodes > 1 else None)
            what = "what it gave is kept to compare with"
        else:
            what = f"{len(seen.answers)} prompts and the sums of {_count(seen)} pieces agree"
        self._record.setdefault("passed", []).append(self._key)
        self._write(f"{self._digest[:32]}.json", self._record)
        if self._links:
            known = self._read("links.json")
            for pair, link in self._links.items():
                known.setdefault("links", {})[pair] = [link.latency_s, link.bytes_per_s]
            self._write("links.json", known)
        each = f", an exchange takes {1e3 * seen.exchange_s:.2f} ms" if seen.exchange_s else ""
        self._say(f"self-test: passed in {time.monotonic() - began:.1f} s: {what}{each}")

    def _compare(self, model: Model, seen: Seen) -> list[str]:
        """What differs, the most telling first."""
        record, plan, found = self._record, model.plan, []
        if "answers" not in record:
            return [
                f"{' and '.join(self._names)} do not hold the same {name}"
                for name in _unlike(plan, seen.sums)
            ]
        if record["plan"] is None:
            for piece, ranks in compare_checksums(record["sums"][0], seen.sums).mismatches:
                who = " or ".join(self._names[r] for r in ranks)
                what = piece.replace("[", " of expert ").removesuffix("]")
                found.append(f"{who} does not hold the checkpoint's {what}")
        elif record["plan"] == self._key:
            for rank, (before, now) in enumerate(zip(record["sums"], seen.sums, strict=True)):
                for name in (n for n in before if before[n] != now.get(n)):
                    found.append(f"{self._names[rank]} does not hold the {name} that it did")
        tolerance = tolerance_of(model.spec.dtype, [*seen.devices, *record["devices"]])
        source = "one node" if record["plan"] is None else "an earlier pass"
        asked = prompts(model.spec.vocab_size, model.spec.context_length)
        answers = [Answer.from_json(a) for a in record["answers"]]
        for prompt, expected, got in zip(asked, answers, seen.answers, strict=True):
            if why := differs(expected, got, tolerance):
                what = f"a prompt of {len(prompt)} tokens is answered otherwise than by {source}"
                found.append(f"{what}: {why}")
        if not found and (far := spread(answers, seen.answers)) > tolerance.usual:
            found.append(
                f"log-probabilities of answers differ by {far:.2g} from those of {source}; "
                f"rounding gives {tolerance.usual:g}"
            )
        return found

    def _check_links(
        self, formed: Formed, measure: Callable[[], Mapping[tuple[int, int], Link]]
    ) -> None:
        members, found = formed.formation.members, dict(formed.links)
        known = self._read("links.json").get("links", {})
        ids = {(a, b): " ".join(sorted((members[a].id, members[b].id))) for a, b in formed.links}
        before = {pair: Link(*known[name]) for pair, name in ids.items() if name in known}
        bad = bad_links(self._names, found, before)
        for _ in range(TRIES - 1):
            if not bad:
                break
            for pair, link in measure().items():  # the best counts: others use the network too
                old = found[pair]
                found[pair] = Link(
                    min(old.latency_s, link.latency_s), max(old.bytes_per_s, link.bytes_per_s)
                )
            bad = bad_links(self._names, found, before)
        self._links = {ids[pair]: link for pair, link in found.items()}
        self._latency_s = max((link.latency_s for link in found.values()), default=0.0)
        if bad and self._wanted:
            raise ClusterError(
                f"self-test: {'; '.join(bad.values())}. Nothing is served: change the cable or the "
                f"port, look at what else uses the network; --no-verify serves all the same"
            )
        for why in bad.values():
            self._say(f"{why}: look at the cable (`cenacle doctor` on both)")

    def _recorded(self, seen: Seen, plan: str | None) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "plan": plan,
            "answers": [a.to_json() for a in seen.answers],
            "sums": list(seen.sums),
            "devices": list(seen.devices),
            "passed": [],
        }

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self._folder / name).read_text())
            return found if isinstance(found, dict) and found.get("format") == FORMAT else {}
        except (OSError, ValueError):
            return {}  # never passed

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        from .paths import write_private

        write_private(self._folder / name, json.dumps({**data, "format": FORMAT}).encode())


def _unlike(plan: Plan, sums: Sequence[Checksums]) -> list[str]:
    """Parameters that all ranks hold wholly, and not the same: of the trunk, if it is not cut, and
    outside of blocks with experts, whose shared ones may be."""
    if plan.trunk != "replicated":
        return []
    experts = {n for s in sums for n in s if n.endswith("]")}
    blocks = tuple({f"{n.rsplit('.', 3)[0]}." for n in experts})
    shared = set.intersection(*(set(s) for s in sums))
    alike = (n for n in sorted(shared) if not n.startswith(blocks))
    return [n for n in alike if len({tuple(s[n]) for s in sums}) > 1]


def _count(seen: Seen) -> int:
    return sum(len(sums) for sums in seen.sums)


__all__ = ["Seen", "SelfTest", "see"]
