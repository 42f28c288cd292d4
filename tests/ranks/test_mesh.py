"""The mesh between real processes: correct sums, one order, no endless wait."""

import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

from cenacle import ClusterError, net
from cenacle.collective import mesh, rendezvous
from cenacle.ranks import local_ranks

RANK = Path(__file__).parent / "mesh_rank.py"
SECRET = "open sesame"

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the native mesh is built on Linux only"
)
pytestmark = linux_only


class Process:
    """One rank; `start` sends it an order, `result` waits for the reply."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, str(RANK)], **pipes)
        self.pid = self._process.pid
        self._unanswered = 0

    def start(self, name: str, **arguments) -> None:
        print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)
        self._unanswered += 1

    def result(self, seconds: float = 30) -> dict:
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            assert waiting.select(seconds), f"nothing came within {seconds:g} s"
        answer = json.loads(self._process.stdout.readline())
        self._unanswered -= 1
        return answer

    def leaves_its_group(self) -> bool:
        """Whether it has left, so that it can join another."""
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "TZX" or self._unanswered:
            return False
        self.start("close")
        return "error" not in self.result()

    def end(self) -> None:
        self._process.kill()
        self._process.wait(120)
        self._process.stdin.close()
        self._process.stdout.close()


def ports(count: int) -> list[str]:
    return [f"127.0.0.1:{p}" for p in net.free_ports(count)]


@pytest.fixture(scope="module")
def idle():
    """Processes that are in no group: most of a short test is a process's start."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.end()


@pytest.fixture
def start(tmp_path, idle):
    """Takes or starts processes, by default joined into a group until the test ends."""
    running = []

    def group(ranks: int, kind: str = "unix", joined: bool = True, **arguments):
        some = [idle.pop() if idle else Process() for _ in range(ranks)]
        running.extend(some)
        where = ports(ranks) if kind == "tcp" else [f"unix:{tmp_path}/{r}" for r in range(ranks)]
        if joined:
            for rank, process in enumerate(some):
                process.start("join", rank=rank, addresses=where, secret=SECRET, **arguments)
            assert [p.result().get("error") for p in some] == [None] * ranks
        return some, where

    yield group
    for process in running:
        if process.leaves_its_group():
            idle.append(process)
        else:
            process.end()


def everywhere(processes: list[Process], name: str, **arguments) -> list:
    for process in processes:
        process.start(name, **arguments)
    results = [p.result(60) for p in processes]
    assert [r.get("error") for r in results] == [None] * len(processes)
    return [r["value"] for r in results]


DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32")
SIZES = (1, 2, 3, 1023, 6144, 65_537, 750_001)  # up to 3 MB; the last ones are scattered
CASES = [(d, s) for d in DTYPES for s in SIZES]


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [(1, "unix"), (2, "unix"), (3, "unix"), (4, "unix"), (2, "tcp"), (4, "tcp")],
)
def test_sums_are_the_reference_bit_for_bit(start, ranks, kind):
    processes, _ = start(ranks, kind)
    answers = everywhere(processes, "sums", cases=CASES)
    for case, *found in zip(CASES, *answers, strict=True):
        assert all(right for right, _ in found), f"{case}: not the sum in rank order"
        assert len({digest for _, digest in found}) == 1, f"{case}: ranks differ"


def test_every_size_can_be_scattered(start):
    """Fewer elements than ranks: some ranks add nothing."""
    processes, _ = start(4, scatter_bytes=0)
    cases = [("float32", s) for s in (1, 2, 3, 4, 5, 7, 1023)]
    for answers in everywhere(processes, "sums", cases=cases):
        assert all(right for right, _ in answers)


@pytest.mark.parametrize("spin_us", [0.0, 30.0])
@pytest.mark.parametrize("size", [1, 6144, 200_000])
def test_many_all_reduces_in_one_graph(start, size, spin_us):
    processes, _ = start(3, spin_us=spin_us)
    assert everywhere(processes, "chain", links=200, size=size) == [[201, 201]] * 3


def test_all_reduces_run_in_the_order_of_their_creation(start):
    processes, _ = start(2)
    assert everywhere(processes, "independent") == [[2.0 * i for i in range(8)]] * 2
    assert everywhere(processes, "compiled") == [[[4 * i + 1] * 3 for i in range(3)]] * 2
    assert everywhere(processes, "strided") == [[[2, 10, 18], [4, 12, 20], [6, 14, 22]]] * 2
    assert everywhere(processes, "sum") == [2] * 2


def test_ranks_out_of_step_name_what_they_expected(start):
    processes, _ = start(2)
    assert everywhere(processes, "sum") == [2, 2]
    processes[0].start("sum", size=10)
    processes[1].start("sum", size=6, dtype="int32")
    first, second = (p.result()["error"] for p in processes)
    assert first == (
        "RuntimeError: rank 1 is out of step: expected all-reduce 1 of 40 bytes of float32, "
        "got all-reduce 1 of 24 bytes of int32"
    )
    assert second.startswith("RuntimeError: rank 0 is out of step")
    # The same error from then on, and computing goes on.
    processes[0].start("sum")
    assert processes[0].result()["error"] == first
    assert everywhere(processes, "count") == [6, 6]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_killed_rank_is_named(start, kind, asynchronous):
    processes, _ = start(3, kind)
    assert everywhere(processes, "sum") == [3] * 3
    for process in processes[:2]:
        process.start("sum", asynchronous=asynchronous)
    time.sleep(0.1)
    os.kill(processes[2].pid, signal.SIGKILL)
    for process in processes[:2]:
        message = process.result(60)["error"]
        assert message.startswith("RuntimeError: rank 2 closed its connection")
        assert message.endswith("in all-reduce 1")
    assert everywhere(processes[:2], "count") == [6, 6]


@pytest.mark.parametrize("size", [8, 300_000])
def test_stopped_rank_is_named_within_the_deadline(start, size):
    processes, _ = start(3, silence_s=1)
    assert everywhere(processes, "sum") == [3] * 3
    os.kill(processes[2].pid, signal.SIGSTOP)
    for process in processes[:2]:
        process.start("sum", size=size)
    for process in processes[:2]:
        result = process.result(60)
        assert result["error"].startswith("RuntimeError: rank 2 sent nothing")
        assert result["error"].endswith("in all-reduce 1")
        assert 0.5 < result["seconds"] < 4
    os.kill(processes[2].pid, signal.SIGCONT)
    # It may find all it needs for that exchange; in the next it learns that it was given up.
    for _ in range(2):
        processes[2].start("sum", size=size)
        last = processes[2].result(60)
    assert "error" in last


def test_slow_rank_is_not_an_error(start):
    """A rank that computes sends signs of life, also for longer than `silence_s`."""
    processes, _ = start(3, silence_s=1)
    for process in processes[:2]:
        process.start("sum")
    time.sleep(2.5)
    processes[2].start("sum")
    assert [p.result()["value"] for p in processes] == [3, 3, 3]


def test_rank_that_lives_but_never_comes_is_named(start):
    processes, _ = start(2, silence_s=1, deadline_s=1.5)
    processes[0].start("sum")
    result = processes[0].result(60)
    assert result["error"] == "RuntimeError: rank 1 did not come within 1.5 s in all-reduce 0"
    assert 1 < result["seconds"] < 4


def test_default_deadline_is_five_seconds(start):
    processes, _ = start(2)
    os.kill(processes[1].pid, signal.SIGSTOP)
    processes[0].start("sum")
    result = processes[0].result(60)
    assert result["error"] == "RuntimeError: rank 1 sent nothing for 5 s in all-reduce 0"
    assert 4 < result["seconds"] < 6.5


def test_idle_ranks_do_not_fill_their_sockets(start):
    """500 signs of life, more than a Unix socket holds, between idle ranks."""
    processes, _ = start(2, silence_s=0.02, deadline_s=30)
    time.sleep(2)
    for process in processes:  # at such a pace a busy machine may look silent: then it says so
        process.start("sum")
    answers = [p.result() for p in processes]
    assert all(a.get("value") == 2 or "sent nothing for 0.02 s" in a["error"] for a in answers)


def frame(kind: int, number: int = 0, data: bytes = b"") -> bytes:
    """A message as in `native/mesh/links.h`: this is its wire format."""
    fourcc, version, float32, none = 0x4D434E43, 2, 1, -1
    if kind == ALIVE:
        return struct.pack("<IHBBQiIQ", fourcc, version, kind, 0, 0, 0, 0, 0)
    head = struct.pack("<IHBBQiIQ", fourcc, version, kind, float32, number, none, 0, len(data))
    return head + data


DIRECT, ALIVE = 1, 254


@pytest.mark.parametrize("piece", [1, 17, 32, 40, 63, 64, 100, 10_000])
def test_signs_of_life_are_not_data(tmp_path, piece):
    """Signs of life before a message are removed, however the bytes are split."""
    where = [f"unix:{tmp_path}/{r}" for r in range(2)]
    x = mx.arange(9, dtype=mx.float32)
    with ThreadPoolExecutor() as pool:
        connector = rendezvous.Rendezvous(1, where, SECRET.encode(), 5)
        sock = pool.submit(connector.connect_all, 10)
        real = mesh.Mesh(0, mesh.MeshConfig(where, SECRET.encode()))
        (peer,) = sock.result().values()
        data = b""
        for number in range(3):
            data += frame(ALIVE) * number + frame(DIRECT, number, bytes(memoryview(x * number)))
        sums = [real.all_sum(x) for _ in range(3)]
        mx.async_eval(sums)
        for at in range(0, len(data), piece):
            peer.sendall(data[at : at + piece])
            time.sleep(0.001)
        for number in range(3):
            assert sums[number].tolist() == (x * (number + 1)).tolist()
        peer.close()
        real.close()


@pytest.mark.parametrize(("ranks", "kind"), [(2, "unix"), (3, "tcp"), (4, "unix")])
def test_bf16_sums_are_the_reference_bit_for_bit(start, ranks, kind):
    processes, _ = start(ranks, kind, comm_dtype="bf16", scatter_bytes=2 * 6144)
    small, large = (("float32", s) for s in (6144, 100_001))
    for case, bf16_roundings in ((small, 1), (large, 1 if ranks == 2 else 2)):
        answers = everywhere(processes, "sums", cases=[case], bf16_roundings=bf16_roundings)
        assert [right for ((right, _),) in answers] == [True] * ranks
        assert len({digest for ((_, digest),) in answers}) == 1
    others = [(d, s) for d in ("bfloat16", "int32", "float16") for s in (3, 100_001)]
    assert all(right for some in everywhere(processes, "sums", cases=others) for right, _ in some)


def test_ranks_with_different_comm_dtypes_are_out_of_step(start):
    (one, two), where = start(2, joined=False)
    for rank, (process, comm_dtype) in enumerate(((one, "f32"), (two, "bf16"))):
        process.start("join", rank=rank, addresses=where, secret=SECRET, comm_dtype=comm_dtype)
    assert [p.result().get("error") for p in (one, two)] == [None, None]
    for process in (one, two):
        process.start("sum")
    assert (
        "expected all-reduce 0 of 32 bytes of float32, got all-reduce 0 of 16 bytes of float32 sent"
        in (one.result()["error"])
    )


IDS = [[1, 5, 2], [7, 0, 3]]


def test_same_routing_passes_in_any_order_and_layout(start):
    processes, _ = start(3)
    others = [{"ids": IDS}, {"ids": [[5, 2, 1], [0, 3, 7]], "dtype": "int32"}]
    others.append({"ids": [list(c) for c in zip(*IDS, strict=True)], "transposed": True})
    for process, arguments in zip(processes, others, strict=True):
        process.start("route", **arguments)
    assert [p.result().get("value") for p in processes] == [3, 3, 3]
    assert everywhere(processes, "route", ids=IDS, dtype="int64") == [3, 3, 3]


@pytest.mark.parametrize("scatter_bytes", [0, 1 << 20])
@pytest.mark.parametrize("ids", [[[1, 5, 4], [7, 0, 3]], [[7, 0, 3], [1, 5, 2]], [[1, 5, 2]]])
def test_a_routing_mismatch_is_named_on_every_rank(start, scatter_bytes, ids):
    """Another expert, the same experts for other tokens, other tokens."""
    processes, _ = start(3, scatter_bytes=scatter_bytes)
    assert everywhere(processes, "route", ids=IDS) == [3, 3, 3]
    assert everywhere(processes, "raise_if_failed") == [None] * 3
    for rank, process in enumerate(processes):
        process.start("route", ids=ids if rank == 1 else IDS)
    answers = [p.result() for p in processes]
    for answer in answers:
        assert answer["error"].startswith(
            "RuntimeError: rank 1 chose other experts than rank 0 for the same tokens in "
            "all-reduce 1, layer 3: "
        )
    processes[2].start("raise_if_failed")
    assert processes[2].result()["error"] == answers[2]["error"].replace("Runtime", "Cluster")
    processes[0].start("sum")  # nothing is served after it
    assert processes[0].result()["error"] == answers[0]["error"]


def test_close_ends_the_wait_of_the_others(start):
    processes, _ = start(2)
    processes[0].start("sum")
    time.sleep(0.1)
    processes[1].start("close")
    assert processes[1].result()["value"] is None
    assert processes[0].result(60)["error"] == (
        "RuntimeError: rank 1 closed its connection in all-reduce 0"
    )


def dial(address: str) -> socket.socket:
    host, port = address.split(":")
    ends = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=120)
        except ConnectionRefusedError:
            assert time.monotonic() < ends
            time.sleep(0.02)


def closed(sock: socket.socket) -> bool:
    try:
        while data := sock.recv(4096):
            assert len(data) < 100
        return True
    except ConnectionResetError:
        return True


def send_slowly(sock: socket.socket, data: bytes) -> None:
    for byte in data:
        sock.sendall(bytes([byte]))
        time.sleep(0.1)


def test_strangers_are_rejected_without_effect(start):
    (one, two), where = start(2, "tcp", joined=False)
    hello = rendezvous.HELLO.pack(
        rendezvous.MAGIC, rendezvous.VERSION, 2, 1, 0, b"n" * rendezvous.NONCE_BYTES
    )
    framed = struct.pack(">H", len(hello)) + hello
    openings = {
        "a web browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "zeros": bytes(1000),
        "noise": bytes(range(256)) * 40,
        "half a message": framed[:9],
        "nothing": b"",
        "a message of 65535 bytes": b"\xff\xff" + bytes(100),
        "one without the secret": framed + struct.pack(">H", 32) + b"x" * 32,
        "another version": framed.replace(rendezvous.MAGIC + b"\0\2", rendezvous.MAGIC + b"\0\1"),
    }
    strangers = {}
    arguments = {"addresses": where, "secret": SECRET}
    one.start("join", rank=0, handshake_s=1, **arguments)
    for name, data in openings.items():
        strangers[name] = dial(where[0])
        strangers[name].sendall(data)
    loris = dial(where[0])  # a byte now and then: it gets no more time for that
    with pytest.raises(ConnectionError):
        send_slowly(loris, framed)
    loris.close()
    for name, sock in strangers.items():
        assert closed(sock), name
        sock.close()
    waiting = [dial(where[0]) for _ in range(20)]  # and these are there when rank 1 comes
    two.start("join", rank=1, **arguments)
    assert [p.result().get("error") for p in (one, two)] == [None, None]
    assert everywhere([one, two], "sum") == [2, 2]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(tuple(where[0].split(":")), timeout=120)
    for sock in waiting:
        assert closed(sock)
        sock.close()


def test_many_silent_connections_do_not_keep_a_rank_out(start):
    """More silent connections than are pending at a time, each allowed to outlast the join."""
    (one, two), where = start(2, "tcp", joined=False)
    arguments = {"addresses": where, "secret": SECRET, "handshake_s": 60, "join_s": 5}
    one.start("join", rank=0, **arguments)
    crowd = [dial(where[0]) for _ in range(3 * rendezvous.MAX_PENDING)]
    two.start("join", rank=1, **arguments)
    assert [p.result().get("error") for p in (one, two)] == [None, None]
    assert everywhere([one, two], "sum") == [2, 2]
    for sock in crowd:
        assert closed(sock)
        sock.close()


def test_wrong_secret_is_rejected(start):
    (one, two, three), where = start(3, "unix", joined=False)
    where = where[:2]
    one.start("join", rank=0, addresses=where, secret=SECRET)
    three.start("join", rank=1, addresses=where, secret="guess")
    assert "rank 0 at" in (message := three.result()["error"])
    assert "does not have this group's secret" in message
    two.start("join", rank=1, addresses=where, secret=SECRET)
    assert [p.result().get("error") for p in (one, two)] == [None, None]
    assert everywhere([one, two], "sum") == [2, 2]
    assert not any(Path(a.removeprefix("unix:")).exists() for a in where)


def test_missing_rank_is_named(start):
    (one,), _ = start(1, joined=False)
    where = ports(3)
    one.start("join", rank=1, addresses=where, secret=SECRET, join_s=0.3)
    assert f"rank 0 at {where[0]}" in one.result()["error"]
    one.start("join", rank=0, addresses=where, secret=SECRET, join_s=0.3)
    assert "rank 0 did not hear from ranks [1, 2]" in one.result()["error"]


def test_invalid_addresses_are_refused():
    with pytest.raises(ClusterError, match="expected unix:/path or host:port"):
        mesh.Mesh(0, mesh.MeshConfig(["nowhere", "unix:/x"], b"s"))


def test_mesh_is_the_default():
    """A build that failed silently would fall back to the ring."""
    assert mesh.unavailable_reason() is None
    assert local_ranks.resolve_backend("auto", 2)[0] == "mesh"
    assert local_ranks.resolve_backend("ring", 2) == ("ring", None)


def test_a_build_for_another_mlx_is_reported(monkeypatch):
    monkeypatch.setattr(mx, "__version__", "0.99.0")
    assert "MLX 0.99.0 is installed; reinstall cenacle" in mesh.unavailable_reason()
    backend, reason = local_ranks.resolve_backend("auto", 2)
    assert backend == "ring"
    assert "MLX's ring, which is slower, because the native mesh was built for" in reason
    with pytest.raises(ClusterError, match="use --backend ring"):
        local_ranks.resolve_backend("mesh", 2)
