"""Which of a machine's Thunderbolt ports leads to which other machine, for RDMA between them.

Owns: reading what macOS says of its ports, and the table of devices that JACCL wants.
Does not know: who runs the tools (`machine.py`), what is decided by it (`placing.py`).
Invariant: pure functions; never run on a Mac, the tests use the forms of `system_profiler`,
`networksetup` and `ibv_devices` that mlx's own `mlx.distributed_config` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

Ports = Sequence[Mapping[str, str]]
"""A machine's ports: "device" (of RDMA), "uuid" (its own), "to" (the uuid at the cable's end)."""
Devices = list[list[str | None]]
"""For each rank its device towards each rank; None towards itself."""


def ports(profile: str, hardware: str, devices: str) -> list[dict[str, str]]:
    """The Thunderbolt ports of this machine that RDMA can use and that lead somewhere.

    Args:
        profile: of `system_profiler SPThunderboltDataType -json`.
        hardware: of `networksetup -listallhardwareports`.
        devices: of `ibv_devices`.
    """
    usable = set(re.findall(r"^\s+(rdma_\w+)", devices, re.MULTILINE))
    interfaces = dict(re.findall(r"Hardware Port: ([^\n]+)\nDevice: (\S+)", hardware))
    found = []
    try:
        buses = json.loads(profile)["SPThunderboltDataType"]
        for bus in buses:
            ends = [
                item["domain_uuid_key"]
                for item in bus.get("_items", [])
                if "domain_uuid_key" in item
            ]
            if "domain_uuid_key" not in bus or not ends:
                continue
            number = bus["receptacle_1_tag"]["receptacle_id_key"]
            device = f"rdma_{interfaces.get(f'Thunderbolt {number}')}"
            if device in usable:
                found.append({"device": device, "uuid": bus["domain_uuid_key"], "to": ends[0]})
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # another form than is known: as if there were none
    return found


def table(machines: Sequence[Ports]) -> Devices | None:
    """What each rank uses towards each other; None: some pair has no cable of its own."""
    whose = {port["uuid"]: rank for rank, own in enumerate(machines) for port in own}
    found: Devices = [[None] * len(machines) for _ in machines]
    for rank, own in enumerate(machines):
        for port in own:
            other = whose.get(port["to"])
            if other is not None and other != rank and found[rank][other] is None:
                found[rank][other] = port["device"]
    return found if complete(found) else None


def complete(devices: Devices) -> bool:
    """Whether every rank has a device towards every other."""
    size = len(devices)
    return all(
        len(row) == size and all(bool(d) or i == j for j, d in enumerate(row))
        for i, row in enumerate(devices)
    )
