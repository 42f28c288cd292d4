"""The program, or with --rank one of its measuring ranks, with less to measure.

What comes out has every part, and means nothing: short reads, few rounds, small matrices. The rows
of an ablation share their ranks, which each would start by itself.
"""

import functools
import sys
from pathlib import Path

from cenacle.bench import hardware_limits
from cenacle.calibration import probes, rank_worker
from cenacle.research import schedule_ablation

RANK = (sys.executable, str(Path(__file__).resolve()), "--rank")
probes.READ_MB = (1, 4)
probes.COLD_BYTES = 2_000_000
probes.KERNEL_SHAPES = {"attention 256x512": (256, 512), "head 2048x512": (2048, 512)}
probes.HIDDEN, probes.NARROW, probes.WIDE = 256, 64, 512
hardware_limits.READ_BYTES = 4 << 20
hardware_limits.ALL_REDUCE_S = 0.02
load_row = schedule_ablation.load_row


@functools.wraps(load_row)
def load_row_again(collective, **arguments) -> None:
    schedule_ablation._loaded.clear()
    load_row(collective, **arguments)


schedule_ablation.load_row = load_row_again


class SharedRanks:
    """One pool for all rows; closed with the program."""

    pool = None

    def __init__(self, *arguments) -> None:
        if SharedRanks.pool is None:
            SharedRanks.pool = rank_worker.RankPool(*arguments)

    def __enter__(self):
        return SharedRanks.pool

    def __exit__(self, *_) -> None:
        pass


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank_worker.main()
    rank_worker.PROGRAM = RANK
    schedule_ablation.RankPool = SharedRanks
    from cenacle.cli.main import main

    try:
        main()
    finally:
        if SharedRanks.pool is not None:
            SharedRanks.pool.__exit__(None, None, None)
