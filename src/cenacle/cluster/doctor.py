"""Checks of this machine: what is wrong, in sentences, and what to do about it.

Owns: what the system is asked, and what the answers mean.
Does not know: models, plans, running groups.
Invariant: `examine` is a pure function of `HostFacts`, which holds the output of the system's own
tools and files. Nothing here changes the machine. A tool that is missing or fails is not a
finding; its check is skipped. The checks of macOS were tried on recorded output only.
Next: `cli/doctor.py` shows the findings.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil

from ..core.units import format_bytes
from ..paths import private_dir_problem
from ..planning.memory import wired_limit_command
from .messages import Finding

TOOL_TIMEOUT_S = 5.0
MIN_OPEN_FILES = 1024  # enough for a server with hundreds of clients and 8 nodes
MIN_FREE_DISK_BYTES = 20 * 10**9
MAX_CLOCK_SKEW_S = 30.0  # certificates and tokens tolerate this much
MAX_MEMORY_PRESSURE_PERCENT = 5.0  # of the last minute in which a process waited for memory
MIN_AVAILABLE_MEMORY = 0.1  # of all memory


@dataclass(frozen=True)
class HostFacts:
    """What the system reports.

    Args:
        system: "Darwin" or "Linux".
        outputs: text by command line or file path; what could not be had is missing.
        env: environment variables.
        max_open_files: that a process may have.
        free_disk_bytes: where weights are stored.
        memory_bytes, available_bytes: None: unknown.
        versions: by distribution: (installed or None, required).
        kernels_unavailable_reason: why the kernels for CPUs are missing, or None.
        clock_skew_s: seconds by which the head's clock is ahead of this one; None: unknown.
        unreachable_head: address of the head, if it does not answer.
        temp_dir: where MLX puts code that it compiled, and loads it from.
        temp_dir_problem: why others could put code there; None: they cannot.
    """

    system: str
    outputs: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    max_open_files: int = 65536
    free_disk_bytes: int = 10**12
    memory_bytes: int | None = None
    available_bytes: int | None = None
    versions: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)
    kernels_unavailable_reason: str | None = None
    clock_skew_s: float | None = None
    unreachable_head: str | None = None
    temp_dir: str = ""
    temp_dir_problem: str | None = None

    def number(self, name: str) -> float | None:
        """The output of a file or command as a number."""
        try:
            return float(self.outputs[name].strip())
        except (KeyError, ValueError):
            return None

    def find(self, name: str, pattern: str) -> str | None:
        """The first group of a pattern in the output of a file or command."""
        match = re.search(pattern, self.outputs.get(name, ""), re.MULTILINE)
        return match[1] if match else None


def examine(facts: HostFacts) -> list[Finding]:
    """All findings, the worst first."""
    checks = (*EVERYWHERE, *(MAC if facts.system == "Darwin" else LINUX))
    order = ("bad", "warning", "good")
    return sorted((f for check in checks for f in check(facts)), key=lambda f: order.index(f.level))


Check = Callable[[HostFacts], Iterator[Finding]]


def _versions(facts: HostFacts) -> Iterator[Finding]:
    matches = True
    for name, (installed, required) in facts.versions.items():
        if installed != required:
            matches = False
            yield Finding(
                "bad",
                f"Cenacle needs {name} {required}, but {installed or 'none'} is installed.",
                "Install it again: `pip install --upgrade --force-reinstall cenacle`.",
            )
    if facts.versions and matches:
        versions = ", ".join(f"{name} {version}" for name, (version, _) in facts.versions.items())
        yield Finding("good", f"Versions match: {versions}.")


def _fast_synch(facts: HostFacts) -> Iterator[Finding]:
    if facts.env.get("MLX_METAL_FAST_SYNCH", "0") not in ("", "0"):
        yield Finding(
            "bad",
            "MLX_METAL_FAST_SYNCH is set: GPUs can lock up until a restart (mlx#3830, mlx#4005).",
            "Unset it, also in the settings of your shell.",
        )


def _file_handles(facts: HostFacts) -> Iterator[Finding]:
    if facts.max_open_files < MIN_OPEN_FILES:
        yield Finding(
            "warning",
            f"A process may open {facts.max_open_files} files; a busy server needs "
            f"{MIN_OPEN_FILES}.",
            "Run `ulimit -n 8192` before starting it, or set LimitNOFILE in its service.",
        )


def _disk(facts: HostFacts) -> Iterator[Finding]:
    if facts.free_disk_bytes < MIN_FREE_DISK_BYTES:
        yield Finding(
            "warning",
            f"{format_bytes(facts.free_disk_bytes)} are free on the disk that stores weights.",
            "Remove unused models, or set HF_HOME to a folder on a larger disk.",
        )


def _clock(facts: HostFacts) -> Iterator[Finding]:
    if facts.unreachable_head is not None:
        yield Finding(
            "bad",
            f"{facts.unreachable_head} does not answer.",
            "Check the address, and that `cenacle up` or `cenacle serve` runs there.",
        )
    if facts.clock_skew_s is None:
        return
    if abs(facts.clock_skew_s) > MAX_CLOCK_SKEW_S:
        direction = "ahead of" if facts.clock_skew_s > 0 else "behind"
        yield Finding(
            "bad",
            f"The head's clock is {abs(facts.clock_skew_s):.0f} s {direction} this machine's: "
            f"certificates and tokens will be refused.",
            "Synchronize both clocks by NTP.",
        )
    else:
        yield Finding("good", "The head answers, and its clock agrees with this machine's.")


def _temp_dir(facts: HostFacts) -> Iterator[Finding]:
    if facts.temp_dir_problem is not None:
        yield Finding(
            "bad",
            f"MLX loads compiled code from {facts.temp_dir}, and {facts.temp_dir_problem}.",
            "Set CENACLE_HOME to a folder that only you can write to.",
        )
    elif facts.temp_dir:
        yield Finding("good", f"Compiled code is in {facts.temp_dir}, which is yours alone.")


def _describe_link(name: str, wifi: bool, mtu: float | None, mbit: float | None) -> list[Finding]:
    """Findings about the network interface towards the other nodes."""
    findings = []
    if wifi:
        findings.append(
            Finding(
                "bad",
                f"The other nodes are reached over Wi-Fi ({name}): it has a latency of "
                f"milliseconds, and every token needs an all-reduce per layer.",
                "Connect a cable, and move its service above Wi-Fi in the network settings.",
            )
        )
    if mtu is not None and mtu < 1500:
        findings.append(
            Finding(
                "warning",
                f"The MTU of {name} is {mtu:.0f} bytes, less than the 1500 of Ethernet: a VPN or a "
                f"wrong setting.",
                "Set the MTU to 1500, or to 9000 on all nodes and the switch.",
            )
        )
    if mbit is not None and 0 < mbit < 1000:
        findings.append(
            Finding(
                "bad",
                f"{name} runs at {mbit:.0f} Mbit/s: a bad cable or an old switch.",
                "Replace the cable; at least 1 Gbit/s is needed.",
            )
        )
    if not findings:
        rate = f", {mbit:.0f} Mbit/s" if mbit and mbit > 0 else ""
        size = f", MTU {mtu:.0f}" if mtu is not None else ""
        findings.append(Finding("good", f"The other nodes are reached over {name}{rate}{size}."))
    return findings


# ---- macOS ------------------------------------------------------------------------------------


def _wired(facts: HostFacts) -> Iterator[Finding]:
    memory, limit = (
        facts.number("sysctl -n hw.memsize"),
        facts.number("sysctl -n iogpu.wired_limit_mb"),
    )
    if memory is None or limit is None:
        return
    if limit == 0:
        setting = wired_limit_command(memory, memory * 0.85)
        yield Finding(
            "warning",
            f"The GPU may use about 75 % of this Mac's {format_bytes(memory)}.",
            f"If a model needs more, run `{setting}`; it lasts until the next restart.",
        )
    elif wired_limit_command(memory, limit * 2**20) is None:
        yield Finding(
            "bad",
            f"iogpu.wired_limit_mb leaves the system {format_bytes(memory - limit * 2**20)}: "
            f"too little; the Mac may freeze.",
            f"`sudo sysctl iogpu.wired_limit_mb={int(memory * 0.85 / 2**20)}`.",
        )
    else:
        yield Finding(
            "good", f"The GPU may use {format_bytes(limit * 2**20)} of {format_bytes(memory)}."
        )


def _mac_memory(facts: HostFacts) -> Iterator[Finding]:
    free = facts.find("memory_pressure -Q", r"free percentage: (\d+)%")
    if free is not None and int(free) < 15:
        yield Finding(
            "bad" if int(free) < 5 else "warning",
            f"{free} % of memory is free.",
            "Quit other programs; Activity Monitor lists the largest under Memory.",
        )
    used = facts.find("sysctl -n vm.swapusage", r"used = ([\d.]+)M")
    if used is not None and float(used) > 1024:
        yield Finding(
            "warning",
            f"{format_bytes(float(used) * 2**20)} of memory are swapped to disk.",
            "Quit other programs, or give this node less of the model (--node-weights).",
        )


def _mac_power(facts: HostFacts) -> Iterator[Finding]:
    limit = facts.find("pmset -g therm", r"CPU_Speed_Limit\s*=\s*(\d+)")
    level = facts.find("pmset -g therm", r"Thermal Warning Level\s*=\s*(\d+)")
    if (limit is not None and int(limit) < 100) or (level is not None and int(level) > 0):
        yield Finding(
            "warning",
            "This Mac is throttled because it is hot.",
            "Improve its cooling; a cluster is as fast as its slowest node.",
        )
    if facts.find("pmset -g", r"^\s*lowpowermode\s+(1)"):
        yield Finding(
            "warning", "Low Power Mode is on.", "Turn it off: `sudo pmset -a lowpowermode 0`."
        )
    if "'Battery Power'" in facts.outputs.get("pmset -g batt", ""):
        yield Finding("warning", "This Mac runs on battery.", "Plug it in.")
    minutes = facts.find("pmset -g", r"^\s*sleep\s+(\d+)")
    if minutes is not None and int(minutes) > 0:
        yield Finding(
            "warning",
            f"This Mac sleeps after {minutes} minutes without user activity, and the group then "
            f"loses it.",
            "Run `sudo pmset -c sleep 0`.",
        )


def _rdma(facts: HostFacts) -> Iterator[Finding]:
    """Apple TN3205: RDMA over Thunderbolt needs macOS 26.2, Thunderbolt 5 and `rdma_ctl enable`."""
    profile = facts.outputs.get("system_profiler SPThunderboltDataType", "")
    if "Thunderbolt 5" not in profile:
        return
    version = facts.outputs.get("sw_vers -productVersion", "").strip()
    numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdigit())
    if numbers and numbers < (26, 2):
        yield Finding(
            "warning",
            f"macOS {version} has no RDMA over Thunderbolt, which this Mac's ports support.",
            "Update to macOS 26.2 or later.",
        )
        return
    devices = re.findall(r"^\s+(rdma_\w+)", facts.outputs.get("ibv_devices", ""), re.MULTILINE)
    if not devices:
        yield Finding(
            "warning",
            "RDMA over Thunderbolt is off: all-reduces take ten times as long over TCP.",
            "Restart into Recovery, run `rdma_ctl enable` in Terminal, and restart.",
        )
        return
    bridge = facts.outputs.get("ifconfig bridge0", "")
    if re.search(r"member: en", bridge) and "status: active" in bridge:
        yield Finding(
            "warning",
            "The Thunderbolt bridge is active: it occupies the ports that RDMA needs.",
            "In System Settings, Network, make the Thunderbolt Bridge inactive on every node.",
        )
    else:
        yield Finding("good", f"RDMA over Thunderbolt is on ({', '.join(devices)}).")


def _mac_link(facts: HostFacts) -> Iterator[Finding]:
    name = facts.find("route", r"interface: (\S+)")
    if name is None:
        return
    ports = facts.outputs.get("networksetup -listallhardwareports", "")
    port = re.search(rf"Hardware Port: ([^\n]+)\nDevice: {re.escape(name)}\n", ports)
    described = facts.outputs.get("ifconfig", "")
    mine = re.search(rf"^{re.escape(name)}: .*?(?=^\S|\Z)", described, re.MULTILINE | re.DOTALL)
    text = mine[0] if mine else ""
    mtu, media = re.search(r"mtu (\d+)", text), re.search(r"\((\d+)(G?)base", text, re.IGNORECASE)
    mbit = float(media[1]) * (1000 if media[2] else 1) if media else None
    title = f"{port[1]} ({name})" if port else name
    wifi = port is not None and port[1] in ("Wi-Fi", "AirPort")
    yield from _describe_link(title, wifi, float(mtu[1]) if mtu else None, mbit)


def _mac_firewall(facts: HostFacts) -> Iterator[Finding]:
    tool = "/usr/libexec/ApplicationFirewall/socketfilterfw"
    if "block all" in facts.outputs.get(f"{tool} --getblockall", "").lower() and (
        "enabled" in facts.outputs[f"{tool} --getblockall"].lower()
    ):
        yield Finding(
            "bad",
            "The firewall blocks all incoming connections: other nodes cannot reach this one.",
            "In System Settings, Network, Firewall, Options, allow incoming connections.",
        )
    elif re.search(r"State = [12]", facts.outputs.get(f"{tool} --getglobalstate", "")):
        yield Finding(
            "warning",
            "The firewall is on: macOS asks once whether Python may accept connections.",
            "Allow it, or add it in System Settings, Network, Firewall, Options.",
        )


# ---- Linux ------------------------------------------------------------------------------------


def _native(facts: HostFacts) -> Iterator[Finding]:
    if facts.kernels_unavailable_reason is not None:
        yield Finding(
            "warning",
            f"The kernels for CPUs are missing ({facts.kernels_unavailable_reason}): MLX alone is "
            f"many times slower.",
            "Install a C++20 compiler and cmake, then install cenacle again.",
        )


def _linux_memory(facts: HostFacts) -> Iterator[Finding]:
    total, available = facts.memory_bytes, facts.available_bytes
    if total and available is not None and available < MIN_AVAILABLE_MEMORY * total:
        yield Finding(
            "warning",
            f"{format_bytes(available)} of {format_bytes(total)} of memory are available.",
            "Quit other programs.",
        )
    pressure = facts.find("/proc/pressure/memory", r"^some avg10=\S+ avg60=([\d.]+)")
    if pressure is not None and float(pressure) > MAX_MEMORY_PRESSURE_PERCENT:
        yield Finding(
            "bad",
            f"In {float(pressure):.0f} % of the last minute a program waited for memory.",
            "Quit other programs, or give this node less of the model (--node-weights).",
        )


def _large_pages(facts: HostFacts) -> Iterator[Finding]:
    if "[never]" in facts.outputs.get("/sys/kernel/mm/transparent_hugepage/enabled", ""):
        yield Finding(
            "warning",
            "Large pages are off: reading weights takes a third longer.",
            "Run `echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`.",
        )


def _linux_power(facts: HostFacts) -> Iterator[Finding]:
    cpu = "/sys/devices/system/cpu"
    governor = facts.outputs.get(f"{cpu}/cpu0/cpufreq/scaling_governor", "").strip()
    if governor == "powersave" and f"{cpu}/intel_pstate/status" not in facts.outputs:
        yield Finding(
            "warning",
            "The processor runs at low frequency (governor powersave).",
            "Run `sudo cpupower frequency-set -g performance`.",
        )
    throttled = facts.number(f"{cpu}/cpu0/thermal_throttle/core_throttle_count")
    if throttled:
        yield Finding(
            "warning",
            f"The processor was throttled because of heat {throttled:.0f} times since the start.",
            "Improve its cooling; a cluster is as fast as its slowest node.",
        )


def _linux_clock(facts: HostFacts) -> Iterator[Finding]:
    if facts.outputs.get("timedatectl show -p NTPSynchronized --value", "").strip() == "no":
        yield Finding(
            "warning",
            "This machine's clock is not synchronized by NTP.",
            "Run `sudo timedatectl set-ntp true`.",
        )


def _linux_link(facts: HostFacts) -> Iterator[Finding]:
    name = facts.find("route", r"\bdev (\S+)")
    if name is None or name == "lo":
        return
    folder = f"/sys/class/net/{name}"
    wifi = f"{folder}/wireless" in facts.outputs
    mtu, mbit = facts.number(f"{folder}/mtu"), facts.number(f"{folder}/speed")
    yield from _describe_link(name, wifi, mtu, mbit)


def _linux_firewall(facts: HostFacts) -> Iterator[Finding]:
    if facts.outputs.get("ufw status", "").startswith("Status: active"):
        yield Finding(
            "warning",
            "The firewall (ufw) is on: other nodes may not reach this one.",
            "Run `sudo ufw allow from NETWORK` with the network of the nodes.",
        )
    if facts.outputs.get("firewall-cmd --state", "").strip() == "running":
        yield Finding(
            "warning",
            "The firewall (firewalld) is on: other nodes may not reach this one.",
            "Run `sudo firewall-cmd --zone=trusted --add-source=NETWORK` with the network of the "
            "nodes.",
        )


EVERYWHERE: tuple[Check, ...] = (
    *(_versions, _fast_synch, _file_handles, _disk, _clock),
    _temp_dir,
)
MAC: tuple[Check, ...] = (_wired, _mac_memory, _mac_power, _rdma, _mac_link, _mac_firewall)
LINUX: tuple[Check, ...] = (
    *(_native, _linux_memory, _large_pages, _linux_power),
    *(_linux_clock, _linux_link, _linux_firewall),
)

_MAC_TOOLS = (
    "sysctl -n hw.memsize",
    "sysctl -n iogpu.wired_limit_mb",
    "sysctl -n vm.swapusage",
    "sw_vers -productVersion",
    "memory_pressure -Q",
    "pmset -g",
    "pmset -g therm",
    "pmset -g batt",
    "system_profiler SPThunderboltDataType",
    "ibv_devices",
    "ifconfig",
    "ifconfig bridge0",
    "networksetup -listallhardwareports",
    "/usr/libexec/ApplicationFirewall/socketfilterfw --getglobalstate",
    "/usr/libexec/ApplicationFirewall/socketfilterfw --getblockall",
)
_LINUX_TOOLS = ("timedatectl show -p NTPSynchronized --value", "ufw status", "firewall-cmd --state")
_LINUX_FILES = (
    "/proc/pressure/memory",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "/sys/devices/system/cpu/intel_pstate/status",
    "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
)
_PINNED = ("mlx", "mlx-lm")


def gather(head: str | None = None) -> HostFacts:
    """Ask the system; each tool takes at most a few seconds.

    Args:
        head: address of another node, "host", or "host:port" of its HTTP server; None: the network
            checks concern the default route.
    """
    mac = platform.system() == "Darwin"
    outputs = {}
    for command in _MAC_TOOLS if mac else _LINUX_TOOLS:
        if (text := _run(command.split())) is not None:
            outputs[command] = text
    for path in () if mac else _LINUX_FILES:
        if (text := _read(path)) is not None:
            outputs[path] = text
    outputs |= _network_outputs(head.rpartition(":")[0] or head if head else None, mac)
    from .. import native  # loads MLX, which may be what is wrong

    skew_s, answers = _measure_clock_skew(head) if head else (None, True)
    weights_folder = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    existing = next(p for p in (weights_folder, *weights_folder.parents) if p.exists())
    memory = psutil.virtual_memory()
    return HostFacts(
        system=platform.system(),
        outputs=outputs,
        env=dict(os.environ),
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        free_disk_bytes=shutil.disk_usage(existing).free,
        memory_bytes=memory.total,
        available_bytes=memory.available,
        versions=_pinned_versions(),
        kernels_unavailable_reason=native.unavailable_reason() or None,
        clock_skew_s=skew_s,
        unreachable_head=None if answers else head,
        temp_dir=tempfile.gettempdir(),
        temp_dir_problem=private_dir_problem(Path(tempfile.gettempdir())),
    )


def _network_outputs(host: str | None, mac: bool) -> dict[str, str]:
    """The route to a host, or the default route, and on Linux its interface."""
    if mac:
        route = _run(["route", "-n", "get", host or "default"])
    else:
        words = ["get", host] if host else ["show", "default"]
        route = _run(["ip", "route", *words])
    if route is None:
        return {}
    outputs = {"route": route}
    if (name := re.search(r"\bdev (\S+)", route)) and not mac:
        folder = f"/sys/class/net/{name[1]}"
        for path in (f"{folder}/mtu", f"{folder}/speed"):
            if (text := _read(path)) is not None:
                outputs[path] = text
        if Path(f"{folder}/wireless").exists():
            outputs[f"{folder}/wireless"] = ""
    return outputs


def _run(command: list[str]) -> str | None:
    """The output of a tool; None if it is missing or fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TOOL_TIMEOUT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _pinned_versions() -> dict[str, tuple[str | None, str]]:
    """Installed and required version of each distribution that this program pins."""
    versions: dict[str, tuple[str | None, str]] = {}
    for line in metadata.requires("cenacle") or ():
        pinned = re.match(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", line)
        if pinned and pinned[1] in _PINNED and "extra ==" not in line:
            try:
                versions[pinned[1]] = metadata.version(pinned[1]), pinned[2]
            except metadata.PackageNotFoundError:
                versions[pinned[1]] = None, pinned[2]
    return versions


def _measure_clock_skew(head: str) -> tuple[float | None, bool]:
    """Seconds by which the clock of an HTTP server is ahead of this one, and whether it answers; of
    a host without a port, whether its name has an address."""
    try:
        if ":" not in head:
            socket.getaddrinfo(head, None)
            return None, True
        with urlopen(f"http://{head}/health", timeout=TOOL_TIMEOUT_S) as answer:
            date = answer.headers["Date"]
    except HTTPError as error:
        date = error.headers["Date"]  # also an unhealthy server has a clock
    except (OSError, ValueError, HTTPException):
        return None, False
    try:
        return parsedate_to_datetime(date).timestamp() - time.time() if date else None, True
    except ValueError:
        return None, True


__all__ = ["Finding", "HostFacts", "examine", "gather"]
