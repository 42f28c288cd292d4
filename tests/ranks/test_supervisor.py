"""A server that dies is started again on the same port; how it ends: test_cli.py."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from cenacle.server.supervisor import MAX_FAILURES, supervise
from support.http import HTTP
from support.serving import DEADLINE_S, QUESTION, RunningServer, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("supervised"), nodes=2) as running:
        yield running


def processes(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_server_that_dies_is_started_again(server, number):
    before, old = server.health(), processes(server.process.pid)
    assert len(old) >= 3  # the server and two ranks
    body = {"messages": QUESTION, "stream": True, "max_tokens": 2000, "ignore_eos": True}
    url = f"{server.url}/v1/chat/completions"
    with HTTP.stream("POST", url, json=body, timeout=DEADLINE_S) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(before["pid"], number)
        with pytest.raises(httpx.TransportError):  # the stream ends, and not as if complete
            for _ in lines:
                pass
    # A client that connects meanwhile waits.
    assert server.ask().json()["choices"][0]["message"]["content"] == "42"
    after = server.health()
    assert (after["status"], after["restarts"]) == ("ok", before["restarts"] + 1)
    assert number.name in after["restart_reason"]
    assert not any(is_alive(process) for process in old)
    assert len(processes(server.process.pid)) == len(old)
    assert "starting it again" in server.log.read_text()


SERVER = """
import asyncio, os, signal, sys, time
from cenacle.server.supervisor import SupervisedProcess
process = SupervisedProcess.from_environment()
if "refuses" in sys.argv:
    sys.exit(3)
async def answer():
    process.report_ready()
    if "hangs" in sys.argv:
        await asyncio.sleep(6)  # signs of life
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
if "dies" not in sys.argv:
    asyncio.run(answer())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("how", "status", "starts", "message"),
    [
        ("ready", 137, MAX_FAILURES, "giving up"),
        ("dies", 137, 1, "was killed by SIGKILL before it answered"),
        ("refuses", 3, 1, ""),
    ],
)
def test_a_server_that_keeps_dying_is_given_up(how, status, starts, message):
    reports: list[str] = []
    previous = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        sock = socket.create_server(("127.0.0.1", 0))
        assert supervise(sock, reports.append, [sys.executable, "-c", SERVER, how], 0.001) == status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert sum("starting it again" in report for report in reports) == starts - 1
    assert message in (reports or [""])[-1]
    assert sock.fileno() == -1


def test_a_server_that_hangs_is_started_again():
    reports: list[str] = []
    began = time.monotonic()

    def report(text: str) -> None:
        reports.append(text)
        if "restart 1" in text:  # while it hangs again, a wish to end is obeyed too
            threading.Timer(9, signal.raise_signal, [signal.SIGTERM]).start()

    previous = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        sock = socket.create_server(("127.0.0.1", 0))
        supervise(sock, report, [sys.executable, "-c", SERVER, "hangs"], 0.001, hang_s=5)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert sum("did not respond for 5 s" in text for text in reports) == 2
    assert sum("starting it again" in text for text in reports) == 1
    assert 6 + 5 < time.monotonic() - began < DEADLINE_S
