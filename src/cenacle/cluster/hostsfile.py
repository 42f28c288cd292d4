"""A hosts file as `mlx.launch` reads it: which nodes to expect, and which addresses they use.

Owns: reading the file, and matching nodes to its entries.
Does not know: SSH (nodes join by themselves, nothing is started by it), sockets.
Invariant: it adds no node to a cluster; its first entry is the head's machine.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ClusterError, InputError
from .membership import Node
from .thunderbolt import Devices, is_full_mesh


@dataclass(frozen=True)
class Host:
    """An entry of the file.

    Args:
        name: key "ssh"; for people.
        ips: addresses; ranks communicate over the first.
        rdma: RDMA device towards each host, None towards itself; empty: not given.
    """

    name: str
    ips: tuple[str, ...]
    rdma: tuple[str | None, ...] = ()


def read(path: Path) -> tuple[Host, ...]:
    """The hosts of a file: a list, or an object with "hosts".

    Raises:
        InputError: it cannot be read, or an entry is malformed.
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
    if not hosts:
        raise InputError(f"--hosts: {path}: expected at least one host, got none", "hosts")
    seen: set[str] = set()
    for host in hosts:
        if not host.ips:
            raise InputError(f'--hosts: {path}: {host.name} has no "ips"', "hosts")
        if repeated := seen & set(host.ips):
            raise InputError(f"--hosts: {path}: {min(repeated)} is listed twice", "hosts")
        seen |= set(host.ips)
    return hosts


def check_local_host(hosts: Sequence[Host], addresses: Iterable[str]) -> None:
    """Check that the first host is this machine.

    Raises:
        InputError: it is not.
    """
    if not set(addresses) & set(hosts[0].ips):
        raise InputError(
            f"--hosts: expected this machine first, got {hosts[0].name} "
            f"({', '.join(hosts[0].ips)}); run `cenacle up` on the first host",
            "hosts",
        )


def expected_hosts(hosts: Sequence[Host], addresses: Iterable[str]) -> str:
    """The hosts that are missing, for people; empty if none is.

    Args:
        addresses: of the connected nodes.
    """
    connected = set(addresses)
    missing = [f"{h.name} ({h.ips[0]})" for h in hosts[1:] if not connected & set(h.ips)]
    return f"expected: {', '.join(missing)}" if missing else ""


def order_by_hosts(
    hosts: Sequence[Host], members: Sequence[Node]
) -> tuple[tuple[Node, ...], Devices]:
    """The members with the addresses of the file, and the RDMA devices between them.

    Args:
        members: the head's own node first; its address may be that of the loopback device.

    Returns:
        The members, and their devices; empty if the file does not give all.

    Raises:
        ClusterError: a node is not in the file.
    """
    matches: list[tuple[int, Node]] = [(0, replace(members[0], address=hosts[0].ips[0]))]
    for node in members[1:]:
        index = next((i for i, host in enumerate(hosts) if node.address in host.ips), None)
        if index is None:
            raise ClusterError(
                f"{node.name} ({node.address}) is in this cluster but not in the hosts file: add "
                f"it, or run `cenacle nodes --remove {node.name}`"
            )
        matches.append((index, replace(node, address=hosts[index].ips[0])))
    complete = all(len(host.rdma) == len(hosts) for host in hosts)
    devices = [[hosts[a].rdma[b] for b, _ in matches] for a, _ in matches] if complete else []
    return tuple(node for _, node in matches), devices if is_full_mesh(devices) else []
