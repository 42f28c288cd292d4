"""An hour with a fault every minute: `make soak`.

    python benchmarks/soak.py [--minutes 60] [--every 60] [--seed 0]

Three hosts (network namespaces) serve the demo model. Two clients send one request after another, a
second apart, and compare the answers with undisturbed ones. Every minute a random fault of
`host_faults.py` is injected, while another answer is streamed. Agents are killed only on `b`, so
that the head and the agent of `c` run all the time: their resident memory and open files are
sampled every other second.

Prints one line per fault; the last line is one JSON object. The exit status is 1 if a promise was
broken: a request is lost or has another text, a fault is not detected within five seconds or the
head's log does not name its host, a node does not come back, something is left, or memory or open
files grow in the second half (checked in runs of at least 20 minutes).
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

from cluster import JOIN, UP, Cluster, call, chat_body
from fault_record import FaultRecord, spread
from host_faults import (
    Row,
    Trial,
    garbage,
    kill_agent,
    kill_host,
    kill_rank,
    names_host,
    stop_agent,
    stop_rank,
    unplug,
    wrong_token,
)
from namespaces import Host, enter_namespace, exit_on_sigterm

CLIENTS = 2
REQUEST_INTERVAL_S = 1.0
SAMPLE_INTERVAL_S = 2.0
MIN_MINUTES_FOR_GROWTH = 20.0
MAX_GROWTH_KB_PER_MIN = 200.0  # a tenth of the head's memory in two hours
MAX_GROWTH_FILES_PER_MIN = 0.1
QUESTIONS = (
    chat_body("What is 12 + 30?"),
    chat_body("Who are you?"),
    chat_body("Spell otter backwards."),
    chat_body("What is 7 + 8?", tokens=40),
    chat_body("What is 25 - 9? Tell me more.", tokens=80),
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
    """Sends one request after another, and records how they end."""

    def __init__(self, cluster: Cluster, expected: list[str], seed: int) -> None:
        super().__init__(daemon=True)
        self.lost: list[str] = []
        self.other: list[str] = []
        self.took_s: list[float] = []
        self.ended = threading.Event()
        self._host, self._expected, self._random = cluster.a.name, expected, random.Random(seed)
        self.start()

    def run(self) -> None:
        """Run until `ended` is set."""
        enter_namespace(self._host)
        while not self.ended.wait(REQUEST_INTERVAL_S):
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
class ResourceUse:
    """Resident kilobytes and open files of one process, by minute."""

    letter: str
    pid: int
    minutes: list[float] = field(default_factory=list)
    kb: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)

    def slopes(self, since: float) -> tuple[float, float] | None:
        """Kilobytes and files per minute since then; None: the process is younger."""
        first = next((i for i, at in enumerate(self.minutes) if at >= since), len(self.minutes))
        if self.minutes[0] > since or len(self.minutes) - first < 3:
            return None
        kb, files = (
            statistics.linear_regression(self.minutes[first:], values[first:]).slope
            for values in (self.kb, self.files)
        )
        return kb, files


class ResourceWatcher(threading.Thread):
    """Samples the resources of the head and the agents, and keeps the minimum of each period,
    because peaks do not last."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.held: list[ResourceUse] = []
        self._least: dict[tuple[str, int], tuple[float, float]] = {}
        self._lock, self._began = threading.Lock(), time.monotonic()
        self._watched = ((cluster.a, UP), (cluster.b, JOIN), (cluster.c, JOIN))
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        """Run until `ended` is set."""
        while not self.ended.wait(SAMPLE_INTERVAL_S):
            for host, kind in self._watched:
                for pid in host.pids(kind):
                    with contextlib.suppress(OSError, StopIteration):
                        seen = read_resources(pid)
                        with self._lock:
                            before = self._least.get((host.letter, pid), seen)
                            least = min(seen[0], before[0]), min(seen[1], before[1])
                            self._least[host.letter, pid] = least

    def take(self) -> dict[str, tuple[float, float]]:
        """End a period; returns the minimum of each process, by its host's letter."""
        with self._lock:
            least, self._least = self._least, {}
        at = (time.monotonic() - self._began) / 60
        for (letter, pid), (kb, files) in least.items():
            known = [h for h in self.held if (h.letter, h.pid) == (letter, pid)]
            held = known[0] if known else ResourceUse(letter, pid)
            if not known:
                self.held.append(held)
            held.minutes.append(at)
            held.kb.append(kb)
            held.files.append(files)
        return {letter: seen for (letter, _), seen in least.items()}


def read_resources(pid: int) -> tuple[float, float]:
    """Resident kilobytes and open files of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kb = float(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))
    return kb, float(len(list(Path(f"/proc/{pid}/fd").iterdir())))


def main() -> int:
    """Run it; returns the exit status."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=60, help="seconds from fault to fault")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        with contextlib.closing(Trial(Path(folder))) as trial:
            result = soak(trial, options)
            if not all(result["checks"].values()):
                Path("soak.log").write_text(trial.cluster.logs())
                print("the logs of the hosts are in soak.log")
    print(json.dumps(result))
    return 0 if all(result["checks"].values()) else 1


def soak(trial: Trial, options: argparse.Namespace) -> dict[str, Any]:
    """Inject faults for the whole time; returns all numbers."""
    cluster = trial.cluster
    expected = [text_of(cluster.ask("/v1/chat/completions", body)[1]) for body in QUESTIONS]
    rng, began = random.Random(options.seed), time.monotonic()
    clients = [Client(cluster, expected, options.seed + n) for n in range(CLIENTS)]
    watcher = ResourceWatcher(cluster)
    fault_counts: Counter[str] = Counter()
    total = FaultRecord()
    unlogged: list[str] = []
    hosts, letter = {host.letter: host for host in cluster.members}, ""
    # Not the same host twice in a row: a node that fails again at once is excluded for a while.
    faults = [(name, x) for name, row in FAULTS.items() for x in row.hosts]
    ends = began + 60 * options.minutes
    while (due := next_due(began, options.every)) < ends:
        time.sleep(max(0.0, due - time.monotonic()))
        name, letter = rng.choice([f for f in faults if f[1] != letter])
        host = hosts[letter]
        fault_counts[name] += 1
        record = FaultRecord()
        logged = len(cluster.a.log.read_text())
        FAULTS[name].run(trial, host, record, longest_s=options.every / 2)
        if FAULTS[name].recovers and not names_host(cluster.a.log.read_text()[logged:], host):
            unlogged.append(f"{name} on {host.letter}")
        add(total, record)
        print(line(began, name, host, record, clients, watcher.take()), flush=True)
        if not trial.health.complete:
            break  # further faults would show nothing
    time.sleep(max(0.0, ends - time.monotonic()) if trial.health.complete else 0.0)
    for client in clients:
        client.ended.set()
    for client in clients:
        client.join(100)
    watcher.ended.set()
    watcher.take()
    return summarize(options, began, total, fault_counts, clients, watcher, unlogged)


def next_due(began: float, every: float) -> float:
    """When the next fault is due, at a full period."""
    return began + every * (1 + (time.monotonic() - began) // every)


def add(total: FaultRecord, one: FaultRecord) -> None:
    """Add the record of one fault."""
    for name, value in vars(one).items():
        setattr(total, name, getattr(total, name) + value)


def line(
    began: float,
    name: str,
    host: Host,
    record: FaultRecord,
    clients: list[Client],
    held: dict[str, tuple[float, float]],
) -> str:
    """One line about a fault and the totals so far."""
    times = " ".join(
        f"{what} {value[0]:4.1f}"
        for what, value in (
            ("noticed", record.detected_s),
            ("recovered", record.recovered_s),
            ("whole", record.back_s),
        )
        if value
    )
    requests = sum(len(c.took_s) for c in clients)
    lost, other = (sum(len(getattr(c, what)) for c in clients) for what in ("lost", "other"))
    memory = " ".join(
        f"{k} {kb / 1024:.0f} MB {n:.0f} files" for k, (kb, n) in sorted(held.items())
    )
    wrong = "".join(f"\n    {why}" for why in record.wrong)
    return (
        f"{(time.monotonic() - began) / 60:5.1f} min  {name:12} {host.letter}  {times:42} "
        f"{requests:5} requests, {lost + record.lost} lost, {other + record.other} other  "
        f"{memory}{wrong}"
    )


def summarize(
    options: argparse.Namespace,
    began: float,
    record: FaultRecord,
    fault_counts: Counter[str],
    clients: list[Client],
    watcher: ResourceWatcher,
    unlogged: list[str],
) -> dict[str, Any]:
    """All numbers, and the checks of what is promised."""
    minutes = (time.monotonic() - began) / 60
    lost = [why for c in clients for why in c.lost]
    other = [why for c in clients for why in c.other]
    held = {}
    for one in watcher.held:
        slopes = one.slopes(minutes / 2)
        if slopes is not None:
            held[f"{one.letter} {one.pid}"] = {
                "first_mb": round(one.kb[0] / 1024, 1),
                "last_mb": round(one.kb[-1] / 1024, 1),
                "kb_per_min": round(slopes[0], 1),
                "files": one.files[-1],
                "files_per_min": round(slopes[1], 3),
            }
    judged = list(held.values()) if minutes >= MIN_MINUTES_FOR_GROWTH else []
    seen = {one.letter for one in watcher.held if one.slopes(minutes / 2) is not None}
    checks = {
        "as_long_as_asked": minutes >= options.minutes,
        "no_request_lost": not lost and not record.lost,
        "no_other_text": not other and not record.other,
        "nothing_left": not record.left,
        "promises_kept": not record.wrong,
        "log_tells": not unlogged,
        "memory_seen": minutes < MIN_MINUTES_FOR_GROWTH or {"a", "c"} <= seen,
        "memory_flat": all(h["kb_per_min"] <= MAX_GROWTH_KB_PER_MIN for h in judged),
        "files_flat": all(h["files_per_min"] <= MAX_GROWTH_FILES_PER_MIN for h in judged),
    }
    return {
        "minutes": round(minutes, 1),
        "seed": options.seed,
        "faults": dict(fault_counts),
        "requests": sum(len(c.took_s) for c in clients) + record.answers,
        "lost": len(lost) + record.lost,
        "other": len(other) + record.other,
        "longest_answer_s": round(max((t for c in clients for t in c.took_s), default=0.0), 1),
        **{name: spread(getattr(record, name)) for name in ("detected_s", "recovered_s", "back_s")},
        "held": held,
        "wrong": [
            *record.wrong,
            *lost[:5],
            *other[:5],
            *(f"not in the log: {u}" for u in unlogged),
        ],
        "checks": checks,
    }


if __name__ == "__main__":
    raise SystemExit(main())
