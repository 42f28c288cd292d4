"""config.json files whose values lie: `python benchmarks/odd_configs.py [--every 1]`.

Every value of every family's config becomes each of `ODD` in turn, and a plan is made for it as
`cenacle plan config.json` does. It must end with a plan or with an error of ours in one line,
within bounded time and memory. The last line of stdout is JSON; exit status 1 if something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

CLUSTER = ("3xm3-ultra-512", "tb5-rdma", None)
LIMIT_S = 20  # ordinary configs take 0.02 s
LIMIT_BYTES = 6 << 30  # beyond what the process has mapped
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 8000, 99_999, 2**31, 2**63 - 1, 10**30, 0.5, 7.5, -1.0,
    1e308, float("inf"), float("nan"), "", "x", "7", [], [[]], [None] * 3, [1, 2], [8000] * 4,
    ["x"], {}, {"a": 1}, {"rope_type": "yarn"},
)  # fmt: skip


def find_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all members."""
    members = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, member in members:
        yield (*path, key)
        if isinstance(member, dict | list):
            yield from find_places(member, (*path, key))


def mutate(config: dict[str, Any], place: tuple[Any, ...], odd: Any) -> dict[str, Any]:
    """A copy with one other value."""
    changed = copy.deepcopy(config)
    parent: Any = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = odd
    return changed


@cache
def catalog() -> Any:
    from cenacle.planning.catalog import load_catalog

    return load_catalog(())


def make_plan(file: Path) -> str:
    """Plan as the command does; what became of it."""
    from cenacle.errors import CenacleError
    from cenacle.model.workload import estimate_spec, read_workload
    from cenacle.planning import planner

    try:
        workload, _ = read_workload(file, None, 8192, 1, 1000)
        result = planner.evaluate_options(workload, *planner.resolve_cluster(catalog(), *CLUSTER))
        planner.best_plan(result, estimate_spec(workload))
    except CenacleError as error:
        message = str(error)
        assert message, "an error without words"
        assert message.isprintable(), f"several lines or control characters: {message!r}"
        assert len(message) <= 2000, f"an error of {len(message)} characters"
        return "refused"
    return "planned"


def time_out(*_: Any) -> None:
    raise TimeoutError(f"more than {LIMIT_S} s")


def work(family: str, every: int, first: int) -> None:
    """All configs of a family; a line of JSON before and after each."""
    from cenacle.model.config_catalog import tiny_config

    config = tiny_config(family)
    cases = [(place, odd) for place in find_places(config) for odd in ODD]
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + LIMIT_BYTES,) * 2)
    signal.signal(signal.SIGALRM, time_out)
    with tempfile.TemporaryDirectory(prefix="cenacle-odd-") as made:
        file = Path(made) / "config.json"
        for i in range(first, len(cases), every):
            place, odd = cases[i]
            file.write_text(json.dumps(mutate(config, place, odd)))
            print(json.dumps({"case": i, "value": f"{place} = {odd!r}"}), flush=True)
            failure, result = "", "failed"
            signal.alarm(LIMIT_S)
            try:
                result = make_plan(file)
            except BaseException as error:  # whatever is not an error of ours
                frames = traceback.extract_tb(error.__traceback__)[-5:]
                at = "; ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
                failure = f"{type(error).__name__}: {error}"[:300] + f" at {at}"
            signal.alarm(0)
            print(json.dumps({"case": i, "result": result, "failure": failure}), flush=True)


def run(families: list[str], every: int, first: int = 0) -> dict[str, Any]:
    """All of them, in processes that are started again when they end early."""
    results: Counter[str] = Counter()
    failures = []
    for family in families:
        start: int | None = first
        while start is not None:
            command = [sys.executable, __file__, "--work", family, str(every), str(start)]
            process = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            begun: dict[str, Any] | None = None
            for line in map(json.loads, process.stdout.splitlines()):
                if "value" in line:
                    begun = {"family": family, **line}
                    continue
                results[line["result"]] += 1
                if line["failure"]:
                    failures.append({**(begun or {}), "failure": line["failure"]})
                begun = None
            start = None
            if process.returncode:
                begun = begun or {"family": family, "case": first, "value": "the start"}
                ended = f"the process ended with {process.returncode}"
                failures.append({**begun, "failure": ended})
                results["failed"] += 1
                start = None if begun["value"] == "the start" else begun["case"] + every
    return {**results, "failures": failures}


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    from cenacle.model.config_catalog import family_names

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th config")
    parser.add_argument("--first", type=int, default=0, help="of each family's configs")
    parser.add_argument("families", nargs="*", help="default: all")
    args = parser.parse_args()
    report = run(args.families or family_names(), args.every, args.first)
    for failure in report["failures"]:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(failure), file=sys.stderr)
    print(json.dumps({**report, "failures": len(report["failures"])}))
    sys.exit(1 if report["failures"] else 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
