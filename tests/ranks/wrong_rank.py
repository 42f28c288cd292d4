"""A rank as any other, but what rank 1 computes of its experts is a tenth too large; its weights
were summed before."""

from cenacle.engine import worker
from cenacle.model import architecture, experts

parallelize = experts.parallelize


def wrong(model, *arguments) -> None:
    if worker.own_rank() == 1:
        for block in architecture.blocks(model):
            last = list(block.linears.values())[-1]
            last.weight = last.weight * 1.1
    parallelize(model, *arguments)


experts.parallelize = wrong
worker.main()
