"""What a rank reads and needs to load a format of each kind: its own part, and what the plan says.

Bytes are those of the system's calls, memory is what MLX and NumPy count: both are the same each
time. `benchmarks/load_bytes.py` does every format in processes, with the system's own numbers.
"""

import gc
import sys
import tracemalloc
from pathlib import Path

import mlx.core as mx
import pytest

from cenacle.core.plan import Plan
from cenacle.model.byte_ranges import ColumnRange, total_bytes
from cenacle.model.checkpoint import Checkpoint, locate_checkpoint
from cenacle.model.loader import load_rank_model
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.tensor_reader import BLOCK_BYTES, MIN_GAP_BYTES
from support.moe_gguf import write_moe
from support.quantized_checkpoints import write_large
from support.quantized_formats import FORMATS

KINDS = ("block-fp8", "channel-fp8", "nvfp4", "mxfp4", "int4-zeros", "int3", "int8", "awq", "gptq")
KINDS += ("gptq-act-order", "gguf-Q8_0", "gguf-Q5_K", "gguf-Q6_K")
PLACEMENTS = (("whole", 1), ("whole", 3), ("sliced", 3), ("replicated", 3))
WIDTH, HIDDEN, EXPERTS, LAYERS = 512, 768, 6, 2
# A block of rows, a chunk of decoded weights, headers, and Python's own objects.
CONSTANT_BYTES = BLOCK_BYTES + (5 << 20)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    patch = pytest.MonkeyPatch()
    patch.setenv("CENACLE_HOME", str(made / "home"))
    if request.param in FORMATS:
        sizes = {"width": WIDTH, "hidden": HIDDEN, "experts": EXPERTS, "layers": LAYERS}
        write_large(made / "model", FORMATS[request.param], group=128, **sizes)
        yield made / "model"
    else:
        (made / "model").mkdir()
        sizes = {"hidden_size": WIDTH, "moe_intermediate_size": HIDDEN, "intermediate_size": HIDDEN}
        sizes |= {"num_experts": EXPERTS, "num_hidden_layers": LAYERS, "head_dim": 64}
        write_moe(made / "model", "qwen3_moe", request.param.removeprefix("gguf-"), **sizes)
        yield locate_checkpoint(str(made / "model" / "model.gguf"))
    patch.undo()


def read_bytes() -> int:
    """That this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def gap_bytes(pieces) -> int:
    """Between columns of rows that are read whole: a disk reads its pages anyway."""
    listed = [r for piece in pieces for r in piece.byte_ranges(MIN_GAP_BYTES - 1)]
    columns = [r for r in listed if isinstance(r, ColumnRange)]
    return sum(r.stop - r.start - r.nbytes for r in columns)


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes with /proc")
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_a_rank_reads_its_part_and_needs_what_the_plan_says(folder):
    spec = read_model_spec(Checkpoint.open(folder))
    for placement, nodes in PLACEMENTS:
        plan = getattr(Plan, placement)(spec, nodes)
        rank = nodes // 2
        checkpoint = Checkpoint.open(folder)
        slices = slices_for(plan, rank, ModelLayout.read(checkpoint))
        listed = sum(map(total_bytes, required_ranges(slices).values()))
        gc.collect()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        tracemalloc.start()
        before = read_bytes()
        model = load_rank_model(checkpoint, plan, rank, lambda *_: None)
        read = read_bytes() - before
        needed = mx.get_peak_memory() - held + tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        loaded = mx.get_active_memory() - held
        del model
        planned = plan.bytes_of(rank)["total"]
        case = f"{placement} on {nodes}"
        assert read <= 1.05 * (listed + gap_bytes(slices.tensors)), case
        assert loaded <= planned + 4096, case
        assert needed <= planned + plan.loading_bytes_of(rank) + CONSTANT_BYTES, case
