"""A rank as any other, but what rank 1 computes of its experts is a tenth too large; its weights
were summed before."""

from cenacle.model import architecture, expert_parallel
from cenacle.ranks import worker

parallelize = expert_parallel.parallelize


def wrong(model, *arguments) -> None:
    if worker.rank_from_environment() == 1:
        for block in architecture.find_blocks(model):
            last = list(block.linears.values())[-1]
            last.weight = last.weight * 1.1
    parallelize(model, *arguments)


expert_parallel.parallelize = wrong
worker.main()
