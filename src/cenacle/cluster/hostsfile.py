"""A hosts file, in the form of `mlx.launch`: which machines are expected, and where they exchange.

Owns: reading it, and what it says of the machines that have come.
Does not know: SSH (nothing is started by it: machines join as ever), sockets.
Invariant: it adds nobody to a cluster; the first entry is the head's machine.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ClusterError, InputError
from .membership import Node
from .thunderbolt import Devices, complete


@dataclass(frozen=True)
class Host:
    """One line of the file.

    Args:
        name: "ssh": for people.
        ips: its addresses, the one for exchanging first.
        rdma: its RDMA device towards each host, None towards itself; empty: not said.
    """

    name: str
    ips: tuple[str, ...]
    rdma: tuple[str | None, ...] = ()


def read(path: Path) -> tuple[Host, ...]:
    """The hosts of a file, a list or an object with "hosts".

    Raises:
        InputError: it cannot be read, or an entry is not understood.
    """
    try:
        data = json.loads(path.read_text())
        entries = data["hosts"] if isinstance(data, dict) else data
        hosts = tuple(
            Host(
                str(entry["ssh"]),
                tuple(str(ipaddress.ip_address(ip)) for ip in entry.get("ips", [])),
                tuple(None if d is None else str(d) for d in entry.get("rdma") or []),
            )
            for entry in entries
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'--hosts: expected a JSON list such as [{{"ssh": "one", "ips": ["10.0.0.1"]}}, ...] '
            f"in {path}: {error!r}",
            "hosts",
        ) from error
    without = [host.name for host in hosts if not host.ips]
    every = [ip for host in hosts for ip in host.ips]
    if not hosts or without or len(set(every)) < len(every):
        why = f"{without[0]} has none" if without else "an address is there twice, or nobody"
        raise InputError(f'--hosts: {path}: every host needs "ips" of its own: {why}', "hosts")
    return hosts


def check_first(hosts: Sequence[Host], addresses: Iterable[str]) -> None:
    """The first host has to be this machine.

    Raises:
        InputError: it is another, or none.
    """
    if not set(addresses) & set(hosts[0].ips):
        raise InputError(
            f"--hosts: the first, {hosts[0].name} ({', '.join(hosts[0].ips)}), is not this "
            f"machine: `cenacle up` begins on the first",
            "hosts",
        )


def awaited(hosts: Sequence[Host], here: Iterable[str]) -> str:
    """Who is not here yet, for people.

    Args:
        here: addresses of the machines that are.
    """
    known = set(here)
    names = [f"{h.name} ({h.ips[0]})" for h in hosts[1:] if not known & set(h.ips)]
    return f"awaited: {', '.join(names)}" if names else ""


def arranged(hosts: Sequence[Host], members: Sequence[Node]) -> tuple[tuple[Node, ...], Devices]:
    """The members with the file's addresses, and the RDMA devices between them.

    Args:
        members: the head's machine first, whose own address may be the loopback's.

    Returns:
        The members, and their devices; empty where the file does not say all.

    Raises:
        ClusterError: a machine is not in the file.
    """
    order: list[tuple[int, Node]] = [(0, replace(members[0], address=hosts[0].ips[0]))]
    for node in members[1:]:
        at = next((i for i, host in enumerate(hosts) if node.address in host.ips), None)
        if at is None:
            raise ClusterError(
                f"{node.name} ({node.address}) is in this cluster, but not in the hosts file: add "
                f"it, or `cenacle nodes --remove {node.name}`"
            )
        order.append((at, replace(node, address=hosts[at].ips[0])))
    known = all(len(host.rdma) == len(hosts) for host in hosts)
    devices = [[hosts[a].rdma[b] for b, _ in order] for a, _ in order] if known else []
    return tuple(node for _, node in order), devices if complete(devices) else []
