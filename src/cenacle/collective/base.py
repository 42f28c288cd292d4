"""The interface between ranks.

Owns: `Collective`, what the model and the engine may ask of the group, and its counters.
Does not know: models, requests, how ranks were started.
Invariant: every rank makes the same calls in the same order with equal shapes and dtypes, and
every rank receives the same bits.
Next: `alone.py` (one rank), `mlx.py` (mlx.distributed), `study.py` (counting and delaying).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx


@dataclass
class Traffic:
    """What a rank has put into exchanges so far: calls, and bytes of its own vectors."""

    calls: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class RoutingDecision:
    """The experts that this rank's router chose for each token, alike on every rank or wrong.

    Args:
        layer: index of the layer.
        ids: integers [..., k], lazy; the order within a token's k makes no difference.
    """

    layer: int
    ids: mx.array


class Collective(ABC):
    """A group of ranks. `rank` counts from 0 to `size` - 1."""

    rank: int
    size: int

    def __init__(self) -> None:
        self.traffic = Traffic()

    def all_sum(self, x: mx.array, chosen: RoutingDecision | None = None) -> mx.array:
        """The elementwise sum of every rank's `x`, the same bits on all of them; lazy.

        Args:
            x: this rank's part.
            chosen: the routing by which the parts were made. The mesh compares it between ranks
                (a digest rides along); MLX's collectives have no place for it and do not.

        Raises (when evaluated):
            RuntimeError: a peer was lost, or chose other experts; names the rank.
        """
        self.traffic.calls += 1
        self.traffic.bytes += x.nbytes
        return self._all_sum(x, chosen)

    @abstractmethod
    def _all_sum(self, x: mx.array, chosen: RoutingDecision | None) -> mx.array: ...

    def share(self, x: mx.array) -> mx.array:
        """Rank 0's integers `x` on every rank, inside the graph: the others add zeros.

        The zeros are made of the others' own `x`, so that they wait for it as rank 0's does: a sum
        that depends on nothing could be taken before one that rank 0 takes first.
        """
        return self.all_sum(x if self.rank == 0 else x * 0)

    def check(self) -> None:  # noqa: B027  (for MLX's own there is nothing to ask)
        """Raise if an exchange of this rank has failed: nothing that was computed since is right.

        To be called between reading a result and giving it away. MLX stores what a task of a CPU
        stream threw until the next wait on that stream, and one result that is ready before that
        looks like any other: with a lost peer, tokens of zeros have been seen.

        Raises:
            ClusterError: what the exchange said; names the rank.
        """

    def barrier(self) -> None:
        """Return when every rank has come here."""
        mx.eval(self.all_sum(mx.zeros(1)))

    def close(self) -> None:  # noqa: B027  (most ways to talk have nothing to close)
        """Give back sockets and threads."""
