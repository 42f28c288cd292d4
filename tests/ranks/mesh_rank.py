"""One rank of a mesh that executes orders, one line of JSON each; see `test_mesh.py`."""

import hashlib
import json
import sys
import time

import mlx.core as mx
import numpy as np

from cenacle.collective.base import RoutingDecision
from cenacle.collective.mesh import Mesh, MeshConfig


def vector(rank: int, dtype: str, size: int) -> mx.array:
    """A rank's vector; any rank can make any other's."""
    dice = np.random.default_rng([rank, size])
    if "int" in dtype:
        return mx.array(dice.integers(0, 2**31, size, dtype=np.int32)).astype(getattr(mx, dtype))
    x = dice.standard_normal(size).astype(np.float32) * 100
    return mx.array(x).astype(getattr(mx, dtype))


def reference(ranks: int, dtype: str, size: int, bf16_roundings: int = 0) -> np.ndarray:
    """The sum in rank order, slowly: the bits that every rank must get.

    `bf16_roundings`: of a float32 vector: 0, none; 1, each part; 2, the sum as well.
    """
    exact = np.uint32 if "int" in dtype else np.float32
    wide = mx.uint32 if "int" in dtype else mx.float32

    def part(rank: int) -> np.ndarray:
        x = vector(rank, dtype, size)
        x = x.astype(mx.bfloat16) if bf16_roundings else x
        return np.array(x.astype(wide)).astype(exact)

    total = part(0)
    for rank in range(1, ranks):
        total = total + part(rank)
    whole = mx.array(total)
    whole = whole.astype(mx.bfloat16) if bf16_roundings == 2 else whole
    return bits(whole.astype(getattr(mx, dtype)))


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint16 if x.itemsize == 2 else mx.uint32))


class Rank:
    def join(self, rank, addresses, secret, **arguments):
        self.mesh = Mesh(rank, MeshConfig(addresses, secret.encode(), **arguments))

    def sums(self, cases, bf16_roundings=0):
        """For each (dtype, size): whether the bits are the reference's, and their digest."""
        results = []
        for dtype, size in cases:
            own_bits = bits(self.mesh.all_sum(vector(self.mesh.rank, dtype, size)))
            correct = np.array_equal(
                own_bits, reference(self.mesh.size, dtype, size, bf16_roundings)
            )
            results.append([bool(correct), hashlib.sha256(own_bits.tobytes()).hexdigest()])
        return results

    def chain(self, links, size):
        """Each all-reduce needs the one before; half of them run while more are made."""
        x = mx.ones(size)
        for i in range(links):
            x = self.mesh.all_sum(x) / self.mesh.size + 1
            if i == links // 2:
                mx.async_eval(x)
        return x.min().item(), x.max().item()

    def strided(self):
        x = mx.arange(12).reshape(3, 4).T[1:]
        return self.mesh.all_sum(x).tolist()

    def independent(self):
        """Independent all-reduces, evaluated in another order on every rank."""
        sums = [self.mesh.all_sum(mx.full((5,), float(i))) for i in range(8)]
        for i in range(8) if self.mesh.rank % 2 else reversed(range(8)):
            mx.eval(sums[i])
        return [x[0].item() for x in sums]

    def compiled(self):
        f = mx.compile(lambda x: self.mesh.all_sum(x * 2) + 1)
        return [f(mx.full((3,), i)).tolist() for i in range(3)]

    def sum(self, dtype="float32", size=8, asynchronous=False):
        x = self.mesh.all_sum(mx.ones(size, getattr(mx, dtype)))
        if asynchronous:
            mx.async_eval(x)
        mx.eval(x)
        return x[0].item()

    def route(self, ids, dtype="uint32", transposed=False):
        """An all-reduce with the routing of layer 3."""
        ids = mx.array(ids, dtype=getattr(mx, dtype))
        routing = RoutingDecision(3, ids.swapaxes(0, 1) if transposed else ids)
        return self.mesh.all_sum(mx.ones(8), routing)[0].item()

    def raise_if_failed(self):
        self.mesh.raise_if_failed()

    def count(self):
        return (mx.ones(3) + 1).sum().item()

    def close(self):
        self.mesh.close()


def main() -> None:
    rank = Rank()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        began = time.monotonic()
        try:
            answer = {"value": getattr(rank, name)(**arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({**answer, "seconds": time.monotonic() - began}), flush=True)


main()
