"""What running ranks keep in memory: weights, caches and a bounded rest."""

import sys
import time
from pathlib import Path

import psutil
import pytest

import cenacle
from cenacle import native
from cenacle.model.synth import synth
from cenacle.planning.memory import REST_BYTES
from cenacle.server.cluster_view import describe_memory

DEADLINE_S = 120
PROMPT_TOKENS = 1000


def resident_and_peak(pid):
    """Bytes of a process, now and at most, as Linux says."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return [1024 * int(sizes[name].split()[0]) for name in ("VmRSS", "VmHWM")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_weights_caches_and_a_bounded_rest(tmp_path):
    folder = synth(tmp_path / "tiny", family="qwen3_moe", quantize=4, group_size=32).path
    with cenacle.load(str(folder), 2, prefix_cache_gb=0.1) as model:
        model.generate([5] * PROMPT_TOKENS, 4)
        caches = model.group.cache_bytes
        assert caches >= PROMPT_TOKENS * model.ranks.ready[0].footprint.bytes_per_token
        ends_s = time.monotonic() + DEADLINE_S
        for rank, pid in enumerate(model.ranks.pids):
            weights = model.plan.bytes_of(rank)["total"]
            while True:
                resident, peak = resident_and_peak(pid)
                reported = model.group.heartbeats[rank].memory
                # What a prompt's activations took is given back, where the extension can.
                is_back = resident < peak or not native.is_available()
                if is_back and reported and abs(reported.resident_bytes - resident) < 10**6:
                    break
                assert time.monotonic() < ends_s, (rank, resident, peak, reported)
                time.sleep(0.1)
            memory = describe_memory(reported, weights, caches)
            assert resident < weights + caches + REST_BYTES
            assert memory["limit_bytes"] == weights + caches + REST_BYTES
            assert memory["rest_bytes"] == reported.resident_bytes - weights - caches
            assert memory["total_bytes"] == psutil.virtual_memory().total


def test_memory_that_was_not_reported_is_unknown():
    assert describe_memory(None, 1, 2) is None
