"""The mesh: every rank connected to every other, with a native all-reduce in the lazy graph.

Owns: `Mesh` and its settings.
Does not know: models, who started the ranks. The all-reduce itself is `native/mesh/links.cpp`.
Invariant: vectors are added in rank order, so every rank has the same bits; every wait has a
deadline, and the error names the rank. A digest of the routing travels in each message's header:
ranks that sent a token to different experts are named, and the step fails everywhere.
Next: `rendezvous.py`, the connections; `native/mesh/mesh.cpp`, the primitive;
`ranks/local_ranks.py`, which assigns addresses.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import mlx.core as mx

from ..errors import ClusterError
from .base import Collective, RoutingDecision
from .rendezvous import Rendezvous

ADDRESSES = "CENACLE_MESH"
SECRET = "CENACLE_MESH_SECRET"

COMM_DTYPES = ("f32", "bf16")
SCATTER_BYTES = 64 * 1024  # above it two hops were faster: benchmarks/all_reduce.py --variants


@dataclass(frozen=True)
class MeshConfig:
    """The group and the time limits of a mesh.

    Args:
        addresses: where each rank listens, in rank order: "unix:/path" or "host:port".
        secret: shared by the ranks of this group only.
        silence_s: limit without a sign of life from an awaited rank. Every rank sends twenty signs
            of life in that time, also while it computes.
        deadline_s: limit of the wait for a live rank, which may compute for minutes (a long prompt
            on a slow machine).
        handshake_s: limit for one connection's handshake.
        join_s: limit until all ranks are connected.
        scatter_bytes: with three or more ranks, larger vectors are sent by reduce-scatter and
            all-gather: two hops and fewer bytes.
        comm_dtype: how float32 vectors travel: "f32", or "bf16", half the bytes. With bf16 each
            rank's part is rounded (and the sum too, if it is scattered). Sums are computed in
            float32, and are the same on every rank, either way.
        spin_us: how long a wait polls before it sleeps. On two shared cores this only cost time
            (docs/devlog.md); it may pay where each rank has idle cores of its own.

    Raises:
        ClusterError: `comm_dtype` is not one of `COMM_DTYPES`.
    """

    addresses: Sequence[str]
    secret: bytes
    silence_s: float = 5.0
    deadline_s: float = 600.0
    handshake_s: float = 5.0
    join_s: float = 30.0
    scatter_bytes: int = SCATTER_BYTES
    comm_dtype: str = "f32"
    spin_us: float = 0.0

    def __post_init__(self) -> None:
        if self.comm_dtype not in COMM_DTYPES:
            raise ClusterError(
                f"comm_dtype: expected one of {', '.join(COMM_DTYPES)}, got {self.comm_dtype!r}"
            )


def unavailable_reason() -> str | None:
    """Why the mesh cannot be used in this process; None if it can."""
    try:
        _import_native()
    except ClusterError as error:
        return str(error)
    return None


def _import_native() -> ModuleType:
    # By name: type checkers do not see native modules. MLX first, whose library it is bound to.
    mlx_version = import_module("mlx.core").__version__
    try:
        native = import_module("cenacle._mesh")
    except ImportError as error:
        raise ClusterError(f"this installation has no native mesh ({error})") from error
    if mlx_version != native.MLX_VERSION:
        raise ClusterError(
            f"the native mesh was built for MLX {native.MLX_VERSION}, but MLX "
            f"{mlx_version} is installed; reinstall cenacle"
        )
    return native


class Mesh(Collective):
    """One rank's connections to all others.

    Raises:
        ClusterError: the extension is missing, or the group did not form; names the missing ranks.
    """

    def __init__(self, rank: int, config: MeshConfig) -> None:
        super().__init__()
        native = _import_native()
        self.rank, self.size = rank, len(config.addresses)
        rendezvous = Rendezvous(rank, config.addresses, config.secret, config.handshake_s)
        fds = [-1] * self.size
        for peer, sock in rendezvous.connect_all(config.join_s).items():
            sock.setblocking(False)
            fds[peer] = sock.detach()  # the native side closes it
        self._native: Any = native.Mesh(
            rank,
            fds,
            silence_s=config.silence_s,
            deadline_s=config.deadline_s,
            scatter_bytes=config.scatter_bytes,
            spin_us=config.spin_us,
            bf16_wire=config.comm_dtype == "bf16",
        )
        # Also at interpreter exit, where MLX waits for unfinished all-reduces.
        self._finish = weakref.finalize(self, self._native.close)

    @classmethod
    def from_environment(cls, rank: int, size: int, comm_dtype: str = "f32") -> Mesh:
        """The group that the environment variables `ADDRESSES` and `SECRET` describe.

        Raises:
            ClusterError: they are missing, or describe another number of ranks; or as the class.
        """
        try:
            addresses = json.loads(os.environ[ADDRESSES])
            secret = os.environ.pop(SECRET).encode()
        except (KeyError, ValueError) as error:
            raise ClusterError(
                f"the mesh needs {ADDRESSES} and {SECRET} in the environment ({error!r})"
            ) from error
        if len(addresses) != size:
            raise ClusterError(f"{ADDRESSES}: expected {size} addresses, got {len(addresses)}")
        return cls(rank, MeshConfig(addresses, secret, comm_dtype=comm_dtype))

    def _all_sum(self, x: mx.array, routing: RoutingDecision | None) -> mx.array:
        if self.size == 1 or x.size == 0:
            return x
        if routing is None:
            return self._native.all_sum(x)
        return self._native.all_sum(x, routing.ids, routing.layer)

    def raise_if_failed(self) -> None:
        """See `Collective`."""
        if (reason := self._native.failure()) is not None:
            raise ClusterError(reason)

    def close(self) -> None:
        """Leave the group; an all-reduce that waits ends with an error."""
        self._finish()
