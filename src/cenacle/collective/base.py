"""The interface between ranks.

Owns: `Collective`, the communication that the model and the engine use, and its traffic counters.
Does not know: models, requests, how ranks are started.
Invariant: every rank makes the same calls in the same order with equal shapes and dtypes, and
every rank receives the same bits.
Next: `single.py` (one rank), `mesh.py`, `mlx.py` (mlx.distributed), `delayed.py` (for studies).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mlx.core as mx


@dataclass
class Traffic:
    """All-reduces of this rank so far, and the bytes of its own vectors in them."""

    calls: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class RoutingDecision:
    """The experts that this rank's router chose for each token; the same on every rank.

    Args:
        layer: index of the layer.
        ids: integers [..., k], lazy; the order within a token's k does not matter.
    """

    layer: int
    ids: mx.array


class Collective(ABC):
    """A group of ranks. `rank` counts from 0 to `size` - 1."""

    rank: int
    size: int

    def __init__(self) -> None:
        self.traffic = Traffic()

    def all_sum(self, x: mx.array, routing: RoutingDecision | None = None) -> mx.array:
        """The elementwise sum of every rank's `x`, bit-identical on all of them; lazy.

        Args:
            x: this rank's part.
            routing: the routing that produced it. The mesh sends a digest along and compares it
                between ranks; MLX's own collectives cannot.

        Raises (when evaluated):
            RuntimeError: a peer was lost or chose other experts; names the rank.
        """
        self.traffic.calls += 1
        self.traffic.bytes += x.nbytes
        return self._all_sum(x, routing)

    @abstractmethod
    def _all_sum(self, x: mx.array, routing: RoutingDecision | None) -> mx.array: ...

    def broadcast_from(self, source: int, x: mx.array) -> mx.array:
        """Rank `source`'s integers `x` on every rank, as an all-reduce in the graph.

        The others add zeros made of their own `x`, so that they wait for it as the source does. A
        sum of constants could run before an all-reduce that the source does first.
        """
        return self.all_sum(x if self.rank == source else x * 0)

    def raise_if_failed(self) -> None:  # noqa: B027  (MLX's own collectives cannot tell)
        """Raise if an all-reduce of this rank has failed: all results since are wrong.

        Call it between reading a result and using it. MLX keeps an exception of a CPU stream until
        the next wait on that stream. A result that is ready before then looks valid: with a lost
        peer, tokens of zeros were observed.

        Raises:
            ClusterError: the reason; names the rank.
        """

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        mx.eval(self.all_sum(mx.zeros(1)))

    def close(self) -> None:  # noqa: B027  (most implementations have nothing to close)
        """Release sockets and threads."""
