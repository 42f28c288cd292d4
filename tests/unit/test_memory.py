"""The memory decision, with facts that Macs have reported. It was never run on Metal itself."""

import pytest

from cenacle import PlanError
from cenacle.core.model_spec import ModelSpec, MoELayer
from cenacle.core.plan import Plan
from cenacle.planning.memory import (
    WORKSPACE_BYTES,
    MemoryEstimate,
    check_available,
    kv_cache_bytes,
    wired_limit,
    wired_limit_command,
)

GIB = 2**30

# What mx.device_info() gave on Macs, as their owners wrote in public; shortened to what is read.
# "raised": with iogpu.wired_limit_mb set by the owner.
MACS = {
    "M4 Pro 48 GB": {
        "architecture": "applegpu_g16s",
        "memory_size": 51539607552,
        "max_recommended_working_set_size": 40200896512,
    },
    "M3 Ultra 256 GB": {
        "architecture": "applegpu_g15d",
        "memory_size": 274877906944,
        "max_recommended_working_set_size": 223338299392,
    },
    "64 GB": {"memory_size": 68719476736, "max_recommended_working_set_size": 55662788608},
    "M5 Max 64 GB, raised": {
        "architecture": "applegpu_g17s",
        "memory_size": 68719476736,
        "max_recommended_working_set_size": 60129542144,
    },
    "M5 Max 128 GB, raised": {
        "architecture": "applegpu_g17s",
        "memory_size": 137438953472,
        "max_recommended_working_set_size": 130566586368,
    },
    # The memory of this one was not in the report; its chip comes with this much.
    "M2 Ultra 192 GB, raised": {
        "architecture": "applegpu_g14d",
        "memory_size": 206158430208,
        "max_recommended_working_set_size": 188743680000,
    },
}


@pytest.mark.parametrize("facts", MACS.values(), ids=MACS)
def test_what_fits_is_wired_and_no_more(facts):
    allowed = facts["max_recommended_working_set_size"]
    small = MemoryEstimate(0, 20 * GIB, GIB)
    assert wired_limit(facts, small) == 21 * GIB + WORKSPACE_BYTES
    exact = MemoryEstimate(0, allowed - WORKSPACE_BYTES - 5, 5)
    assert wired_limit(facts, exact) == allowed
    assert (
        wired_limit(facts, MemoryEstimate(0, 10 * GIB, 0, neighbors=10 * GIB))
        == 10 * GIB + WORKSPACE_BYTES
    )
    with pytest.raises(PlanError, match=r"rank 1 needs .* but this machine wires at most"):
        wired_limit(facts, MemoryEstimate(1, allowed - WORKSPACE_BYTES, 1))


def test_the_setting_that_helps_is_named():
    with pytest.raises(PlanError) as error:
        wired_limit(MACS["M4 Pro 48 GB"], MemoryEstimate(1, 38 * GIB, GIB))
    assert str(error.value) == (
        "rank 1 needs 42.1 GB of memory (weights 40.8 GB, KV cache 1.07 GB, workspace 268.4 MB), "
        "but this machine wires at most 40.2 GB of its 51.5 GB; `sudo sysctl "
        "iogpu.wired_limit_mb=40192` raises the limit until the next restart, or use more nodes"
    )


@pytest.mark.parametrize(("facts", "most"), [("M4 Pro 48 GB", 44), ("M3 Ultra 256 GB", 240)])
def test_no_setting_takes_the_systems_own_memory(facts, most):
    with pytest.raises(PlanError, match="iogpu"):
        wired_limit(MACS[facts], MemoryEstimate(0, most * GIB - WORKSPACE_BYTES, 0))
    with pytest.raises(PlanError, match="use more nodes, other node weights or a lower") as error:
        wired_limit(MACS[facts], MemoryEstimate(0, most * GIB, 0))
    assert "iogpu" not in str(error.value)


def test_cache_is_what_one_request_keeps():
    kept = 12 * 2 * 4 * 128
    assert kv_cache_bytes(kept, 32768, None, None, 2) == 8192 * kept * 2
    assert kv_cache_bytes(kept, 2048, None, None, 4) == 2048 * kept * 4
    assert kv_cache_bytes(kept, None, 100, None, 2) == 100 * kept * 2
    assert kv_cache_bytes(kept, 32768, None, 4, 2) == 8192 * kept * 4.5 / 8


def test_linux_needs_room_for_all_its_ranks():
    estimate = MemoryEstimate(0, 11 * GIB - WORKSPACE_BYTES, 0, neighbors=11 * GIB)
    check_available(22 * GIB, estimate)
    with pytest.raises(PlanError, match=r"23\.6 GB are available on this machine: stop other"):
        check_available(22 * GIB, MemoryEstimate(0, 11 * GIB, 0, neighbors=11 * GIB))


def test_ranks_of_one_machine_count_their_neighbors():
    layer = MoELayer(0, experts=4, expert_bytes=100)
    spec = ModelSpec("mixtral", 1, (layer,), 2, 1000, 64, 10, "float32")
    plan = Plan.whole(spec, 2, (3, 1))
    need = MemoryEstimate.of_rank(plan, 1, kv_cache=700)
    assert (need.weights, need.unshared) == (1100, 1800 + WORKSPACE_BYTES)
    assert need.total == 1800 + 2000 + 2 * WORKSPACE_BYTES
    assert "KV cache 700 B" in str(need)


def test_loading_needs_room_for_a_layer_before_there_is_a_cache():
    layers = tuple(MoELayer(i, experts=4, expert_bytes=1000 + i) for i in range(3))
    spec = ModelSpec("mixtral", 3, layers, 2, 1000, 64, 10, "float32", embedding_bytes=2500)
    plan = Plan.whole(spec, 2, (3, 1))
    assert [plan.loading_bytes_of(rank) for rank in range(2)] == [3 * 1002, 2500]
    need = MemoryEstimate.of_rank(plan, 0, kv_cache=7)
    assert need.unshared == need.weights + 3006 + WORKSPACE_BYTES
    assert need.neighbors == 1000 + 3003 + 2500 + WORKSPACE_BYTES
    assert "loading them 3.01 KB" in str(need)


def test_a_mac_is_told_how_to_wire_more():
    memory = 512 * GIB
    assert wired_limit_command(memory, 450e9) == "sudo sysctl iogpu.wired_limit_mb=429154"
    assert wired_limit_command(memory, memory * 15 / 16) is not None
    assert wired_limit_command(memory, memory * 15 / 16 + 1) is None
    assert wired_limit_command(16 * 2**30, 12 * 2**30) is not None
    assert wired_limit_command(16 * 2**30, 12 * 2**30 + 1) is None
