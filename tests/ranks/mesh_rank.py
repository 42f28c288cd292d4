"""One rank of a mesh that does what it is told, a line of JSON at a time; see `test_mesh.py`."""

import hashlib
import json
import sys
import time

import mlx.core as mx
import numpy as np

from cenacle.collective.base import RoutingDecision
from cenacle.collective.mesh import Mesh


def vector(rank: int, dtype: str, size: int) -> mx.array:
    """What a rank gives: any rank can make any other's."""
    dice = np.random.default_rng([rank, size])
    if "int" in dtype:
        return mx.array(dice.integers(0, 2**31, size, dtype=np.int32)).astype(getattr(mx, dtype))
    x = dice.standard_normal(size).astype(np.float32) * 100
    return mx.array(x).astype(getattr(mx, dtype))


def reference(ranks: int, dtype: str, size: int, narrow: int = 0) -> np.ndarray:
    """The sum in rank order, slowly: what every rank must get, as bits.

    `narrow`: how often a float32 vector is rounded to bfloat16: 1, each part; 2, the sum as well.
    """
    exact = np.uint32 if "int" in dtype else np.float32
    wide = mx.uint32 if "int" in dtype else mx.float32

    def part(rank: int) -> np.ndarray:
        x = vector(rank, dtype, size)
        x = x.astype(mx.bfloat16) if narrow else x
        return np.array(x.astype(wide)).astype(exact)

    total = part(0)
    for rank in range(1, ranks):
        total = total + part(rank)
    whole = mx.array(total)
    whole = whole.astype(mx.bfloat16) if narrow == 2 else whole
    return bits(whole.astype(getattr(mx, dtype)))


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint16 if x.itemsize == 2 else mx.uint32))


class Rank:
    def join(self, rank, addresses, secret, **arguments):
        self.mesh = Mesh(rank, addresses, secret.encode(), **arguments)

    def sums(self, cases, narrow=0):
        """For each (dtype, size): whether the bits are the reference's, and their digest."""
        found = []
        for dtype, size in cases:
            mine = bits(self.mesh.all_sum(vector(self.mesh.rank, dtype, size)))
            right = np.array_equal(mine, reference(self.mesh.size, dtype, size, narrow))
            found.append([bool(right), hashlib.sha256(mine.tobytes()).hexdigest()])
        return found

    def chain(self, links, size):
        """Each exchange needs the one before; half of them are under way while more are made."""
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
        """Exchanges that do not need one another, wanted in another order on every rank."""
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

    def route(self, ids, dtype="uint32", turned=False):
        """An exchange that says which experts were chosen, in layer 3."""
        ids = mx.array(ids, dtype=getattr(mx, dtype))
        chosen = RoutingDecision(3, ids.swapaxes(0, 1) if turned else ids)
        return self.mesh.all_sum(mx.ones(8), chosen)[0].item()

    def check(self):
        self.mesh.check()

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
