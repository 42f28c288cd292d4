"""What an all-reduce costs: the mesh against MLX's ring, alternating in one run of local ranks.

    python benchmarks/all_reduce.py [--nodes 2 4] [--sizes 4 4096] [--rounds 5] [--tcp] [--variants]

For each number of ranks, one group of processes holds all collectives at once, so that all are
measured under the same load, one block of each in turn. "one" is an all-reduce that is evaluated
before the next is made; "chain" is one of many in a lazy graph, as in a model's layers.
Microseconds on rank 0, median over the rounds. "socket_us" is the lower bound: half of a one-byte
round trip over a Unix socket between two processes. The last line is one JSON object.
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
BLOCK_S = 0.4  # limit of one block


def rank_main(rank: int, job: dict[str, Any], results: Connection) -> None:
    """One rank: every collective and size in turn."""
    os.environ["MLX_RANK"] = str(rank)
    os.environ["MLX_HOSTFILE"] = job["hostfile"]
    import mlx.core as mx

    from cenacle.collective.base import Collective, RoutingDecision
    from cenacle.collective.mesh import Mesh, MeshConfig
    from cenacle.collective.mlx import Mlx

    secret = job["secret"].encode()
    groups: dict[str, Collective] = {}
    for name, (addresses, options) in job["meshes"].items():
        groups[name] = Mesh(rank, MeshConfig(addresses, secret, **options))
    if job["ring"]:
        groups["ring"] = Mlx("ring", len(job["addresses"]))
    clock = next(iter(groups.values()))  # ranks agree on the repeats through this one

    routing = RoutingDecision(0, mx.arange(8, dtype=mx.uint32)[None])
    mx.eval(routing.ids)

    def once(group: Collective, x: mx.array, links: int) -> float:
        decision = routing if group is groups.get("digest") else None
        began = time.perf_counter()
        for _ in range(links):
            x = group.all_sum(x, decision)
        mx.eval(x)
        return (time.perf_counter() - began) / links * 1e6

    def block(group: Collective, x: mx.array, chained: bool) -> list[float]:
        first = statistics.median(once(group, x, 1) for _ in range(3))
        first_us = int(clock.broadcast_from(0, mx.array([first])).item())
        repeats = BLOCK_S * 1e6 / max(1, first_us)
        links = max(1, min(CHAIN, int(repeats))) if chained else 1
        return [once(group, x, links) for _ in range(max(3, min(200, int(repeats / links))))]

    for size in job["sizes"]:
        x = mx.zeros(size // 4)
        mx.eval(x)
        medians: dict[tuple[str, str], list[float]] = {}
        for _ in range(job["rounds"]):
            for name, group in groups.items():
                for chained in (False, True):
                    mx.eval(group.all_sum(x))
                    clock.barrier()
                    key = (name, "chain" if chained else "one")
                    medians.setdefault(key, []).append(statistics.median(block(group, x, chained)))
        if rank == 0:
            for (name, mode), values in medians.items():
                results.send(
                    {"bytes": size, "backend": name, "mode": mode, "us": statistics.median(values)}
                )
    for group in groups.values():
        group.close()
    results.close()


def socket_us(times: int = 2000) -> float:
    """Half of a one-byte round trip over a Unix socket between two processes, in microseconds."""
    near, far = socket.socketpair()
    child = multiprocessing.get_context("fork").Process(target=_echo, args=(far, times))
    child.start()
    durations = []
    for _ in range(times):
        began = time.perf_counter()
        near.send(b"x")
        near.recv(1)
        durations.append(time.perf_counter() - began)
    child.join()
    near.close()
    far.close()
    return statistics.median(durations) / 2 * 1e6


def _echo(sock: socket.socket, times: int) -> None:
    for _ in range(times):
        sock.send(sock.recv(1))


def ports(count: int) -> list[str]:
    """Free loopback addresses."""
    from cenacle import net

    return [f"127.0.0.1:{port}" for port in net.free_ports(count)]


def measure(nodes: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = ports(nodes)
        hostfile = Path(folder) / "hosts.json"
        hostfile.write_text(json.dumps([[h] for h in hosts]))

        def unix(name: str) -> list[str]:
            return [f"unix:{folder}/{name}-{r}" for r in range(nodes)]

        meshes: dict[str, tuple[list[str], dict[str, Any]]] = {"mesh": (unix("mesh"), {})}
        if args.tcp:
            meshes["mesh tcp"] = (ports(nodes), {})
        if args.variants:
            meshes["digest"] = (unix("digest"), {})  # with the routing of 8 experts
            meshes["bf16"] = (unix("bf16"), {"comm_dtype": "bf16"})
            meshes["direct"] = (unix("direct"), {"scatter_bytes": 1 << 40})
            meshes["scatter"] = (unix("scatter"), {"scatter_bytes": 0})
            meshes["spin 30"] = (unix("spin"), {"spin_us": 30.0})
        job = {
            "hostfile": str(hostfile),
            "addresses": hosts,
            "meshes": meshes,
            "ring": not args.no_ring,
            "secret": secrets.token_hex(16),
            "sizes": args.sizes,
            "rounds": args.rounds,
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
                    raise SystemExit("a rank sent nothing for 120 s")
                try:
                    row = {"nodes": nodes, **ours.recv()}
                except EOFError:
                    break
                rows.append(row)
                print(
                    f"{nodes} ranks  {row['bytes']:>9,} bytes  {row['backend']:<9} "
                    f"{row['mode']:<5} {row['us']:>10,.1f} us",
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
    parser.add_argument("--variants", action="store_true", help="also variants of the mesh")
    parser.add_argument("--no-ring", action="store_true")
    args = parser.parse_args()
    conditions = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "socket_us": round(socket_us(), 1),
    }
    print(f"conditions: {conditions}")
    rows = [row for nodes in args.nodes for row in measure(nodes, args)]
    for row in rows:
        row["us"] = round(row["us"], 1)
    print(json.dumps({"benchmark": "all_reduce", **conditions, "rows": rows}))


if __name__ == "__main__":
    main()
