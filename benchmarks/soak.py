"""An hour with a fault every minute: `make soak`.

    python benchmarks/soak.py [--minutes 60] [--every 60] [--seed 0]

Three hosts (network namespaces) answer with the demo model. Two clients ask for one answer after
the other, a second apart, and compare each with what was answered undisturbed. Every minute a host
suffers something, drawn at random from the faults of `host_faults.py` after which the group can
go on; another answer is streamed through it. Agents are killed on `b` only, so that the head and
`c`'s agent live through all of it: their resident memory and open files are looked at every other
second.

One line a fault; the last line is one JSON object. The exit status is 1 if a promise was broken: a
request lost or with another text, a fault that was not noticed within five seconds or has not its
host's name in the head's log, a machine that did not come back, anything left, memory or files that
grow in the second half (judged in runs of 20 minutes and more: a shorter one tells nothing).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import JOIN, UP, Cluster, asked, call
from fault_record import FaultRecord, spread
from host_faults import (
    Row,
    Trial,
    garbage,
    kill_agent,
    kill_host,
    kill_rank,
    names,
    stop_agent,
    stop_rank,
    unplug,
    wrong_token,
)
from net import Host, end_tidily, enter

CLIENTS = 2
PAUSE_S = 1.0
SAMPLE_S = 2.0
JUDGED_MINUTES = 20.0
GROWN_KB = 200.0  # a minute: a tenth of the head's memory in two hours
GROWN_FILES = 0.1  # a minute
QUESTIONS = (
    asked("What is 12 + 30?"),
    asked("Who are you?"),
    asked("Spell otter backwards."),
    asked("What is 7 + 8?", tokens=40),
    asked("What is 25 - 9? Tell me more.", tokens=80),
)
FAULTS: dict[str, Row] = {
    "kill-rank": Row(kill_rank, "abc"),
    "stop-rank": Row(stop_rank, "abc"),
    "kill-agent": Row(kill_agent, "b"),
    "stop-agent": Row(stop_agent, seconds=30),
    "kill-host": Row(kill_host, "b"),
    "link-3s": Row(unplug, recovers=None, seconds=3),
    "link-25s": Row(unplug, seconds=25),
    "wrong-token": Row(wrong_token, recovers=False),
    "garbage": Row(garbage, recovers=False),
}


class Client(threading.Thread):
    """Asks one question after the other; what became of them."""

    def __init__(self, cluster: Cluster, expected: list[str], seed: int) -> None:
        super().__init__(daemon=True)
        self.lost: list[str] = []
        self.other: list[str] = []
        self.took_s: list[float] = []
        self.ended = threading.Event()
        self._host, self._expected, self._random = cluster.a.name, expected, random.Random(seed)
        self.start()

    def run(self) -> None:
        """Until it is told to end."""
        enter(self._host)
        while not self.ended.wait(PAUSE_S):
            which = self._random.randrange(len(QUESTIONS))
            began = time.monotonic()
            status, answer = call("/v1/chat/completions", QUESTIONS[which], timeout=90)
            self.took_s.append(time.monotonic() - began)
            if status != 200:
                self.lost.append(f"status {status}: {answer.get('error')}")
            elif (text := text_of(answer)) != self._expected[which]:
                self.other.append(f"expected {self._expected[which]!r}, got {text!r}")


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


@dataclass
class Held:
    """Resident kilobytes and open files of one process, and when, in minutes."""

    letter: str
    pid: int
    minutes: list[float] = field(default_factory=list)
    kb: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)

    def slopes(self, since: float) -> tuple[float, float] | None:
        """Kilobytes and files a minute since then; None: it has not lived so long."""
        first = next((i for i, at in enumerate(self.minutes) if at >= since), len(self.minutes))
        if self.minutes[0] > since or len(self.minutes) - first < 3:
            return None
        kb, files = (
            statistics.linear_regression(self.minutes[first:], values[first:]).slope
            for values in (self.kb, self.files)
        )
        return kb, files


class Looking(threading.Thread):
    """Looks every other second at what the head and the agents hold; keeps the least of a period,
    since what is there for a moment does not stay."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.held: list[Held] = []
        self._least: dict[tuple[str, int], tuple[float, float]] = {}
        self._lock, self._began = threading.Lock(), time.monotonic()
        self._watched = ((cluster.a, UP), (cluster.b, JOIN), (cluster.c, JOIN))
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        """Until it is told to end."""
        while not self.ended.wait(SAMPLE_S):
            for host, kind in self._watched:
                for pid in host.pids(kind):
                    with contextlib.suppress(OSError, StopIteration):
                        seen = look(pid)
                        with self._lock:
                            before = self._least.get((host.letter, pid), seen)
                            least = min(seen[0], before[0]), min(seen[1], before[1])
                            self._least[host.letter, pid] = least

    def take(self) -> dict[str, tuple[float, float]]:
        """End a period: what each process held at least, by its host's letter."""
        with self._lock:
            least, self._least = self._least, {}
        at = (time.monotonic() - self._began) / 60
        for (letter, pid), (kb, files) in least.items():
            known = [h for h in self.held if (h.letter, h.pid) == (letter, pid)]
            held = known[0] if known else Held(letter, pid)
            if not known:
                self.held.append(held)
            held.minutes.append(at)
            held.kb.append(kb)
            held.files.append(files)
        return {letter: seen for (letter, _), seen in least.items()}


def look(pid: int) -> tuple[float, float]:
    """Resident kilobytes and open files of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kb = float(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))
    return kb, float(len(list(Path(f"/proc/{pid}/fd").iterdir())))


def main() -> int:
    """Run it; the exit status."""
    end_tidily()
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--every", type=float, default=60, help="seconds from fault to fault")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        with contextlib.closing(Trial(Path(folder))) as trial:
            result = soak(trial, given)
            if not all(result["checks"].values()):
                Path("soak.log").write_text(trial.cluster.logs())
                print("what the hosts said is in soak.log")
    print(json.dumps(result))
    return 0 if all(result["checks"].values()) else 1


def soak(trial: Trial, given: argparse.Namespace) -> dict[str, Any]:
    """The whole time; all numbers."""
    cluster = trial.cluster
    expected = [text_of(cluster.ask("/v1/chat/completions", body)[1]) for body in QUESTIONS]
    rng, began = random.Random(given.seed), time.monotonic()
    clients = [Client(cluster, expected, given.seed + n) for n in range(CLIENTS)]
    looking = Looking(cluster)
    drawn: Counter[str] = Counter()
    every_one = FaultRecord()
    untold: list[str] = []
    hosts, letter = {host.letter: host for host in cluster.members}, ""
    # Not to the same host twice in a row: who fails again just when it is back is left out a while.
    faults = [(name, x) for name, row in FAULTS.items() for x in row.hosts]
    ends = began + 60 * given.minutes
    while (due := next_due(began, given.every)) < ends:
        time.sleep(max(0.0, due - time.monotonic()))
        name, letter = rng.choice([f for f in faults if f[1] != letter])
        host = hosts[letter]
        drawn[name] += 1
        found = FaultRecord()
        logged = len(cluster.a.log.read_text())
        FAULTS[name].once(trial, host, found, longest_s=given.every / 2)
        if FAULTS[name].recovers and not names(cluster.a.log.read_text()[logged:], host):
            untold.append(f"{name} on {host.letter}")
        add(every_one, found)
        print(line(began, name, host, found, clients, looking.take()), flush=True)
        if not trial.health.whole:
            break  # nothing that follows would tell anything
    time.sleep(max(0.0, ends - time.monotonic()) if trial.health.whole else 0.0)
    for client in clients:
        client.ended.set()
    for client in clients:
        client.join(100)
    looking.ended.set()
    looking.take()
    return numbers(given, began, every_one, drawn, clients, looking, untold)


def next_due(began: float, every: float) -> float:
    """When the next fault is to come: at a full period."""
    return began + every * (1 + (time.monotonic() - began) // every)


def add(total: FaultRecord, one: FaultRecord) -> None:
    """Add what was seen of one fault."""
    for name, value in vars(one).items():
        setattr(total, name, getattr(total, name) + value)


def line(
    began: float,
    name: str,
    host: Host,
    found: FaultRecord,
    clients: list[Client],
    held: dict[str, tuple[float, float]],
) -> str:
    """What a fault did, and how things stand."""
    times = " ".join(
        f"{what} {value[0]:4.1f}"
        for what, value in (
            ("noticed", found.detected_s),
            ("recovered", found.recovered_s),
            ("whole", found.back_s),
        )
        if value
    )
    asked_ = sum(len(c.took_s) for c in clients)
    lost, other = (sum(len(getattr(c, what)) for c in clients) for what in ("lost", "other"))
    memory = " ".join(
        f"{k} {kb / 1024:.0f} MB {n:.0f} files" for k, (kb, n) in sorted(held.items())
    )
    wrong = "".join(f"\n    {why}" for why in found.wrong)
    return (
        f"{(time.monotonic() - began) / 60:5.1f} min  {name:12} {host.letter}  {times:42} "
        f"{asked_:5} asked, {lost + found.lost} lost, {other + found.other} other  {memory}{wrong}"
    )


def numbers(
    given: argparse.Namespace,
    began: float,
    found: FaultRecord,
    drawn: Counter[str],
    clients: list[Client],
    looking: Looking,
    untold: list[str],
) -> dict[str, Any]:
    """All that was seen, and what of it was promised."""
    minutes = (time.monotonic() - began) / 60
    lost = [why for c in clients for why in c.lost]
    other = [why for c in clients for why in c.other]
    held = {}
    for one in looking.held:
        slopes = one.slopes(minutes / 2)
        if slopes is not None:
            held[f"{one.letter} {one.pid}"] = {
                "first_mb": round(one.kb[0] / 1024, 1),
                "last_mb": round(one.kb[-1] / 1024, 1),
                "kb_per_min": round(slopes[0], 1),
                "files": one.files[-1],
                "files_per_min": round(slopes[1], 3),
            }
    judged = list(held.values()) if minutes >= JUDGED_MINUTES else []
    seen = {one.letter for one in looking.held if one.slopes(minutes / 2) is not None}
    checks = {
        "as_long_as_asked": minutes >= given.minutes,
        "no_request_lost": not lost and not found.lost,
        "no_other_text": not other and not found.other,
        "nothing_left": not found.left,
        "promises_kept": not found.wrong,
        "log_tells": not untold,
        "memory_seen": minutes < JUDGED_MINUTES or {"a", "c"} <= seen,
        "memory_flat": all(h["kb_per_min"] <= GROWN_KB for h in judged),
        "files_flat": all(h["files_per_min"] <= GROWN_FILES for h in judged),
    }
    return {
        "minutes": round(minutes, 1),
        "seed": given.seed,
        "faults": dict(drawn),
        "requests": sum(len(c.took_s) for c in clients) + found.answers,
        "lost": len(lost) + found.lost,
        "other": len(other) + found.other,
        "longest_answer_s": round(max((t for c in clients for t in c.took_s), default=0.0), 1),
        **{name: spread(getattr(found, name)) for name in ("detected_s", "recovered_s", "back_s")},
        "held": held,
        "wrong": [*found.wrong, *lost[:5], *other[:5], *(f"not in the log: {u}" for u in untold)],
        "checks": checks,
    }


if __name__ == "__main__":
    raise SystemExit(main())
