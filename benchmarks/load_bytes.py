"""What ranks read and need to load a model in any format: `python benchmarks/load_bytes.py`.

    python benchmarks/load_bytes.py [--format gptq --format gguf-Q4_K] [--group 128]

For each published format a model of some hundred MB is written, and loaded by one process, and by
three with whole experts, slices of every expert and replicas. Of each rank are shown, in parts of
what it holds (the trunk and its experts' bytes of the file):
  listed  what it would download,
  read    what it read (rchar of /proc/self/io: every read is a system call, nothing is mapped).
          Of rows with gaps of less than two pages between a rank's columns all is read; such gaps
          count as its own here,
and the growth of its memory's peak (VmHWM), in parts of the weights that the plan gives it and in
parts of what the plan says that loading needs: weights, and what is there beside them. The last
line of stdout is JSON; exit status 1 if something is more than 5 % too much, or the peak more than
5 % and 24 MB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from format_damage import GGUF_OF_BLOCKS, SAFETENSORS, write_gguf, write_mixed_bits

PLACEMENTS = (("whole", 1), ("whole", 3), ("sliced", 3), ("replicated", 3))
SIZES = {"width": 1024, "hidden": 3072, "experts": 6, "layers": 4}
READ_LIMIT, PEAK_LIMIT, PEAK_BYTES = 1.05, 1.05, 24 << 20


def write_model(folder: Path, name: str, group: int) -> None:
    from support.quantized_checkpoints import write_large
    from support.quantized_formats import FORMATS

    if name in FORMATS:
        write_large(folder, FORMATS[name], group=group, **SIZES)
        return
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), SIZES["width"])
    sizes |= {"moe_intermediate_size": SIZES["hidden"], "num_hidden_layers": SIZES["layers"]}
    sizes |= {"num_experts": SIZES["experts"], "num_experts_per_tok": 2, "head_dim": 64}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    if name == "mixed-bits":
        write_mixed_bits(folder, **sizes, mlp_only_layers=[])
    else:
        write_gguf(folder, name.removeprefix("gguf-"), **sizes)


def number(file: str, name: str) -> int:
    lines = Path(file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def gap_bytes(pieces: Any) -> int:
    """Between columns of rows that are read whole."""
    from cenacle.model.byte_ranges import ColumnRange
    from cenacle.model.tensor_reader import MIN_GAP_BYTES

    gaps = 0
    for piece in pieces:
        for found in piece.byte_ranges(MIN_GAP_BYTES - 1):
            if isinstance(found, ColumnRange):
                gaps += found.stop - found.start - found.nbytes
    return gaps


def load(folder: Path, rank: int, placement: str, nodes: int) -> dict[str, Any]:
    """What a rank reads and needs."""
    from cenacle.core.plan import Plan
    from cenacle.model.byte_ranges import total_bytes
    from cenacle.model.checkpoint import Checkpoint, locate_checkpoint
    from cenacle.model.loader import load_rank_model
    from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
    from cenacle.model.spec_reader import read_model_spec

    at = locate_checkpoint(str(folder))
    spec = read_model_spec(Checkpoint.open(at))
    plan = getattr(Plan, placement)(spec, nodes)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    before, held = number("/proc/self/io", "rchar"), number("/proc/self/status", "VmRSS")
    checkpoint = Checkpoint.open(at)
    model = load_rank_model(checkpoint, plan, rank, lambda *_: None)
    read = number("/proc/self/io", "rchar") - before
    grown = (number("/proc/self/status", "VmHWM") - held) << 10
    del model
    slices = slices_for(plan, rank, ModelLayout.read(checkpoint))
    listed = sum(map(total_bytes, required_ranges(slices).values()))
    needed = [t for n, t in checkpoint.tensors.items() if n not in checkpoint.quantized.ignored]
    experts = sum(t.stop - t.start for t in needed if is_expert(t.name))
    in_plan = plan.bytes_of(rank)
    share = in_plan["experts"] / spec.expert_bytes
    own = sum(t.stop - t.start for t in needed) - experts + experts * share
    stated = in_plan["total"] + plan.loading_bytes_of(rank)
    return {
        "own": own,
        "listed": listed / own,
        "read": read / (own + gap_bytes(slices.tensors)),
        "stated_bytes": stated,
        "grown": grown,
        "peak": grown / in_plan["total"],
        "of_stated": grown / stated,
    }


def is_expert(name: str) -> bool:
    return ".experts." in name or ".switch_mlp." in name


def measure(folder: Path, placement: str, nodes: int) -> list[dict[str, Any]]:
    """All ranks at once, a process each."""
    from cenacle.ranks.local_ranks import MALLOC_TUNABLES

    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", str(folder), str(rank), placement, str(nodes)],
            stdout=subprocess.PIPE,
            env=os.environ | {"GLIBC_TUNABLES": MALLOC_TUNABLES},
            text=True,
        )
        for rank in range(nodes)
    ]
    reports = []
    for rank in ranks:
        out, _ = rank.communicate()
        if rank.returncode:
            raise RuntimeError(f"{folder.name}: a rank ended with {rank.returncode}")
        reports.append(json.loads(out.splitlines()[-1]))
    return reports


def is_too_much(report: dict[str, Any]) -> bool:
    most = PEAK_LIMIT * report["stated_bytes"] + PEAK_BYTES
    return max(report["listed"], report["read"]) > READ_LIMIT or report["grown"] > most


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(load(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))))
        return
    names = (*SAFETENSORS, *GGUF_OF_BLOCKS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", action="append", choices=names, metavar="NAME")
    parser.add_argument("--group", type=int, default=128, help="of AWQ and GPTQ")
    args = parser.parse_args()
    worst, too_much = {}, 0
    print("| Format | Placement | Nodes | MB | Listed | Read | Peak | of stated |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.format or names:
        with tempfile.TemporaryDirectory(prefix="cenacle-load-") as made:
            os.environ["CENACLE_HOME"] = str(Path(made) / "home")
            write_model(Path(made) / name, name, args.group)
            reports = {(p, n): measure(Path(made) / name, p, n) for p, n in PLACEMENTS}
        for (placement, nodes), of in reports.items():
            too_much += sum(map(is_too_much, of))
            most = {key: max(r[key] for r in of) for key in ("listed", "read", "peak", "of_stated")}
            worst[f"{name} {placement} {nodes}"] = {k: round(v, 3) for k, v in most.items()}
            shown = " | ".join(f"{value:.3f}" for value in most.values())
            print(
                f"| {name} | {placement} | {nodes} | {of[0]['own'] / 1e6:.0f} | {shown} |",
                flush=True,
            )
    print(json.dumps({"formats": worst, "too_much": too_much}))
    sys.exit(1 if too_much else 0)


if __name__ == "__main__":
    main()
