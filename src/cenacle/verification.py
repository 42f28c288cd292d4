"""Verifies a group of ranks before it serves requests.

Owns: what the group is asked, what the answers are compared with, the records of what passed, and
the sentence that says what differs.
Does not know: HTTP, how ranks are started (`runtime.py`).
How: fixed prompts of random ids (short ones, whose tokens together use nearly every expert, and one
of more than 2,000 tokens) are answered greedily. Tokens and log-probabilities are compared with
those of a single node, or of the last group that passed. Checksums of the weights in each rank's
memory (`model/checksums.py`) find a wrong byte that hardly changes an answer, and name the node.
Links are compared with their earlier measurements and with the slowest useful cable, an all-reduce
of the running group with the latency of its links.
Invariant: a group that fails does not serve. A plan that passed on these machines with these
versions is verified again only on request. A record is written only after a pass, or when there was
nothing to compare with, and then this is reported.
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

from .core.link import Link
from .core.model_spec import ModelSpec
from .core.plan import Plan
from .core.request import GroupEvent, PromptLogprobs, Request, TokenEvent
from .errors import CenacleError, ClusterError, PlanError
from .model.byte_ranges import is_partial
from .model.checksums import Checksums, compare_checksums
from .paths import write_private
from .ranks.rank_group import RankGroup, StepObserver
from .ranks.step_timings import StepReport

if TYPE_CHECKING:
    from .cluster.formation import FormedGroup
    from .model.checkpoint import Checkpoint

RECORD_FORMAT = 2  # records of another format are ignored
SHORT_PROMPTS, SHORT_PROMPT_TOKENS, SHORT_ANSWER_TOKENS = 16, 8, 8
LONG_PROMPT_TOKENS, LONG_ANSWER_TOKENS = 2304, 4
MEASURED_TOKENS = 12  # generated alone, every step measured
TOP_LOGPROBS = 5  # compared at each token
TOKEN_TIMEOUT_S = 900.0


class Tolerance(NamedTuple):
    """How far log-probabilities (nats) may differ: 95 % of them, and each."""

    typical: float
    maximum: float


# Where all sums are float32 or int32, only the order of additions differs between placements (9e-4
# measured). In bfloat16 every addition rounds, and a router may choose another expert (0.07 and 0.5
# measured, random weights).
FULL_PRECISION, REDUCED_PRECISION = Tolerance(0.02, 0.02), Tolerance(0.2, 2.0)

# A link with less than a third of its earlier bandwidth, or more than three times its latency and
# some more, is broken; smaller differences come from other traffic.
LINK_FACTOR = 3.0
LINK_LATENCY_MARGIN_S = 300e-6
MIN_LINK_BYTES_S = 50e6  # half of what a gigabit cable gives
MAX_LINK_LATENCY_S = 5e-3  # Wi-Fi, or lost packets
MEDIAN_FACTOR = 8.0  # among three links or more, between one and the median
ALL_REDUCE_FACTOR, ALL_REDUCE_MARGIN_S = 10.0, 5e-3  # of the link's latency, and waiting besides
LINK_MEASUREMENTS = 3  # a link that looks bad is measured again
MAX_REPORTED_DIFFERENCES = 3


@dataclass(frozen=True)
class Answer:
    """The tokens of an answer, and at each the log-probabilities of the most probable ids."""

    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        return {"tokens": list(self.tokens), "top": [list(map(list, t.items())) for t in self.top]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """Inverse of `to_json`."""
        return cls(tuple(data["tokens"]), tuple({int(i): p for i, p in t} for t in data["top"]))


@dataclass(frozen=True)
class ReferenceAnswers:
    """What a group computed.

    Args:
        answers: to `verification_prompts`, in order.
        checksums: of every rank's weights.
        devices: what each rank computes with.
        all_reduce_s: median seconds of an all-reduce while one request runs; 0: one node.
    """

    answers: tuple[Answer, ...]
    checksums: tuple[Checksums, ...]
    devices: tuple[str, ...]
    all_reduce_s: float


class _AllReduceTimer(StepObserver):
    """Seconds of a group's all-reduces, without waiting for the slowest rank."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_measured(self, reports: Sequence[StepReport]) -> None:
        """See `StepTimings.add`."""
        if all(report.decoding for report in reports):
            times = zip(*(report.all_reduces_s for report in reports), strict=True)
            self.seconds += [min(of_ranks) for of_ranks in times]


def verification_prompts(vocab_size: int, context_length: int | None) -> list[tuple[int, ...]]:
    """The fixed prompts: the short ones, then the long one, as long as the context allows."""
    generator = random.Random(1)
    room = (context_length or LONG_PROMPT_TOKENS * 2) - LONG_ANSWER_TOKENS - SHORT_ANSWER_TOKENS
    lengths = [SHORT_PROMPT_TOKENS] * SHORT_PROMPTS + [max(1, min(LONG_PROMPT_TOKENS, room))]
    return [tuple(generator.randrange(vocab_size) for _ in range(length)) for length in lengths]


def collect_answers(group: RankGroup, measure_every: int) -> ReferenceAnswers:
    """Ask a group the verification prompts, and time its all-reduces.

    Args:
        group: just started, with an order for checksums.
        measure_every: which steps the group is to measure afterwards, see `LoadOptions`.

    Raises:
        CenacleError: the group failed.
    """
    ranks = group.ranks  # these, whatever happens meanwhile
    spec = ranks.plan.spec
    *short, long = verification_prompts(spec.vocab_size, spec.context_length)
    times = _AllReduceTimer()
    group.bypass_caches(True)  # an earlier group may have left wrong ones on disk
    try:
        answers = _ask(group, short, SHORT_ANSWER_TOKENS) + _ask(group, [long], LONG_ANSWER_TOKENS)
        if ranks.plan.nodes > 1:
            group.observers.append(times)
            group.measure_steps(1)
            _ask(group, short[:1], MEASURED_TOKENS)
            group.observers.remove(times)
    finally:
        group.bypass_caches(False)
    group.reset_statistics(measure_every)
    return ReferenceAnswers(
        tuple(answers),
        tuple(dict(ready.checksums or {}) for ready in ranks.ready),
        tuple(ready.device for ready in ranks.ready),
        statistics.median(times.seconds or [0.0]),
    )


def _ask(group: RankGroup, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[Answer]:
    """The answers to prompts that are submitted together."""
    events: queue.Queue[GroupEvent] = queue.Queue()
    received: dict[str, list[TokenEvent]] = {}
    for index, prompt in enumerate(prompts):
        request = Request(
            f"verification {max_tokens} {index}", prompt, max_tokens, logprobs=TOP_LOGPROBS
        )
        received[request.id] = []
        group.submit(request, events.put)
    unfinished = set(received)
    while unfinished:
        try:
            event = events.get(timeout=TOKEN_TIMEOUT_S)
        except queue.Empty:
            raise ClusterError(f"verification: no token within {TOKEN_TIMEOUT_S:g} s") from None
        if isinstance(event, CenacleError):
            raise event
        assert not isinstance(event, PromptLogprobs), "they are not wanted"
        received[event.request_id].append(event)
        if event.finish is not None:
            unfinished.discard(event.request_id)
    return [
        Answer(tuple(e.token for e in of_request), tuple(dict(e.top) for e in of_request))
        for of_request in received.values()
    ]


def shared_logprobs(expected: Answer, actual: Answer) -> Iterator[tuple[int, int, float, float]]:
    """Position, token id and both log-probabilities, wherever both answers have them.

    Where two tokens are equally probable, one group may choose one and another the other; behind
    such a position the answers are not compared.
    """
    for position, (a, b) in enumerate(zip(expected.top, actual.top, strict=False)):
        for token in a.keys() & b.keys():
            yield position, token, a[token], b[token]
        if expected.tokens[position] != actual.tokens[position]:
            return


def describe_difference(expected: Answer, actual: Answer, tolerance: Tolerance) -> str:
    """How an answer differs by more than rounding; empty: it does not."""
    for position, token, expected_logprob, actual_logprob in shared_logprobs(expected, actual):
        if not abs(expected_logprob - actual_logprob) <= tolerance.maximum:  # NaN differs too
            return (
                f"at token {position} the log-probability of id {token} was "
                f"{expected_logprob:.3f}, is {actual_logprob:.3f} (may differ by "
                f"{tolerance.maximum:g})"
            )
    for position, (a, b) in enumerate(zip(expected.tokens, actual.tokens, strict=False)):
        if a != b:
            top = expected.top[position]
            is_tie = top[a] - top.get(b, -math.inf) <= 2 * tolerance.typical
            return "" if is_tie else f"token {position} was {a}, is {b}"
    if len(expected.tokens) == len(actual.tokens):
        return ""
    return f"the answer had {len(expected.tokens)} tokens, now {len(actual.tokens)}"


def logprob_distance(expected: Sequence[Answer], actual: Sequence[Answer]) -> float:
    """95th percentile of the differences of log-probabilities; infinite if there are none."""
    differences = [
        abs(expected_logprob - actual_logprob)
        for a, b in zip(expected, actual, strict=True)
        for _, _, expected_logprob, actual_logprob in shared_logprobs(a, b)
    ]
    return sorted(differences)[int(0.95 * len(differences))] if differences else math.inf


def tolerance_for(dtype: str, devices: Sequence[str]) -> Tolerance:
    """How far log-probabilities may differ.

    Args:
        dtype: of the model, see `ModelSpec`.
        devices: what the ranks of both sides compute with, as they report it.
    """
    native = all(" kernels" in d and "int8 activations" not in d for d in devices)
    return FULL_PRECISION if dtype == "float32" or native else REDUCED_PRECISION


def find_bad_links(
    names: Sequence[str],
    measured: Mapping[tuple[int, int], Link],
    known: Mapping[tuple[int, int], Link],
) -> dict[tuple[int, int], str]:
    """Links that are not what they should be, each with a sentence.

    Args:
        names: of the nodes, by rank.
        measured: by pairs of ranks.
        known: what was measured when it passed, where that is known.
    """
    median = statistics.median(link.bytes_per_s for link in measured.values()) if measured else 0.0
    reasons = {}
    for pair, link in measured.items():
        compared = median if len(measured) > 2 else None
        if (reason := _link_problem(link, known.get(pair), compared)) is not None:
            reasons[pair] = f"the link between {names[pair[0]]} and {names[pair[1]]} {reason}"
    return reasons


def _link_problem(link: Link, before: Link | None, median_bytes_s: float | None) -> str | None:
    rate = f"carries {link.bytes_per_s / 1e6:.0f} MB/s"
    if link.bytes_per_s < MIN_LINK_BYTES_S:
        return f"{rate}, a sound gigabit cable 110"
    if link.latency_s > MAX_LINK_LATENCY_S:
        return f"takes {1e3 * link.latency_s:.1f} ms one way: Wi-Fi, or packets are lost"
    if before is not None and link.bytes_per_s * LINK_FACTOR < before.bytes_per_s:
        return f"{rate}, and carried {before.bytes_per_s / 1e6:.0f} when it was verified"
    if before is not None and (
        link.latency_s > LINK_FACTOR * before.latency_s + LINK_LATENCY_MARGIN_S
    ):
        return (
            f"takes {1e6 * link.latency_s:.0f} us one way, and took "
            f"{1e6 * before.latency_s:.0f} when it was verified"
        )
    if median_bytes_s is not None and link.bytes_per_s * MEDIAN_FACTOR < median_bytes_s:
        return f"{rate}, the others {median_bytes_s / 1e6:.0f}"
    return None


class Verification:
    """One verification, of one loading.

    Args:
        folder: where the records of what passed are.
        always: verify also what has passed before.
        report: told in sentences what is done and found.
    """

    def __init__(
        self, folder: Path, always: bool = True, report: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder, self._always, self._report = folder, always, report
        self._required = False
        self._names: list[str] = []
        self._links: dict[str, Link] = {}  # by both nodes' ids
        self._link_latency_s = 0.0
        self._key = self._record_name = ""
        self._record: dict[str, Any] = {}

    def prepare(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        settings: Mapping[str, Any],
        collect_single_node: Callable[[], ReferenceAnswers],
        formed: FormedGroup | None = None,
        measure_links: Callable[[], Mapping[tuple[int, int], Link]] = dict,
    ) -> bool:
        """Before a group is loaded: whether it must be verified; its ranks then report checksums.

        If there is nothing to compare it with, a single node is loaded first.

        Args:
            checkpoint, plan: what will be loaded.
            settings: all else that changes what is computed, or how fast.
            collect_single_node: loads a single node with the whole model, asks it and ends it.
            formed: the nodes of a cluster, and their links.
            measure_links: measures the links again.

        Raises:
            ClusterError: a link is not what it should be.
        """
        from .cluster import node_info  # its messages take long to import

        nodes = formed.group.members if formed is not None else ()
        self._names = [node.name for node in nodes] or [f"rank {r}" for r in range(plan.nodes)]
        self._record_name = f"{node_info.checkpoint_digest(checkpoint.folder.resolve())[:32]}.json"
        decisive = {
            "plan": plan.to_json(),
            "nodes": [[n.id, n.info.processor, n.info.kernels] for n in nodes],
            "backend": formed.backend if formed is not None else None,
            "versions": node_info.versions(),
            "settings": dict(settings),
        }
        self._key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        self._record = self._read(self._record_name)
        self._required = self._always or self._key not in self._record.get("passed", [])
        if formed is not None:
            self._check_links(formed, measure_links)
        if not self._required:
            return False
        self._report("verification: checking what this group computes before it serves")
        if "answers" not in self._record and plan.nodes > 1:
            self._collect_single_node(checkpoint, collect_single_node)
        return True

    def _collect_single_node(
        self, checkpoint: Checkpoint, collect: Callable[[], ReferenceAnswers]
    ) -> None:
        if is_partial(checkpoint.folder):
            reason = "this machine has only a part of the checkpoint"
        else:
            self._report("verification: first a single node, to compare with")
            try:
                self._record = _make_record(collect(), None)
                return
            except PlanError as error:
                reason = f"the model does not fit on this machine alone ({error})"
        self._report(f"verification: nothing to compare with yet: {reason}")

    def verify(self, group: RankGroup, measure_every: int, latency_s: float = 0.0) -> None:
        """When the group has loaded: ask it, compare, and record that it passed.

        Args:
            group: just started; its ranks report checksums if `prepare` returned True.
            measure_every: see `collect_answers`.
            latency_s: added to every all-reduce, see `LoadOptions`.

        Raises:
            ClusterError: what differs; nothing is recorded.
        """
        if not self._required:
            return
        started_s = time.monotonic()
        plan = group.ranks.plan
        actual = collect_answers(group, measure_every)
        differences = self._compare(plan, actual)
        latency_s += self._link_latency_s
        if actual.all_reduce_s > ALL_REDUCE_FACTOR * latency_s + ALL_REDUCE_MARGIN_S:
            differences.append(
                f"an all-reduce of the running group takes {1e3 * actual.all_reduce_s:.1f} ms; the "
                f"latency of the links is {1e3 * latency_s:.2f} ms (check cables and switches, and "
                f"what else runs on the machines)"
            )
        if differences:
            rest = len(differences) - MAX_REPORTED_DIFFERENCES
            more = f"; and {rest} more" if rest > 0 else ""
            raise ClusterError(
                f"verification: {'; '.join(differences[:MAX_REPORTED_DIFFERENCES])}{more}. The "
                f"model is not served. If the message names no other cause, copy the model to that "
                f"machine again and test its memory; use --no-verify to serve anyway"
            )
        if "answers" in self._record:
            count = sum(len(of_rank) for of_rank in actual.checksums)
            result = f"{len(actual.answers)} prompts and {count} checksums agree"
        else:
            self._record = _make_record(actual, self._key if plan.nodes > 1 else None)
            result = "the answers are kept to compare with"
        self._save()
        timing = ""
        if actual.all_reduce_s:
            timing = f", an all-reduce takes {1e3 * actual.all_reduce_s:.2f} ms"
        seconds = time.monotonic() - started_s
        self._report(f"verification: passed in {seconds:.1f} s: {result}{timing}")

    def _compare(self, plan: Plan, actual: ReferenceAnswers) -> list[str]:
        """What differs, the most telling first."""
        if "answers" not in self._record:
            return [
                f"{' and '.join(self._names)} do not hold the same {name}"
                for name in _differing_parameters(plan, actual.checksums)
            ]
        differences = self._compare_weights(actual.checksums)
        return differences + self._compare_answers(plan.spec, actual, not differences)

    def _compare_weights(self, checksums: Sequence[Checksums]) -> list[str]:
        record, differences = self._record, []
        if record["plan"] is None:
            for piece, ranks in compare_checksums(record["checksums"][0], checksums).mismatches:
                tensor = piece.replace("[", " of expert ").removesuffix("]")
                holders = " or ".join(self._names[rank] for rank in ranks)
                differences.append(f"{holders} does not hold the checkpoint's {tensor}")
        elif record["plan"] == self._key:
            for rank, (before, now) in enumerate(zip(record["checksums"], checksums, strict=True)):
                differences += [
                    f"{self._names[rank]} does not hold the {name} that it held before"
                    for name in before
                    if before[name] != now.get(name)
                ]
        return differences

    def _compare_answers(
        self, spec: ModelSpec, actual: ReferenceAnswers, weights_agree: bool
    ) -> list[str]:
        record, differences = self._record, []
        tolerance = tolerance_for(spec.dtype, [*actual.devices, *record["devices"]])
        source = "a single node" if record["plan"] is None else "an earlier pass"
        prompts = verification_prompts(spec.vocab_size, spec.context_length)
        expected = [Answer.from_json(answer) for answer in record["answers"]]
        for prompt, expected_answer, actual_answer in zip(
            prompts, expected, actual.answers, strict=True
        ):
            if difference := describe_difference(expected_answer, actual_answer, tolerance):
                differences.append(
                    f"a prompt of {len(prompt)} tokens is answered differently than by {source}: "
                    f"{difference}"
                )
        if weights_agree and not differences:
            distance = logprob_distance(expected, actual.answers)
            if distance > tolerance.typical:
                differences.append(
                    f"log-probabilities differ by {distance:.2g} from those of {source}; rounding "
                    f"explains {tolerance.typical:g}"
                )
        return differences

    def _check_links(
        self,
        formed: FormedGroup,
        measure_links: Callable[[], Mapping[tuple[int, int], Link]],
    ) -> None:
        nodes, measured = formed.group.members, dict(formed.links)
        records = self._read("links.json").get("links", {})
        ids = {(a, b): " ".join(sorted((nodes[a].id, nodes[b].id))) for a, b in measured}
        known = {pair: Link(*records[name]) for pair, name in ids.items() if name in records}
        bad = find_bad_links(self._names, measured, known)
        for _ in range(LINK_MEASUREMENTS - 1):
            if not bad:
                break
            for pair, link in measure_links().items():  # the best counts: there is other traffic
                before = measured[pair]
                measured[pair] = Link(
                    min(before.latency_s, link.latency_s), max(before.bytes_per_s, link.bytes_per_s)
                )
            bad = find_bad_links(self._names, measured, known)
        self._links = {ids[pair]: link for pair, link in measured.items()}
        self._link_latency_s = max((link.latency_s for link in measured.values()), default=0.0)
        if bad and self._required:
            raise ClusterError(
                f"verification: {'; '.join(bad.values())}. The model is not served: change the "
                f"cable or the port, and check what else uses the network; use --no-verify to "
                f"serve anyway"
            )
        for reason in bad.values():
            self._report(f"{reason}: check the cable (`cenacle doctor` on both machines)")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            record = json.loads((self._folder / name).read_text())
        except (OSError, ValueError):
            return {}
        is_known = isinstance(record, dict) and record.get("format") == RECORD_FORMAT
        return record if is_known else {}

    def _save(self) -> None:
        self._record.setdefault("passed", []).append(self._key)
        self._write(self._record_name, self._record)
        if self._links:
            records = self._read("links.json")
            for pair, link in self._links.items():
                records.setdefault("links", {})[pair] = [link.latency_s, link.bytes_per_s]
            self._write("links.json", records)

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        data = json.dumps({**record, "format": RECORD_FORMAT}).encode()
        write_private(self._folder / name, data)


def _make_record(answers: ReferenceAnswers, plan_key: str | None) -> dict[str, Any]:
    return {
        "plan": plan_key,  # None: a single node
        "answers": [answer.to_json() for answer in answers.answers],
        "checksums": list(answers.checksums),
        "devices": list(answers.devices),
        "passed": [],
    }


def _differing_parameters(plan: Plan, checksums: Sequence[Checksums]) -> list[str]:
    """Parameters that every rank holds entirely and not identically: those of a replicated trunk,
    outside of blocks with experts, whose shared experts may be sliced."""
    if plan.trunk != "replicated":
        return []
    experts = {piece for c in checksums for piece in c if piece.endswith("]")}
    blocks = tuple({f"{piece.rsplit('.', 3)[0]}." for piece in experts})
    shared = set.intersection(*(set(c) for c in checksums))
    identical = (name for name in sorted(shared) if not name.startswith(blocks))
    return [name for name in identical if len({tuple(c[name]) for c in checksums}) > 1]


__all__ = ["ReferenceAnswers", "Verification", "collect_answers"]
