"""What failures cost: `make faults`.

    python benchmarks/faults.py [--times 10] [--rows 'kill-*,local-*'] [--longest SECONDS]

Rows whose name starts with `local-` kill, stop and starve the ranks of a `cenacle serve` on this
machine (`local_faults.py`); the others concern a cluster of three hosts, which are network
namespaces (`host_faults.py`). One server and one cluster are used for all rows that leave them
running. Answers are streamed during each fault and compared with undisturbed ones. The columns are
those of `fault_record.py`. The last line is one JSON object. The exit status is 1 if a promise was
broken: an answer is lost or has another text, a failure is detected after more than five seconds
or without naming the node, a node does not come back, or a process, port or file is left.
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
from namespaces import exit_on_sigterm, unavailable_reason

Rows = dict[str, FaultRecord]


def main() -> int:
    """Run the rows and print a table; returns the exit status."""
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--rows", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--nodes", type=int, default=2, help="ranks of the local rows")
    parser.add_argument("--longest", type=float, default=1e9, help="longest fault, seconds")
    options = parser.parse_args()
    patterns = options.rows.split(",")
    names = [
        name
        for name in (*host_faults.ROWS, *local_faults.ROWS)
        if any(fnmatch(name, pattern) for pattern in patterns)
    ]
    if not names:
        known = ", ".join((*host_faults.ROWS, *local_faults.ROWS))
        print(f"--rows: expected some of {known}, got {options.rows}", file=sys.stderr)
        return 2
    started_s, rows = time.monotonic(), Rows()
    print(HEADER)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        run_host_rows(options, [n for n in names if n in host_faults.ROWS], Path(folder), rows)
        run_local_rows(options, [n for n in names if n in local_faults.ROWS], Path(folder), rows)
    numbers = {name: record.to_json() for name, record in rows.items()}
    seconds = round(time.monotonic() - started_s)
    print(json.dumps({"times": options.times, "seconds": seconds, "rows": numbers}))
    return 1 if any(record.bad for record in rows.values()) else 0


def run_host_rows(options: argparse.Namespace, names: list[str], folder: Path, rows: Rows) -> None:
    """Run the rows of a cluster."""
    if names and (why := unavailable_reason()) is not None:
        print(f"{' '.join(names)}: not run: {why}")
        return
    if not names:
        return
    with contextlib.closing(host_faults.Trial(folder)) as trial:
        for name in names:
            row, record = host_faults.ROWS[name], rows.setdefault(name, FaultRecord())
            for _ in range(options.times):
                row.run(trial, trial.next_host(row.hosts), record, options.longest)
            print(record.line(name), flush=True)


def run_local_rows(options: argparse.Namespace, names: list[str], folder: Path, rows: Rows) -> None:
    """Run the rows of one machine."""
    with contextlib.ExitStack() as ends:
        server: local_faults.Server | None = None
        undisturbed: list[str] = []
        for name in names:
            if (why := local_faults.unavailable_reason(name)) is not None:
                print(f"{name:30}not run: {why}")
                continue
            row, record = local_faults.ROWS[name], rows.setdefault(name, FaultRecord())
            for _ in range(options.times):
                if server is None:
                    server = local_faults.Server(options.nodes, folder)
                    ends.callback(server.close)
                    undisturbed = []
                if not (undisturbed or row.ends):
                    undisturbed = server.undisturbed()
                local_faults.run(server, row, undisturbed, record)
                if row.ends:
                    server = None
            print(record.line(name), flush=True)
        if server is not None:
            server.close()
            record.left += server.left(server.all_pids)


if __name__ == "__main__":
    raise SystemExit(main())
