"""What an exchange costs: the mesh against MLX's ring, in turn in one run, between local ranks.

    python benchmarks/exchange.py [--nodes 2 4] [--sizes 4 4096 24576 1572864] [--rounds 5] [--tcp]

For each number of ranks one group of processes holds every way to talk at once, so that all are
measured under the same load, a block of each in turn. "one" is an exchange that is evaluated before
the next is made; "chain" is one of many in a lazy graph, as in a model's layers. Microseconds on
rank 0, the median over the rounds. "wire" is the bare minimum: one byte there and back over a Unix
socket between two processes of this machine, halved. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import secrets
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CHAIN = 100
ENOUGH_S = 0.4  # a block of one measurement is cut short after this


def rank_main(rank: int, job: dict[str, Any], results: Connection) -> None:
    """One rank: every way to talk, every size, in turn."""
    os.environ["MLX_RANK"] = str(rank)
    os.environ["MLX_HOSTFILE"] = job["hostfile"]
    import mlx.core as mx

    from cenacle.collective.base import Collective, RoutingDecision
    from cenacle.collective.mesh import Mesh
    from cenacle.collective.mlx import Mlx

    secret = job["secret"].encode()
    groups: dict[str, Collective] = {}
    for name, (addresses, options) in job["meshes"].items():
        groups[name] = Mesh(rank, addresses, secret, **options)
    if job["ring"]:
        groups["ring"] = Mlx("ring", len(job["addresses"]))
    pace = next(iter(groups.values()))  # the ranks agree on how often through the first mesh

    eight = RoutingDecision(0, mx.arange(8, dtype=mx.uint32)[None])
    mx.eval(eight.ids)

    def once(group: Collective, x: mx.array, links: int) -> float:
        chosen = eight if group is groups.get("digest") else None
        began = time.perf_counter()
        for _ in range(links):
            x = group.all_sum(x, chosen)
        mx.eval(x)
        return (time.perf_counter() - began) / links * 1e6

    def block(group: Collective, x: mx.array, chained: bool) -> list[float]:
        first = statistics.median(once(group, x, 1) for _ in range(3))
        guess = int(pace.share(mx.array([first])).item())
        enough = ENOUGH_S * 1e6 / max(1, guess)
        links = max(1, min(CHAIN, int(enough))) if chained else 1
        return [once(group, x, links) for _ in range(max(3, min(200, int(enough / links))))]

    for size in job["sizes"]:
        x = mx.zeros(size // 4)
        mx.eval(x)
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(job["rounds"]):
            for name, group in groups.items():
                for chained in (False, True):
                    mx.eval(group.all_sum(x))
                    pace.barrier()
                    key = (name, "chain" if chained else "one")
                    found.setdefault(key, []).append(statistics.median(block(group, x, chained)))
        if rank == 0:
            for (name, way), medians in found.items():
                results.send(
                    {"bytes": size, "backend": name, "way": way, "us": statistics.median(medians)}
                )
    for group in groups.values():
        group.close()
    results.close()


def wire_us(times: int = 2000) -> float:
    """Half of a one-byte round trip over a Unix socket between two processes, in microseconds."""
    here, there = socket.socketpair()
    child = multiprocessing.get_context("fork").Process(target=_echo, args=(there, times))
    child.start()
    seen = []
    for _ in range(times):
        began = time.perf_counter()
        here.send(b"x")
        here.recv(1)
        seen.append(time.perf_counter() - began)
    child.join()
    here.close()
    there.close()
    return statistics.median(seen) / 2 * 1e6


def _echo(sock: socket.socket, times: int) -> None:
    for _ in range(times):
        sock.send(sock.recv(1))


def ports(count: int) -> list[str]:
    """Addresses of the loopback that are free now."""
    from cenacle import net

    return [f"127.0.0.1:{port}" for port in net.free_ports(count)]


def measure(nodes: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = ports(nodes)
        hostfile = Path(folder) / "hosts.json"
        hostfile.write_text(json.dumps([[h] for h in hosts]))

        def unix(name: str) -> list[str]:
            return [f"unix:{folder}/{name}-{r}" for r in range(nodes)]

        meshes: dict[str, tuple[list[str], dict[str, Any]]] = {"mesh": (unix("mesh"), {})}
        if asked.tcp:
            meshes["mesh tcp"] = (ports(nodes), {})
        if asked.ways:
            meshes["digest"] = (unix("digest"), {})  # as "mesh", with 8 chosen experts each time
            meshes["bf16"] = (unix("bf16"), {"wire": "bf16"})
            meshes["direct"] = (unix("direct"), {"scatter_bytes": 1 << 40})
            meshes["scatter"] = (unix("scatter"), {"scatter_bytes": 0})
            meshes["spin 30"] = (unix("spin"), {"spin_us": 30.0})
        job = {
            "hostfile": str(hostfile),
            "addresses": hosts,
            "meshes": meshes,
            "ring": not asked.no_ring,
            "secret": secrets.token_hex(16),
            "sizes": asked.sizes,
            "rounds": asked.rounds,
        }
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe(duplex=False)
        ranks = [spawn.Process(target=rank_main, args=(r, job, theirs)) for r in range(nodes)]
        rows: list[dict[str, Any]] = []
        try:
            for rank in ranks:
                rank.start()
            theirs.close()
            while True:
                if not ours.poll(120):
                    raise SystemExit("a rank was silent for 120 s")
                try:
                    row = {"nodes": nodes, **ours.recv()}
                except EOFError:
                    break
                rows.append(row)
                print(
                    f"{nodes} ranks  {row['bytes']:>9,} bytes  {row['backend']:<9} "
                    f"{row['way']:<5} {row['us']:>10,.1f} us",
                    flush=True,
                )
        finally:
            for rank in ranks:
                rank.join(5)
                if rank.is_alive():
                    rank.kill()
        return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 4096, 24_576, 1_572_864])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tcp", action="store_true", help="also the mesh over loopback TCP")
    parser.add_argument("--ways", action="store_true", help="also the mesh's parts on their own")
    parser.add_argument("--no-ring", action="store_true")
    asked = parser.parse_args()
    conditions = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "wire_us": round(wire_us(), 1),
    }
    print(f"conditions: {conditions}")
    rows = [row for nodes in asked.nodes for row in measure(nodes, asked)]
    for row in rows:
        row["us"] = round(row["us"], 1)
    print(json.dumps({"benchmark": "exchange", **conditions, "rows": rows}))


if __name__ == "__main__":
    main()
