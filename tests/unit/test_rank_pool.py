"""Jobs of ranks: the front reads what all of them send, also while one takes long."""

import socket
import threading
from types import SimpleNamespace

import pytest

from cenacle.calibration.rank_worker import JobResult, RankPool
from cenacle.errors import InputError
from cenacle.ranks.channel import Channel
from cenacle.ranks.messages import Heartbeat, RankFailure

DEADLINE_S = 120.0
HEARTBEATS = 20_000  # more than a socket stores


@pytest.fixture
def pool_and_ranks():
    pairs = [socket.socketpair() for _ in range(2)]
    channels = [Channel(mine, DEADLINE_S) for mine, _ in pairs]

    def blame(rank, reason):
        return InputError(f"rank {rank} {reason}")

    pool = RankPool.__new__(RankPool)
    pool._ranks = SimpleNamespace(nodes=2, channels=channels, blame=blame)
    yield pool, [Channel(theirs, DEADLINE_S) for _, theirs in pairs]
    for sockets in pairs:
        for sock in sockets:
            sock.close()


def job(collective):
    """Never run: only its name is sent."""


def test_heartbeats_of_a_rank_are_read_while_another_still_works(pool_and_ranks):
    pool, (first, second) = pool_and_ranks

    def work():
        for _ in range(HEARTBEATS):
            second.send(Heartbeat(None).to_json())
        second.send(JobResult(2).to_json())
        first.send(JobResult(1).to_json())

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    assert pool.run(job, DEADLINE_S) == [1, 2]
    worker.join()


def test_the_first_failure_counts(pool_and_ranks):
    pool, (_, second) = pool_and_ranks
    second.send(RankFailure.of(0, InputError("no such size")).to_json())
    with pytest.raises(InputError, match=r"rank 1: .*no such size"):
        pool.run(job, DEADLINE_S)
