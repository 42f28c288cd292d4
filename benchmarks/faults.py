"""What failures cost: `make faults`.

    python benchmarks/faults.py [--times 10] [--rows 'kill-*,local-*'] [--longest SECONDS]

Rows that begin with `local-` kill, stop and starve the ranks of a `cenacle serve` on this machine
(`local_faults.py`); the others befall a cluster of three hosts, which are network namespaces
(`host_faults.py`). One server and one cluster live through all rows that let them live.
Each time answers are being streamed, and are compared with what was streamed undisturbed. The
columns are those of `fault_record.py`. The last line is one JSON object; the exit status is 1 if a
promise was broken: an answer lost or with another text, a failure noticed after more than five
seconds or without its name, a machine that did not come back, a process, port or file left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path

import host_faults
import local_faults
from fault_record import HEADER, FaultRecord
from net import end_tidily, why_not

Rows = dict[str, FaultRecord]


def main() -> int:
    """Run the rows, print a table; the exit status."""
    end_tidily()
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--times", type=int, default=10)
    options.add_argument("--rows", default="*", help="names or patterns, with commas between")
    options.add_argument("--nodes", type=int, default=2, help="ranks of the local rows")
    options.add_argument(
        "--longest", type=float, default=1e9, help="no fault lasts longer, seconds"
    )
    given = options.parse_args()
    asked = given.rows.split(",")
    names = [
        name
        for name in (*host_faults.ROWS, *local_faults.ROWS)
        if any(fnmatch(name, pattern) for pattern in asked)
    ]
    if not names:
        known = ", ".join((*host_faults.ROWS, *local_faults.ROWS))
        print(f"--rows: expected some of {known}, got {given.rows}", file=sys.stderr)
        return 2
    began, rows = time.monotonic(), Rows()
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        on_hosts(given, [n for n in names if n in host_faults.ROWS], Path(folder), rows)
        on_one_machine(given, [n for n in names if n in local_faults.ROWS], Path(folder), rows)
    numbers = {name: one.to_json() for name, one in rows.items()}
    seconds = round(time.monotonic() - began)
    print(json.dumps({"times": given.times, "seconds": seconds, "rows": numbers}))
    return 1 if any(one.bad for one in rows.values()) else 0


def on_hosts(given: argparse.Namespace, names: list[str], folder: Path, rows: Rows) -> None:
    """The rows of three hosts."""
    if names and (why := why_not()) is not None:
        print(f"{' '.join(names)}: not run: {why}")
        return
    if not names:
        return
    with contextlib.closing(host_faults.Trial(folder)) as trial:
        for name in names:
            row, found = host_faults.ROWS[name], rows.setdefault(name, FaultRecord())
            for _ in range(given.times):
                row.once(trial, trial.whose_turn(row.hosts), found, given.longest)
            print(found.line(name), flush=True)


def on_one_machine(given: argparse.Namespace, names: list[str], folder: Path, rows: Rows) -> None:
    """The rows of one machine."""
    with contextlib.ExitStack() as ends:
        server: local_faults.Server | None = None
        undisturbed: list[str] = []
        for name in names:
            if (why := local_faults.why_not(name)) is not None:
                print(f"{name:30}not run: {why}")
                continue
            row, found = local_faults.ROWS[name], rows.setdefault(name, FaultRecord())
            for _ in range(given.times):
                if server is None:
                    server = local_faults.Server(given.nodes, folder)
                    ends.callback(server.close)
                    undisturbed = server.undisturbed()
                local_faults.once(server, row, undisturbed, found)
                if row.ends:
                    server = None
            print(found.line(name), flush=True)
        if server is not None:
            server.close()
            found.left += server.left(server.seen)


if __name__ == "__main__":
    raise SystemExit(main())
