"""Groups of mlx.distributed: ring (TCP), mpi, jaccl (RDMA over Thunderbolt), nccl (CUDA).

Only ring and mpi have been run; jaccl and nccl are passed to MLX by name. None of them carries
anything beside the vector, so routing decisions are not compared between ranks.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import ClusterError
from .base import Collective, RoutingDecision

BACKENDS = ("ring", "mpi", "jaccl", "nccl")


class Mlx(Collective):
    """A group made by `mx.distributed.init`.

    Args:
        backend: one of `BACKENDS`. Its environment variables (MLX_RANK, MLX_HOSTFILE, ...) must be
            set.
        size: expected number of ranks.

    Raises:
        ClusterError: the backend is not available, a peer is missing, or the group has another
            size.
    """

    def __init__(self, backend: str, size: int) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ClusterError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        try:
            self._group = mx.distributed.init(strict=True, backend=backend)
        except (RuntimeError, ValueError) as error:
            raise ClusterError(
                f"backend: this machine does not support {backend} ({error}); use another or auto"
            ) from error
        self.rank = self._group.rank()
        self.size = self._group.size()
        if self.size != size:
            raise ClusterError(
                f"the {backend} group has {self.size} ranks, expected {size}; "
                f"check how the processes were started"
            )

    def _all_sum(self, x: mx.array, routing: RoutingDecision | None) -> mx.array:  # noqa: ARG002
        return mx.distributed.all_sum(x, group=self._group)
