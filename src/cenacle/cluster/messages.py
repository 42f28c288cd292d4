"""The messages of a cluster: between agents, the head, and the command line.

Owns: the fields of every message on the head's port, and of every order and its result.
Does not know: connections, or what the receiver does.
Invariant: see `message.Message`; versions are compared before anything else of a node is read, so
that another version is explained and not taken for a malformed message.
Next: `head_server.py` and `agent.py`, the two ends.

A connection opens with one of these, and goes on as follows:

    PairRequest   PairChallenge, PairProof, PairResult (see `security/pairing.py`)
    AgentHello    Welcome; then heartbeats both ways, Order and OrderResult, until either side ends
    RelayHello    Welcome; then the bytes of a rank's own messages
    FileRequest   FileList, FileData or RetryLater; then further requests
    Query         QueryResult

Instead of an answer the head may send a Rejection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from .. import net
from ..core.link import Link
from ..message import Count, Label, Message, MessageError, Port, Printable, Range, Seconds

R = TypeVar("R", bound=Message)
QueryName = Literal["status", "doctor", "invite", "revoke", "leave", "remove", "down"]
MAX_BYTES = 2**60
Bytes = Annotated[int, Range(0, MAX_BYTES)]
Positive = Annotated[float, Range(1e-12, 1e12)]
Rate = Annotated[float, Range(1e3, 1e18)]
"""Bytes per second. Decisions divide by it."""


class _Host:
    def check(self, value: Any, path: str) -> None:
        """Raise a `MessageError` for what no socket takes as a host."""
        if not net.is_host(value):
            raise MessageError(f"{path}: expected an address, got {value!r:.80}")


HostAddress = Annotated[str, _Host()]
Line = Annotated[str, Printable(4096)]
"""A path, or what becomes a variable of a process: both take no NUL."""

# ---- Opening a connection ---------------------------------------------------------------------


@dataclass(frozen=True)
class NodeInfo(Message):
    """What an agent reports about its node; see `node_info.py`.

    Args:
        cores: that this process may use; None: unknown.
        metal: `mx.device_info()` on Metal.
        thunderbolt: ports for RDMA, see `thunderbolt.Ports`.
        calibration: what `cenacle calibrate` measured, see `catalog`.
        kernels: which kernels compute on the CPU.
        read_bytes_per_s: measured rate of reading memory.
        mesh_unavailable_reason: why the node cannot use the mesh backend; None: it can.
    """

    system: Label
    macos: Label
    python: Label
    processor: Label
    cores: Count | None
    memory_bytes: Bytes
    available_bytes: Bytes
    gpu: bool
    metal: Mapping[Label, int | float | Label] | None
    cuda: bool
    thunderbolt: tuple[Mapping[Label, Label], ...]
    calibration: Mapping[Label, Positive]
    kernels: Label
    read_bytes_per_s: Rate
    mesh_unavailable_reason: Label | None

    def __post_init__(self) -> None:
        if self.metal is not None:
            name = "max_recommended_working_set_size"
            size = self.metal.get(name)
            if type(size) is not int or not 0 < size <= MAX_BYTES:
                raise MessageError(f"info.metal.{name}: expected bytes, got {size!r:.40}")


UNKNOWN_NODE = NodeInfo(
    system="",
    macos="",
    python="",
    processor="",
    cores=None,
    memory_bytes=0,
    available_bytes=0,
    gpu=False,
    metal=None,
    cuda=False,
    thunderbolt=(),
    calibration={},
    kernels="",
    read_bytes_per_s=1e9,
    mesh_unavailable_reason=None,
)
"""What is known of a node whose agent has not connected."""


@dataclass(frozen=True)
class PairRequest(Message, type="pair"):
    """A machine wants to join; the nonce is base64."""

    nonce: str


@dataclass(frozen=True)
class PairChallenge(Message, type="pair_challenge"):
    """The head's nonce, base64."""

    nonce: str


@dataclass(frozen=True)
class PairProof(Message, type="pair_proof"):
    """A `JoinRequest` as base64, and the proof that its sender knows the token."""

    payload: str
    proof: str


@dataclass(frozen=True)
class PairResult(Message, type="pair_result"):
    """A `JoinGrant` as base64, and the head's proof that it knows the token."""

    payload: str
    proof: str


@dataclass(frozen=True)
class JoinRequest(Message):
    """A certificate signing request (PEM) and the wanted name."""

    certificate_request: str
    name: str


@dataclass(frozen=True)
class JoinGrant(Message):
    """A certificate chain (PEM), and the id and name of the new node."""

    certificate: str
    id: str
    name: str


@dataclass(frozen=True)
class AgentHello(Message, type="agent"):
    """An agent reports for its node.

    Args:
        versions: see `membership.VERSIONS`.
        group_id: of the last group that it started a rank of.
        info: a `NodeInfo`, which another version may have other fields of.
    """

    versions: Mapping[Label, Label]
    group_id: Count
    info: Mapping[str, Any]


@dataclass(frozen=True)
class RelayHello(Message, type="relay"):
    """The connection of a rank, under the secret name of its `StartRank`."""

    name: str


@dataclass(frozen=True)
class FileRequest(Message, type="file_request"):
    """A node asks for files of the model: the list of all, or a byte range of one.

    Args:
        file: its name; None: the list.
        byte_range: see `byte_ranges.byte_range_from_json`.
    """

    file: str | None = None
    byte_range: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Query(Message, type="query"):
    """A question or command of the command line.

    Args:
        node: name or id of the node that `remove` concerns.
        token: that `revoke` concerns; "": all.
        remove_nodes: `revoke` also removes the nodes that joined with it.
    """

    name: QueryName
    node: str = ""
    token: str = ""
    remove_nodes: bool = False


# ---- Answers of the head ----------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome(Message, type="welcome"):
    """The connection is accepted; `name`: that of the node."""

    name: str = ""


@dataclass(frozen=True)
class Rejection(Message, type="rejected"):
    """The head refuses.

    Args:
        error: see `errors.error_from_json`.
        retry: the same may succeed later.
    """

    error: Mapping[str, Any]
    retry: bool = False


@dataclass(frozen=True)
class FileList(Message, type="file_list"):
    """Sizes of the model's files in bytes, by name."""

    files: Mapping[str, Count]


@dataclass(frozen=True)
class FileData(Message, type="file_data"):
    """The requested bytes follow; `sha256`: their checksum."""

    sha256: str


@dataclass(frozen=True)
class RetryLater(Message, type="retry_later"):
    """The head is downloading these bytes itself: ask again."""


@dataclass(frozen=True)
class QueryResult(Message, type="query_result"):
    """The answer to a `Query`: a JSON object."""

    result: Mapping[str, Any]


# ---- While an agent is connected --------------------------------------------------------------


@dataclass(frozen=True)
class Heartbeat(Message, type="heartbeat"):
    """The sender is alive; an agent now and then adds the memory available on its node."""

    available_bytes: Bytes | None = None


@dataclass(frozen=True)
class OrderRequest(Message, type="order"):
    """The head tells an agent to do something: one of `ORDERS`."""

    id: Count
    order: Mapping[str, Any]


@dataclass(frozen=True)
class OrderResult(Message, type="order_result"):
    """The result of an order, or the error (see `errors.error_from_json`)."""

    id: Count
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RankExited(Message, type="rank_exited"):
    """The process of a rank has failed; `reason` continues a sentence about it."""

    group_id: Count
    rank: Count
    pid: Count
    reason: str


@dataclass(frozen=True)
class Leaving(Message, type="leaving"):
    """The agent ends, as the head told it to."""


@dataclass(frozen=True)
class Shutdown(Message, type="shutdown"):
    """The agent shall end."""

    reason: str


# ---- Orders and their results -----------------------------------------------------------------


class Order(Message, Generic[R]):
    """An order to an agent; its `type` is its name, and `R` its result."""

    @classmethod
    def result_type(cls) -> type[Message]:
        """The class of the result."""
        (base,) = (b for b in cls.__orig_bases__ if get_args(b))  # type: ignore[attr-defined]
        result: type[Message] = get_args(base)[0]
        return result


@dataclass(frozen=True)
class Done(Message):
    """An order without further result was carried out."""


@dataclass(frozen=True)
class ModelLocation(Message):
    """Where a model is on a node, or where its part will be downloaded to.

    Args:
        complete: nothing needs to be downloaded.
    """

    folder: str
    complete: bool


@dataclass(frozen=True)
class FindModel(Order[ModelLocation], type="find_model"):
    """Look for a model.

    Args:
        model: as the head calls it.
        digest: `node_info.checkpoint_digest` of the head's checkpoint.
        config_sha256: of its config.json.
    """

    model: Line
    digest: Line
    config_sha256: Line


@dataclass(frozen=True)
class StartDownload(Order[Done], type="start_download"):
    """Start to download a part of a model; a download in progress is stopped.

    Args:
        order: a `DownloadOrder`.
    """

    model: Line
    folder: Line
    order: Mapping[str, Any]


@dataclass(frozen=True)
class DownloadProgress(Message):
    """How far a download is.

    Args:
        finished: it has ended, and the last two fields are set.
        done, total: bytes of the node's part that are there, and of all of it.
        digest: `node_info.checkpoint_digest` of the result.
        downloaded_bytes: that were not there before.
    """

    finished: bool
    done: Count
    total: Count
    folder: str
    digest: str = ""
    downloaded_bytes: Count = 0


@dataclass(frozen=True)
class WaitForDownload(Order[DownloadProgress], type="wait_for_download"):
    """Report how far the download is, after a second or when it has ended."""


@dataclass(frozen=True)
class Ports(Message):
    """Free ports."""

    ports: tuple[Port, ...]


@dataclass(frozen=True)
class FindPorts(Order[Ports], type="find_ports"):
    """Find free ports of an address."""

    address: HostAddress
    count: Annotated[int, Range(1, 64)]


@dataclass(frozen=True)
class ProbePort(Message):
    """The port on which a link probe is answered."""

    port: Port


@dataclass(frozen=True)
class ServeProbe(Order[ProbePort], type="serve_probe"):
    """Answer one link probe by whoever knows the secret (base64)."""

    address: HostAddress
    secret: str


@dataclass(frozen=True)
class ProbeLink(Order[Link], type="probe_link"):
    """Measure the link to the node that serves a probe there."""

    address: HostAddress
    port: Port
    secret: str


@dataclass(frozen=True)
class RankStarted(Message):
    """The process of a rank."""

    pid: Count


@dataclass(frozen=True)
class StartRank(Order[RankStarted], type="start_rank"):
    """Start a rank of a group.

    Args:
        epoch: see `ranks.Epoch`.
        addresses: HOST:PORT of every rank, for the backend.
        devices: of RDMA, see `thunderbolt.Devices`.
        secret: of the mesh.
        relay: name for `RelayHello`.
        token: by which the rank proves itself to the process that runs the group.
    """

    group_id: Count
    epoch: Count
    rank: Count
    backend: Line
    addresses: tuple[Line, ...]
    devices: tuple[tuple[str | None, ...], ...]
    secret: Line
    relay: Line
    token: Line


@dataclass(frozen=True)
class StopRanks(Order[Done], type="stop_ranks"):
    """End the ranks of a group, after they had this long to end by themselves."""

    group_id: Count
    timeout_s: Seconds


@dataclass(frozen=True)
class Finding(Message):
    """The result of one check of `cenacle doctor`.

    Args:
        level: "bad": it will not work or not last; "warning": slower or less reliable than
            necessary.
        message: a sentence.
        fix: what to do; empty if good.
    """

    level: Literal["bad", "warning", "good"]
    message: Annotated[str, Printable(4000)]
    fix: Annotated[str, Printable(4000)] = ""


@dataclass(frozen=True)
class Findings(Message):
    """What `cenacle doctor` found on a node."""

    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Diagnose(Order[Findings], type="diagnose"):
    """Run the checks of `cenacle doctor`; `now_s`: the head's clock."""

    now_s: float


ORDERS: tuple[type[Order[Any]], ...] = (
    *(FindModel, StartDownload, WaitForDownload, FindPorts, ServeProbe, ProbeLink),
    *(StartRank, StopRanks, Diagnose),
)
