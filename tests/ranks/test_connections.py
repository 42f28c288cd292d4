"""Idle connections do not keep others from being answered."""

import contextlib
import resource
import socket
import subprocess
import sys
import time

import pytest

from support.serving import DEADLINE_S, running_server

IDLE = 2300
LIMITS = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
import cenacle
import mlx_lm.utils
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit, limit)
"""


@pytest.mark.parametrize("limit", [1000, 5000])
def test_the_limit_of_open_files_stays(limit):
    done = subprocess.run(
        [sys.executable, "-c", LIMITS, str(limit)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_thousands_of_idle_connections_leave_the_others_alone(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 10_000), hard))
    with running_server(tmp_path) as server, contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        port = int(server.url.rpartition(":")[2])
        for _ in range(IDLE):
            opened.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
        began = time.monotonic()
        assert server.ask().json()["choices"][0]["message"]["content"] == "42"
        assert server.health()["status"] == "ok"
        assert time.monotonic() - began < 25  # it was 30 s, when idle ones timed out
        assert server.log.stat().st_size < 20_000, server.log.read_text()[:2000]
