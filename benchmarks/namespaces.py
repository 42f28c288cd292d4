"""Hosts for tests and benchmarks: network namespaces on a bridge, each with an address and a home.

The bridge is in a namespace of its own, so that outside only the names in /run/netns are visible.
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

CENACLE = str(Path(sys.executable).parent / "cenacle")
CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
T = TypeVar("T")


def unavailable_reason() -> str | None:
    """Why hosts cannot be created here; None: they can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux and the program ip (iproute2)"
    name = f"cn{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"this process may not make network namespaces: {made.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


class Host:
    """A host: programs run and sockets are created in its namespace."""

    def __init__(self, network: "Network", letter: str, number: int, folder: Path) -> None:
        self.name, self.address = f"{network.name}-{letter}", f"10.99.0.{number}"
        self.letter, self.port = letter, f"p{letter}"
        self.folder = folder / letter
        self.folder.mkdir()
        self.temporary_dir.mkdir()
        self.programs: list[subprocess.Popen[bytes]] = []
        self.extra_env: dict[str, str] = {}  # environment
        ip("netns", "add", self.name)
        near = ("-n", network.switch)
        ip(*near, "link", "add", self.port, "type", "veth", "peer", "eth0", "netns", self.name)
        ip(*near, "link", "set", self.port, "master", "br0", "up")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.name, "link", "set", "eth0", "up")
        ip("-n", self.name, "link", "set", "lo", "up")

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def temporary_dir(self) -> Path:
        """TMPDIR of its programs."""
        return self.folder / "tmp"

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CENACLE_", "XDG_"))}
        own = {"HOME": str(self.folder), "TMPDIR": str(self.temporary_dir), "CENACLE_THREADS": "1"}
        return kept | own | self.extra_env

    def start(self, *words: str, **more: str) -> "subprocess.Popen[bytes]":
        """Start `cenacle` on this host, with its output in the log.

        `more`: environment variables.
        """
        with self.log.open("ab") as log:
            program = subprocess.Popen(
                ["ip", "netns", "exec", self.name, CENACLE, *words],
                env=self.environment | more,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.programs.append(program)
        return program

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run `cenacle` on this host until it ends."""
        return subprocess.run(
            ["ip", "netns", "exec", self.name, CENACLE, *words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,  # also on a busy machine
        )

    def pids(self, pattern: str = "") -> list[int]:
        """Processes of this host whose command line contains this text."""
        found = []
        for pid in map(int, ip("netns", "pids", self.name).split()):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command and pattern in command:
                    found.append(pid)
        return found

    def kill(self, pattern: str = "") -> list[int]:
        """Send SIGKILL to these processes; returns their ids."""
        killed = self.pids(pattern)
        for pid in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for program in self.programs:
            if program.pid in killed:
                program.wait(10)
        return killed

    def connect(self, address: str, port: int) -> socket.socket:
        """A connection from this host."""
        return run_in_namespace(
            self.name, lambda: socket.create_connection((address, port), timeout=60)
        )

    def listening(self) -> list[tuple[str, int]]:
        """Addresses on which programs of this host listen (TCP over IPv4)."""
        found = []
        table = run_in_namespace(self.name, Path("/proc/thread-self/net/tcp").read_text)
        for line in table.splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                address, port = local.split(":")
                packed = bytes.fromhex(address)[::-1]
                found.append((socket.inet_ntoa(packed), int(port, 16)))
        return found


class Network:
    """Hosts on one bridge; `close` removes them with all their programs."""

    def __init__(self, letters: str, folder: Path) -> None:
        self.name = f"cn{secrets.token_hex(3)}"
        self.switch = f"{self.name}-sw"
        self.hosts: list[Host] = []
        ip("netns", "add", self.switch)
        try:
            ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
            ip("-n", self.switch, "link", "set", "br0", "up")
            for number, letter in enumerate(letters, 1):
                self.hosts.append(Host(self, letter, number, folder))
        except BaseException:
            self.close()
            raise

    def link(self, host: Host, state: str) -> None:
        """Unplug a host's cable ("down") or plug it in ("up")."""
        ip("-n", self.switch, "link", "set", host.port, state)

    def close(self) -> None:
        for host in self.hosts:
            with contextlib.suppress(AssertionError):
                host.kill()
            for program in host.programs:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(5)
        for name in [*(h.name for h in self.hosts), self.switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def enter_namespace(name: str) -> None:
    """Move the calling thread into a namespace for good; its new sockets are created there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{name}").open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def run_in_namespace(name: str, work: Callable[[], T]) -> T:
    """Run `work` in a thread in this namespace; its sockets stay there."""
    result: list = []

    def go() -> None:
        try:
            enter_namespace(name)
            result.append(work())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


class Capture:
    """Every frame on the bridge's ports, as bytes."""

    def __init__(self, network: Network) -> None:
        def listen() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
            return sock

        self._sock = run_in_namespace(network.switch, listen)
        self._sock.settimeout(0.2)
        self.frames: list[bytes] = []
        self._ended = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._ended:
            with contextlib.suppress(TimeoutError):
                self.frames.append(self._sock.recv(1 << 17))

    def payloads(self, port: int | None = None) -> bytes:
        """Concatenated payloads of TCP segments, from or to one port or all."""
        found = []
        for frame in list(self.frames):
            if frame[12:14] != b"\x08\x00" or frame[23] != 6:
                continue
            segment = frame[14 + 4 * (frame[14] & 15) :]
            ports = (int.from_bytes(segment[:2]), int.from_bytes(segment[2:4]))
            if port is None or port in ports:
                found.append(segment[4 * (segment[12] >> 4) :])
        return b"".join(found)

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._sock.close()


def wait_until(condition: Callable[[], T], what: str, seconds: float = 30.0) -> T:
    """Wait for a condition and return its value; fail with `what` after some seconds."""
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return found


def exit_on_sigterm() -> None:
    """Make SIGTERM raise SystemExit, so that hosts are removed."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # hosts are being removed already
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
