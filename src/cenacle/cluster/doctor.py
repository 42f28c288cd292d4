"""What is wrong with this machine, in plain sentences, each with what to do.

Owns: what is asked of the system, and what the answers mean.
Does not know: models, plans, running groups.
Invariant: `examine` is a pure function of `Facts`, the words of the system's own tools and files;
nothing here changes the machine; a tool that is missing or fails is no finding but a check
that was not made. Checks of macOS were tried on recorded outputs only.
Next: `cli_doctor.py` shows it.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.error import HTTPError
from urllib.request import urlopen

from ..core.units import format_bytes
from ..planning.perf_model import wired_limit_command

TOOL_DEADLINE_S = 5.0
FEW_FILES = 1024  # a server with hundreds of clients, and 8 nodes, stays below this
LOW_DISK_BYTES = 20 * 10**9
SKEW_S = 30.0  # certificates and time-limited tokens bear this much
MEMORY_PRESSURE_PERCENT = 5.0  # of the last minute in which somebody waited for memory

Level = Literal["bad", "warning", "good"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        level: "bad": it will not work or not last; "warning": slower or less sure than need be.
        message: a sentence.
        fix: what to do; empty if good.
    """

    level: Level
    message: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What the system says.

    Args:
        system: "Darwin" or "Linux".
        said: command line, or path of a file -> its text. What is missing was not to be had.
        env: environment variables.
        files: most file handles that a process may have.
        disk_free: bytes free where weights are kept.
        versions: distribution -> (installed or None, what this program was made for).
        native: why the kernels for CPUs are not there, or None.
        skew_s: seconds by which the head's clock is before ours; None: not asked, or no answer.
    """

    system: str
    said: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    files: int = 65536
    disk_free: int = 10**12
    versions: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)
    native: str | None = None
    skew_s: float | None = None

    def number(self, name: str) -> float | None:
        """The text of a file or command as a number."""
        try:
            return float(self.said[name].strip())
        except (KeyError, ValueError):
            return None

    def find(self, name: str, pattern: str) -> str | None:
        """The first group of a pattern in a file's or command's text."""
        found = re.search(pattern, self.said.get(name, ""), re.MULTILINE)
        return found[1] if found else None


def examine(facts: Facts) -> list[Finding]:
    """Everything that was found, the worst first."""
    checks = (*EVERYWHERE, *(MAC if facts.system == "Darwin" else LINUX))
    order = ("bad", "warning", "good")
    return sorted((f for check in checks for f in check(facts)), key=lambda f: order.index(f.level))


Check = Callable[[Facts], Iterator[Finding]]


def _versions(facts: Facts) -> Iterator[Finding]:
    wrong = False
    for name, (installed, wanted) in facts.versions.items():
        if installed != wanted:
            wrong = True
            got = f"{name} {installed}" if installed else f"no {name}"
            yield Finding(
                "bad",
                f"This program was made for {name} {wanted}, and here is {got}.",
                "Install it again: `pip install --upgrade --force-reinstall cenacle`.",
            )
    if facts.versions and not wrong:
        said = ", ".join(f"{name} {got}" for name, (got, _) in facts.versions.items())
        yield Finding("good", f"Versions are those that belong together: {said}.")


def _fast_synch(facts: Facts) -> Iterator[Finding]:
    if facts.env.get("MLX_METAL_FAST_SYNCH", "0") not in ("", "0"):
        yield Finding(
            "bad",
            "MLX_METAL_FAST_SYNCH is set: GPUs can lock up until a restart (mlx#3830, mlx#4005).",
            "Unset it, in your shell's settings too.",
        )


def _file_handles(facts: Facts) -> Iterator[Finding]:
    if facts.files < FEW_FILES:
        yield Finding(
            "warning",
            f"A process may open {facts.files} files; a busy server needs {FEW_FILES}.",
            "`ulimit -n 8192` before it is started, or LimitNOFILE in its service.",
        )


def _disk(facts: Facts) -> Iterator[Finding]:
    if facts.disk_free < LOW_DISK_BYTES:
        yield Finding(
            "warning",
            f"{format_bytes(facts.disk_free)} are free where weights are kept.",
            "Remove models that are not used, or set HF_HOME to a larger disk.",
        )


def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.skew_s is None:
        return
    if abs(facts.skew_s) > SKEW_S:
        way = "ahead of" if facts.skew_s > 0 else "behind"
        yield Finding(
            "bad",
            f"The head's clock is {abs(facts.skew_s):.0f} s {way} this machine's: certificates and "
            f"tokens will be refused.",
            "Let both set their clocks by the network (NTP).",
        )
    else:
        yield Finding("good", "The head answers, and its clock agrees with this one.")


def _link(name: str, wifi: bool, mtu: float | None, mbit: float | None) -> list[Finding]:
    """What is to be said of the interface on the way to the other nodes."""
    found = []
    if wifi:
        found.append(
            Finding(
                "bad",
                f"The way to the other nodes is Wi-Fi ({name}): its delays are milliseconds, and "
                f"a token needs an exchange for every layer.",
                "Connect a cable, and put its service above Wi-Fi in the network settings.",
            )
        )
    if mtu is not None and mtu < 1500:
        found.append(
            Finding(
                "warning",
                f"{name} sends packets of {mtu:.0f} bytes at most, less than Ethernet's 1500: a "
                f"VPN or a wrong setting.",
                "Set the MTU to 1500, or to 9000 on all nodes and the switch.",
            )
        )
    if mbit is not None and 0 < mbit < 1000:
        found.append(
            Finding(
                "bad",
                f"{name} runs at {mbit:.0f} Mbit/s: a bad cable or an old switch.",
                "Change the cable; a gigabit is the least that is of use.",
            )
        )
    if not found:
        rate = f", {mbit:.0f} Mbit/s" if mbit and mbit > 0 else ""
        size = f", MTU {mtu:.0f}" if mtu is not None else ""
        found.append(Finding("good", f"The way to the other nodes is {name}{rate}{size}."))
    return found


# ---- macOS ------------------------------------------------------------------------------------


def _wired(facts: Facts) -> Iterator[Finding]:
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
            f"The GPU may keep about 75 % of this Mac's {format_bytes(memory)}.",
            f"If a model needs more: `{setting}` lasts until the next restart.",
        )
    elif wired_limit_command(memory, limit * 2**20) is None:
        yield Finding(
            "bad",
            f"iogpu.wired_limit_mb leaves the system {format_bytes(memory - limit * 2**20)}: "
            f"too little, the Mac may freeze.",
            f"`sudo sysctl iogpu.wired_limit_mb={int(memory * 0.85 / 2**20)}`.",
        )
    else:
        yield Finding(
            "good", f"The GPU may keep {format_bytes(limit * 2**20)} of {format_bytes(memory)}."
        )


def _mac_memory(facts: Facts) -> Iterator[Finding]:
    free = facts.find("memory_pressure -Q", r"free percentage: (\d+)%")
    if free is not None and int(free) < 15:
        yield Finding(
            "bad" if int(free) < 5 else "warning",
            f"{free} % of memory is free.",
            "End other programs; the largest are in Activity Monitor under Memory.",
        )
    used = facts.find("sysctl -n vm.swapusage", r"used = ([\d.]+)M")
    if used is not None and float(used) > 1024:
        yield Finding(
            "warning",
            f"{format_bytes(float(used) * 2**20)} of memory were moved to disk.",
            "End other programs, or give this node less of the model (--node-weights).",
        )


def _mac_power(facts: Facts) -> Iterator[Finding]:
    limit = facts.find("pmset -g therm", r"CPU_Speed_Limit\s*=\s*(\d+)")
    level = facts.find("pmset -g therm", r"Thermal Warning Level\s*=\s*(\d+)")
    if (limit is not None and int(limit) < 100) or (level is not None and int(level) > 0):
        yield Finding(
            "warning",
            "This Mac is throttled because it is hot.",
            "Give it air; a cluster is as fast as its hottest node.",
        )
    if facts.find("pmset -g", r"^\s*lowpowermode\s+(1)"):
        yield Finding(
            "warning", "Low Power Mode is on.", "Turn it off: `sudo pmset -a lowpowermode 0`."
        )
    if "'Battery Power'" in facts.said.get("pmset -g batt", ""):
        yield Finding("warning", "This Mac runs on its battery.", "Plug it in.")
    asleep = facts.find("pmset -g", r"^\s*sleep\s+(\d+)")
    if asleep is not None and int(asleep) > 0:
        yield Finding(
            "warning",
            f"This Mac sleeps after {asleep} minutes without a person at it, and the group then "
            f"loses it.",
            "`sudo pmset -c sleep 0`.",
        )


def _rdma(facts: Facts) -> Iterator[Finding]:
    """Apple TN3205: RDMA over Thunderbolt needs macOS 26.2, Thunderbolt 5 and `rdma_ctl enable`."""
    thunderbolt_5 = "Thunderbolt 5" in facts.said.get("system_profiler SPThunderboltDataType", "")
    if not thunderbolt_5:
        return
    version = facts.said.get("sw_vers -productVersion", "").strip()
    numbers = tuple(int(n) for n in version.split(".")[:2] if n.isdigit())
    if numbers and numbers < (26, 2):
        yield Finding(
            "warning",
            f"macOS {version} has no RDMA over Thunderbolt, which this Mac's ports could do.",
            "Update to macOS 26.2 or later.",
        )
        return
    devices = re.findall(r"^\s+(rdma_\w+)", facts.said.get("ibv_devices", ""), re.MULTILINE)
    if not devices:
        yield Finding(
            "warning",
            "RDMA over Thunderbolt is off: exchanges take ten times as long over TCP.",
            "Restart into Recovery, open Terminal, run `rdma_ctl enable`, restart.",
        )
        return
    bridge = facts.said.get("ifconfig bridge0", "")
    if re.search(r"member: en", bridge) and "status: active" in bridge:
        yield Finding(
            "warning",
            "The Thunderbolt bridge is active: it takes the ports that RDMA is to use.",
            "System Settings, Network, Thunderbolt Bridge: make it inactive on every node.",
        )
    else:
        yield Finding("good", f"RDMA over Thunderbolt is on ({', '.join(devices)}).")


def _mac_link(facts: Facts) -> Iterator[Finding]:
    name = facts.find("route", r"interface: (\S+)")
    if name is None:
        return
    ports = facts.said.get("networksetup -listallhardwareports", "")
    port = re.search(rf"Hardware Port: ([^\n]+)\nDevice: {re.escape(name)}\n", ports)
    described = facts.said.get("ifconfig", "")
    mine = re.search(rf"^{re.escape(name)}: .*?(?=^\S|\Z)", described, re.MULTILINE | re.DOTALL)
    text = mine[0] if mine else ""
    mtu, media = re.search(r"mtu (\d+)", text), re.search(r"\((\d+)(G?)base", text, re.IGNORECASE)
    mbit = float(media[1]) * (1000 if media[2] else 1) if media else None
    title = f"{port[1]} ({name})" if port else name
    wifi = port is not None and port[1] in ("Wi-Fi", "AirPort")
    yield from _link(title, wifi, float(mtu[1]) if mtu else None, mbit)


def _mac_firewall(facts: Facts) -> Iterator[Finding]:
    tool = "/usr/libexec/ApplicationFirewall/socketfilterfw"
    if "block all" in facts.said.get(f"{tool} --getblockall", "").lower() and (
        "enabled" in facts.said[f"{tool} --getblockall"].lower()
    ):
        yield Finding(
            "bad",
            "The firewall blocks all incoming connections: other nodes cannot reach this one.",
            "System Settings, Network, Firewall, Options: allow incoming connections.",
        )
    elif re.search(r"State = [12]", facts.said.get(f"{tool} --getglobalstate", "")):
        yield Finding(
            "warning",
            "The firewall is on: macOS asks once whether Python may accept connections.",
            "Say yes, or add it in System Settings, Network, Firewall, Options.",
        )


# ---- Linux ------------------------------------------------------------------------------------


def _native(facts: Facts) -> Iterator[Finding]:
    if facts.native is not None:
        yield Finding(
            "warning",
            f"The kernels for CPUs are not there ({facts.native}): plain MLX is many times slower.",
            "Install a C++20 compiler and cmake, then install cenacle again.",
        )


def _linux_memory(facts: Facts) -> Iterator[Finding]:
    total = facts.find("/proc/meminfo", r"^MemTotal:\s+(\d+)")
    available = facts.find("/proc/meminfo", r"^MemAvailable:\s+(\d+)")
    if total and available and int(available) < 0.1 * int(total):
        of = f"{format_bytes(int(available) * 1024)} of {format_bytes(int(total) * 1024)}"
        yield Finding(
            "warning",
            f"{of} of memory are available.",
            "End other programs.",
        )
    waited = facts.find("/proc/pressure/memory", r"^some avg10=\S+ avg60=([\d.]+)")
    if waited is not None and float(waited) > MEMORY_PRESSURE_PERCENT:
        yield Finding(
            "bad",
            f"In {float(waited):.0f} % of the last minute a program waited for memory.",
            "End other programs, or give this node less of the model (--node-weights).",
        )


def _pages(facts: Facts) -> Iterator[Finding]:
    if "[never]" in facts.said.get("/sys/kernel/mm/transparent_hugepage/enabled", ""):
        yield Finding(
            "warning",
            "Large pages are off: reading weights takes a third longer.",
            "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`.",
        )


def _linux_power(facts: Facts) -> Iterator[Finding]:
    governor = facts.said.get("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "").strip()
    if governor == "powersave" and "/sys/devices/system/cpu/intel_pstate/status" not in facts.said:
        yield Finding(
            "warning",
            "The processor is kept slow (governor powersave).",
            "`sudo cpupower frequency-set -g performance`.",
        )
    throttled = facts.number("/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count")
    if throttled:
        yield Finding(
            "warning",
            f"The processor was throttled for heat {throttled:.0f} times since it was started.",
            "Look after its cooling; a cluster is as fast as its hottest node.",
        )


def _linux_clock(facts: Facts) -> Iterator[Finding]:
    if facts.said.get("timedatectl show -p NTPSynchronized --value", "").strip() == "no":
        yield Finding(
            "warning",
            "This machine's clock is not set by the network.",
            "`sudo timedatectl set-ntp true`.",
        )


def _linux_link(facts: Facts) -> Iterator[Finding]:
    name = facts.find("route", r"\bdev (\S+)")
    if name is None or name == "lo":
        return
    at = f"/sys/class/net/{name}"
    wifi = f"{at}/wireless" in facts.said
    yield from _link(name, wifi, facts.number(f"{at}/mtu"), facts.number(f"{at}/speed"))


def _linux_firewall(facts: Facts) -> Iterator[Finding]:
    if facts.said.get("ufw status", "").startswith("Status: active"):
        yield Finding(
            "warning",
            "The firewall (ufw) is on: other nodes may not reach this one.",
            "`sudo ufw allow from THEIR_NETWORK` for the nodes' own network.",
        )
    if facts.said.get("firewall-cmd --state", "").strip() == "running":
        yield Finding(
            "warning",
            "The firewall (firewalld) is on: other nodes may not reach this one.",
            "`sudo firewall-cmd --zone=trusted --add-source=THEIR_NETWORK`.",
        )


EVERYWHERE: tuple[Check, ...] = (_versions, _fast_synch, _file_handles, _disk, _clock)
MAC: tuple[Check, ...] = (_wired, _mac_memory, _mac_power, _rdma, _mac_link, _mac_firewall)
LINUX: tuple[Check, ...] = (
    *(_native, _linux_memory, _pages, _linux_power),
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
    "/proc/meminfo",
    "/proc/pressure/memory",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    "/sys/devices/system/cpu/intel_pstate/status",
    "/sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
)
_PINNED = ("mlx", "mlx-lm")


def gather(head: str | None = None) -> Facts:
    """Ask the system; some seconds at most for each tool.

    Args:
        head: the address of another node, "host" or "host:port" of its HTTP server; None: what is
            asked of the network is about the default route.
    """
    mac = platform.system() == "Darwin"
    said = {}
    for command in _MAC_TOOLS if mac else _LINUX_TOOLS:
        if (text := _run(command.split())) is not None:
            said[command] = text
    for path in () if mac else _LINUX_FILES:
        if (text := _read(path)) is not None:
            said[path] = text
    host = head.rpartition(":")[0] or head if head else None
    if mac:
        route = _run(["route", "-n", "get", host or "default"])
    else:
        route = (
            _run(["ip", "route", "get", host]) if host else _run(["ip", "route", "show", "default"])
        )
    if route is not None:
        said["route"] = route
        if (name := re.search(r"\bdev (\S+)", route)) and not mac:
            at = f"/sys/class/net/{name[1]}"
            said |= {p: t for p in (f"{at}/mtu", f"{at}/speed") if (t := _read(p)) is not None}
            if Path(f"{at}/wireless").exists():
                said[f"{at}/wireless"] = ""
    from .. import native  # loads MLX, which may be what is wrong

    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Facts(
        platform.system(),
        said,
        dict(os.environ),
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shutil.disk_usage(next(p for p in (home, *home.parents) if p.exists())).free,
        _installed(),
        native.unavailable_reason() or None,
        _skew_s(head) if head and ":" in head else None,
    )


def _run(command: list[str]) -> str | None:
    """What a tool prints; None where there is no such tool, or it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TOOL_DEADLINE_S,
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


def _installed() -> dict[str, tuple[str | None, str]]:
    """What this program's own metadata pins, and what is there."""
    found: dict[str, tuple[str | None, str]] = {}
    for line in metadata.requires("cenacle") or ():
        pinned = re.match(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", line)
        if pinned and pinned[1] in _PINNED and "extra ==" not in line:
            try:
                found[pinned[1]] = metadata.version(pinned[1]), pinned[2]
            except metadata.PackageNotFoundError:
                found[pinned[1]] = None, pinned[2]
    return found


def _skew_s(head: str) -> float | None:
    """Seconds by which the clock of an HTTP server is ahead of ours."""
    try:
        with urlopen(f"http://{head}/health", timeout=TOOL_DEADLINE_S) as answer:
            date = answer.headers["Date"]
    except HTTPError as error:
        date = error.headers["Date"]  # a server that is not well has a clock too
    except OSError:
        return None
    try:
        return parsedate_to_datetime(date).timestamp() - time.time() if date else None
    except ValueError:
        return None


__all__ = ["Facts", "Finding", "examine", "gather"]
