"""The commands of a cluster: `cenacle up`, `join`, `nodes`, `status`, `leave`, `down`.

Owns: their options and output; the order in which a head is started and stopped.
Does not know: how nodes are connected and ranks placed (`cluster`).
Next: `inference.py` has `serve`, for one machine.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from .. import net, paths
from ..core.units import format_bytes
from ..errors import CenacleError, ClusterError, InputError
from ..logs import LogFormat, configure_logging
from .command import command, option
from .console import print_json, report, stderr_console, wide_console
from .early_checks import check_model
from .inference import (
    Endpoint,
    greet,
    import_server,
    load_model,
    open_server,
    read_models,
    use_log_format,
)
from .options import (
    JsonOutput,
    ModelsArguments,
    ServerArguments,
    ServingArguments,
    execution_option,
    parse_duration,
    placement_option,
)

if TYPE_CHECKING:
    from ..cluster.head import Head
    from ..cluster.hostsfile import Host
    from ..cluster.messages import QueryName
    from ..cluster.security.identity import Identity

app = typer.Typer()
PANEL = "Cluster"
AGENT_STOP_S = 10.0

NAME_HELP = "Name of this machine in the cluster. Default: its host name."


@dataclass(frozen=True)
class ClusterLoadArguments(ServingArguments):
    """`ServingArguments` for the nodes of a cluster."""

    nodes: int = placement_option(
        0,
        "Number of nodes; 0: every node that has joined before, at least 2.",
        "--nodes",
        "-n",
        min=0,
    )
    backend: Literal["auto", "mesh", "ring", "jaccl", "nccl"] = execution_option(
        "auto",
        "Backend of the all-reduce between nodes: auto, mesh, ring, jaccl or nccl.",
        metavar="NAME",
    )
    verify: bool | None = execution_option(
        None,
        "Verify weights, answers and links before serving. Default: if this placement has not been "
        "verified on these nodes.",
    )

    def to_keywords(self) -> dict[str, Any]:
        """See `PlacementArguments`."""
        return {**super().to_keywords(), "verify": self.verify}


@dataclass(frozen=True)
class HeadArguments:
    """How nodes find and join the head."""

    listen: str = option("0.0.0.0:4747", "Address on which nodes join.", metavar="HOST:PORT")
    name: str | None = option(None, NAME_HELP)
    hosts: Path | None = option(
        None, "Hosts file of mlx.launch: the nodes to expect, and the addresses to use."
    )
    mdns: bool = option(True, "Announce the head by mDNS.")
    token_minutes: float = option(60.0, "Minutes for which the printed token is valid.", min=0.01)
    node_timeout: str | None = option(
        None,
        "Time to wait at the start for missing nodes, such as 30m (s, m, h, d); never: no limit. "
        "Default: 1d, or 10s with several models, because a request waits meanwhile.",
        metavar="TIME",
    )

    def wait_s(self, default_s: float) -> float | None:
        """Seconds of `node_timeout`; None: without end.

        Raises:
            InputError: it is no time.
        """
        if self.node_timeout is None:
            return default_s
        return parse_duration(self.node_timeout, "node-timeout")


@dataclass(frozen=True)
class JoinArguments:
    """Which cluster to join, and as what."""

    token: str | None = option(None, "Token that `cenacle up` printed.")
    models: Path | None = option(None, "Folder with models on this machine, if it has one.")
    name: str | None = option(None, NAME_HELP)
    cluster: str | None = option(
        None, "Cluster to join, by the host name of its head, if several are found."
    )
    mdns: bool = option(True, "Find the head by mDNS.")
    service: bool = option(
        False, "Only write a service that joins when the machine starts.", "--service"
    )


@command(app, example="cenacle up org/model -n 3", panel=PANEL)
def up(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model folder, Hugging Face repository (org/model), or demo. "
            "Several may be given; the cluster loads one at a time.",
            show_default=False,
        ),
    ] = None,
    *,
    head: HeadArguments,
    models: ModelsArguments,
    server: ServerArguments,
    load: ClusterLoadArguments,
) -> None:
    """Start a cluster on this machine and serve models from all nodes that join."""
    given = [check_model(name) for name in model or ()]
    use_log_format(server.log_format)
    from ..cluster.client import read_address
    from ..cluster.formation import AGENTS_WAIT_S, FIRST_GROUP_WAIT_S

    is_pool = models.is_pool(given)
    wait_s = head.wait_s(AGENTS_WAIT_S if is_pool else FIRST_GROUP_WAIT_S)

    address, port = read_address(head.listen)
    expected = _read_hosts(head.hosts)
    with open_server(server) as endpoint:  # a port in use is found before anything is started
        from ..cluster.head import Head

        started = Head(
            paths.cluster_dir(),
            address,
            port,
            head.name or socket.gethostname(),
            60 * head.token_minutes,
        )
        with _closing(started):
            own_address = expected[0].ips[0] if expected else address
            for command_line in _join_commands(own_address, started.port, started.invite()):
                report(command_line)
            with _announced(started, address if head.mdns else None), _local_agent(started):
                _serve_cluster(
                    given, models if is_pool else None, load, started, expected, endpoint, wait_s
                )


def _serve_cluster(
    given: list[str],
    models: ModelsArguments | None,
    load: ClusterLoadArguments,
    head: Head,
    expected: tuple[Host, ...],
    endpoint: Endpoint,
    wait_s: float | None,
) -> None:
    from ..cluster.formation import Cluster

    reported = ""

    def on_waiting(message: str) -> None:
        nonlocal reported
        head.set_status(waiting=message)
        if message != reported:  # later tries wait for the same nodes
            _report_event(message)
        reported = message

    def on_started(url: str) -> None:
        head.set_status(url=url)
        _report_event(f"serving {loaded.name} on {loaded.plan.nodes} nodes at {url}")
        greet(loaded, url, endpoint)

    def on_pool_started(url: str) -> None:
        head.set_status(url=url)
        _report_event(f"serving {several.title} at {url}, one at a time")

    waits: dict[str, Any] = {"wait_s": wait_s}
    if models is None:
        waits["while_waiting"] = endpoint.refuse
    cluster = Cluster(head, load.nodes or len(expected), on_waiting, expected, **waits)
    if models is not None:
        several = read_models(given, models, load, endpoint.model_names, on_cluster=True)
        endpoint.serve_models(
            several, on_pool_started, cluster, lambda model: head.set_status(model=model.name)
        )
        return
    (model,) = given
    head.set_status(model=Path(model).name)
    with load_model(
        model, load, cluster=cluster, on_message=_report_event, while_loading=import_server
    ) as loaded:
        endpoint.serve(loaded, on_started)


def _read_hosts(file: Path | None) -> tuple[Host, ...]:
    """The hosts of a hosts file, of which this machine must be the first."""
    from ..cluster import hostsfile

    if file is None:
        return ()
    hosts = hostsfile.read(file)
    hostsfile.check_local_host(hosts, net.local_addresses())
    return hosts


@contextmanager
def _announced(head: Head, address: str | None) -> Iterator[None]:
    """Announce the head by mDNS while it listens on `address`; None: do not."""
    if address is None:
        yield
        return
    from ..cluster.discovery import HeadAnnouncement

    any_address = address in ("0.0.0.0", "::")
    announcement = HeadAnnouncement(
        head.identity.load_settings()["name"],
        net.local_addresses() if any_address else [address],
        head.port,
        lambda reason: report(f"this head cannot be found by mDNS: {reason}"),
    )
    try:
        yield
    finally:
        announcement.close()


@contextmanager
def _closing(head: Head) -> Iterator[None]:
    """Close the head at the end; `cenacle down` ends this program by SIGTERM."""
    head.on_shutdown = lambda: os.kill(os.getpid(), signal.SIGTERM)
    try:
        yield
    except (SystemExit, ClusterError):
        if not head.shutdown_requested.is_set():
            raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the program is ending already
        head.close(end_agents=head.shutdown_requested.is_set())


@contextmanager
def _local_agent(head: Head) -> Iterator[None]:
    """Run an agent in a thread: the machine of the head is a node like any other."""
    import asyncio

    from ..cluster.agent import Agent

    agent = Agent(head.identity, head.own_address, head.port, [])
    loop = asyncio.new_event_loop()
    task = loop.create_task(agent.run())

    def run() -> None:
        asyncio.set_event_loop(loop)
        with suppress(asyncio.CancelledError, CenacleError):
            loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    thread = threading.Thread(target=run, name="agent", daemon=True)
    thread.start()
    try:
        yield
    finally:
        head.expect_disconnections()
        with suppress(RuntimeError):  # the loop is closed if the agent has ended
            loop.call_soon_threadsafe(task.cancel)
        thread.join(AGENT_STOP_S)


def _join_commands(address: str, port: int, token: str) -> list[str]:
    """The command lines by which nodes join a head that listens on `address`."""

    any_address = address in ("0.0.0.0", "::")
    hosts = net.local_addresses()[:1] if any_address else [address]
    return [
        f"cenacle join {net.format_address(host, port)} --token {token}"
        for host in hosts or [socket.gethostname()]
    ]


@command(
    app,
    example="cenacle join 192.168.1.10:4747 --token 7K2M-9QXD-41TB-W3HF --models /models",
    panel=PANEL,
)
def join(
    head: Annotated[
        str | None,
        typer.Argument(
            metavar="HOST:PORT",
            help="Address of the head. Default: the head joined last; with --token, found by mDNS.",
        ),
    ] = None,
    *,
    arguments: JoinArguments,
) -> None:
    """Add this machine to a cluster and run its agent until the cluster ends."""
    configure_logging()
    from ..cluster import agent as agents
    from ..cluster.security.identity import Identity

    folder = paths.cluster_dir()
    identity = Identity(folder, "node")
    # A service may be written while an agent is running.
    lock = (
        nullcontext()
        if arguments.service
        else paths.lock_file(folder / "agent.lock", "this machine's agent")
    )
    with lock:
        if arguments.token is not None:
            identity = _pair(head, arguments.token, arguments)
        elif not identity.exists:
            raise InputError(
                "this machine is not part of a cluster: run the line that `cenacle up` prints on "
                "the head, cenacle join HOST:PORT --token ..."
            )
        elif head is not None:
            _change_head(identity, head)
        if arguments.models is not None:
            if not arguments.models.is_dir():
                raise InputError(f"--models: expected a folder, got {arguments.models}", "models")
            identity.save_settings(models=str(arguments.models.resolve()))
        if arguments.service:
            _write_service()
            return
        settings = identity.load_settings()
        folders = [Path(settings["models"])] if settings.get("models") else []
        agent = agents.Agent(identity, settings["host"], settings["port"], folders, _report_event)
        _report_event(f"ended: {agents.run(agent)}")


def _pair(head: str | None, token: str, arguments: JoinArguments) -> Identity:
    from ..cluster import client, discovery

    if head is not None:
        host, port = client.read_address(head)
    elif not arguments.mdns:
        raise InputError("join: expected HOST:PORT before --token, got none", "head")
    else:
        report("searching for a head by mDNS")
        found = discovery.choose_head(discovery.discover_heads(), arguments.cluster)
        report(f"found {found.name} at {found.host}:{found.port}")
        host, port = found.host, found.port
    name = arguments.name or socket.gethostname()
    return client.pair_with_head(paths.cluster_dir(), host, port, token, name)


def _change_head(identity: Identity, head: str) -> None:
    from ..cluster import client

    host, port = client.read_address(head)
    client.verify_head(identity, host, port)
    identity.save_settings(host=host, port=port)


def _write_service() -> None:
    from ..cluster import service_unit

    path, text, enable_command = service_unit.service_file(paths.config_dir())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    report(f"{path} is written; enable it with")
    print(enable_command)


@command(app, example="cenacle nodes --invite", panel=PANEL)
def nodes(
    invite: Annotated[
        bool,
        typer.Option("--invite", help="Print a new join command; only on the head's machine."),
    ] = False,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Remove this node from the cluster; only on the head's machine."
        ),
    ] = None,
    revoke: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Revoke this token, or all; nodes that have joined with it stay.",
        ),
    ] = None,
    remove_joined: Annotated[
        bool,
        typer.Option("--remove-joined", help="With --revoke: also remove these nodes."),
    ] = False,
    json_output: JsonOutput = False,
) -> None:
    """List the nodes of the cluster, invite a new one, remove one, or revoke a token."""
    if invite:
        identity = _find_identity()
        token = _query(identity, "invite")["token"]
        for command_line in _join_commands("0.0.0.0", identity.load_settings()["port"], token):
            print(command_line)
        return
    if revoke is not None:
        _revoke_token(revoke, remove_joined)
        return
    if remove is not None:
        report(f"removed {query_head('remove', remove)['removed']} from the cluster")
        return
    rows = query_head("status")["nodes"]
    if json_output:
        print_json(rows)
        return
    table = Table("node", "rank", "address", "memory", "free", "reads", "hardware", "", box=None)
    for node in rows:
        read_rate = node.get("read_bytes_per_s")
        table.add_row(
            node["name"],
            "" if node["rank"] is None else str(node["rank"]),
            node["address"],
            format_bytes(node["memory_bytes"]) if "memory_bytes" in node else "",
            format_bytes(node["available_bytes"]) if "available_bytes" in node else "",
            f"{read_rate / 1e9:.0f} GB/s" if read_rate else "",
            " ".join(str(node[key]) for key in ("system", "processor") if key in node),
            _node_state(node),
        )
    wide_console(160).print(table)


def _revoke_token(token: str, remove_joined: bool) -> None:
    from ..cluster import client
    from ..cluster.messages import Query

    identity = _find_identity()
    settings = identity.load_settings()
    query = Query("revoke", token="" if token == "all" else token, remove_nodes=remove_joined)
    answer = client.query_head(identity, settings["host"], settings["port"], query)
    report(f"revoked {answer['tokens']} valid token{'s' * (answer['tokens'] != 1)}")
    if answer.get("removed"):
        report(f"removed from the cluster: {', '.join(answer['removed'])}")
    if answer.get("stay"):
        report(
            f"still in the cluster: {', '.join(answer['stay'])}; to remove one, run "
            f"`cenacle nodes --remove NAME`"
        )


@command(app, example="cenacle status --json", panel=PANEL)
def status(json_output: JsonOutput = False) -> None:
    """Show what the cluster is doing."""
    answer = query_head("status")
    if json_output:
        print_json(answer)
        return
    print(f"{answer['phase']}: {answer.get('model')} {answer.get('url', '')}".rstrip())
    for key in ("waiting", "reformed", "backend_reason", "plan_reason"):
        if answer.get(key):
            print(answer[key])
    for node in answer["nodes"]:
        rank = "" if node["rank"] is None else f"rank {node['rank']}, "
        print(f"  {node['name']}: {rank}{_node_state(node)}")


def _node_state(node: dict[str, Any]) -> str:
    if node["reason"]:
        return str(node["reason"])
    part = node.get("download_progress")
    if part is not None and part["done"] < part["total"]:
        done, total = format_bytes(part["done"]), format_bytes(part["total"])
        return f"connected, downloaded {done} of {total}"
    return "connected"


@command(app, example="cenacle leave", panel=PANEL)
def leave() -> None:
    """Remove this machine from its cluster, stop its agent and delete its keys."""
    from ..cluster.security.identity import Identity

    identity = Identity(paths.cluster_dir(), "node")
    if not identity.exists:
        raise InputError("this machine is not part of a cluster")
    settings = identity.load_settings()
    try:
        _query(identity, "leave")
    except ClusterError as error:
        report(
            f"{error}; this machine leaves anyway. To remove it from the list of nodes, run "
            f"`cenacle nodes --remove {settings['name']}` on the head"
        )
    identity.delete()
    report("this machine is not part of a cluster any more")


@command(app, example="cenacle down", panel=PANEL)
def down() -> None:
    """Stop the cluster of this machine: server, ranks and agents."""
    from ..cluster.security.identity import HEAD, Identity

    identity = Identity(paths.cluster_dir(), HEAD)
    if not identity.exists:
        raise InputError(
            "no cluster was started on this machine; use `cenacle leave` on the other nodes"
        )
    _query(identity, "down")
    report("the cluster is stopping")


def query_head(name: QueryName, node: str = "", timeout_s: float = 10.0) -> dict[str, Any]:
    """Send a query to the head of this machine's cluster, and return its answer.

    Raises:
        InputError: this machine is not part of a cluster.
        ClusterError: the head does not answer, or refuses.
    """
    return _query(_find_identity(), name, node, timeout_s)


def _find_identity() -> Identity:
    from ..cluster.security.identity import HEAD, Identity

    for role in (HEAD, "node"):
        identity = Identity(paths.cluster_dir(), role)
        if identity.exists and "port" in identity.load_settings():
            return identity
    raise InputError(
        "this machine is not part of a cluster: see `cenacle up --help` and `cenacle join --help`"
    )


def _query(
    identity: Identity, name: QueryName, node: str = "", timeout_s: float = 10.0
) -> dict[str, Any]:
    from ..cluster import client
    from ..cluster.messages import Query

    settings = identity.load_settings()
    return client.query_head(
        identity, settings["host"], settings["port"], Query(name, node), timeout_s
    )


def _report_event(message: str) -> None:
    """Report what a head or an agent does; in a log file with the time."""
    plain = stderr_console.is_terminal or LogFormat.is_json
    report(message if plain else f"{time.strftime('%H:%M:%S')} {message}")
