"""Which Thunderbolt port of a node leads to which other node, for RDMA between them.

Owns: reading what macOS reports about ports, and the device matrix that JACCL needs.
Does not know: who runs the tools (`node_info.py`), or what is decided by it (`placement.py`).
Invariant: pure functions. Never run on a Mac; the tests use the formats of `system_profiler`,
`networksetup` and `ibv_devices` that MLX's own `mlx.distributed_config` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

Ports = Sequence[Mapping[str, str]]
"""Ports of a node: "device" (of RDMA), "uuid" (its own), "to" (the uuid at the cable's end)."""
Devices = Sequence[Sequence[str | None]]
"""For each rank its device towards each rank; None towards itself."""


def rdma_ports(profile: str, hardware: str, devices: str) -> list[dict[str, str]]:
    """The Thunderbolt ports that support RDMA and have a cable.

    Args:
        profile: output of `system_profiler SPThunderboltDataType -json`.
        hardware: output of `networksetup -listallhardwareports`.
        devices: output of `ibv_devices`.
    """
    rdma_devices = set(re.findall(r"^\s+(rdma_\w+)", devices, re.MULTILINE))
    interfaces = dict(re.findall(r"Hardware Port: ([^\n]+)\nDevice: (\S+)", hardware))
    ports = []
    try:
        for bus in json.loads(profile)["SPThunderboltDataType"]:
            peers = [
                item["domain_uuid_key"]
                for item in bus.get("_items", [])
                if "domain_uuid_key" in item
            ]
            if "domain_uuid_key" not in bus or not peers:
                continue
            number = bus["receptacle_1_tag"]["receptacle_id_key"]
            device = f"rdma_{interfaces.get(f'Thunderbolt {number}')}"
            if device in rdma_devices:
                ports.append({"device": device, "uuid": bus["domain_uuid_key"], "to": peers[0]})
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # an unknown format counts as no ports
    return ports


def device_matrix(nodes: Sequence[Ports]) -> Devices | None:
    """The device of each rank towards each other; None if a pair has no cable of its own."""
    owners = {port["uuid"]: rank for rank, ports in enumerate(nodes) for port in ports}
    matrix: list[list[str | None]] = [[None] * len(nodes) for _ in nodes]
    for rank, ports in enumerate(nodes):
        for port in ports:
            peer = owners.get(port["to"])
            if peer is not None and peer != rank and matrix[rank][peer] is None:
                matrix[rank][peer] = port["device"]
    return matrix if is_full_mesh(matrix) else None


def is_full_mesh(devices: Devices) -> bool:
    """Whether every rank has a device towards every other."""
    size = len(devices)
    return all(
        len(row) == size and all(bool(d) or i == j for j, d in enumerate(row))
        for i, row in enumerate(devices)
    )
