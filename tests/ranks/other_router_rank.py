"""A rank as any other, but rank 1's router of layer 1 is not the others'; see `test_group`."""

import mlx.core as mx

from cenacle.model import expert_parallel
from cenacle.ranks import worker

parallelize = expert_parallel.parallelize


def perturbed(model, *arguments) -> None:
    if worker.rank_from_environment() == 1:
        gate = model.model.layers[1].block_sparse_moe.gate
        noise = mx.random.normal(gate.weight.shape, key=mx.random.key(1))
        gate.weight = gate.weight + noise * gate.weight.std() / 4
    parallelize(model, *arguments)


expert_parallel.parallelize = perturbed
worker.main()
