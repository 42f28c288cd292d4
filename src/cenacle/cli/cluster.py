"""The verbs of a cluster: `cenacle up`, `join`, `nodes`, `status`, `leave`, `down`.

Owns: their arguments and what is printed; `cli.py` puts them beside the others.
Invariant: as `cli.py`: answers to stdout, everything else to stderr, with --json one object last.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import net, paths
from ..core.units import format_bytes
from ..errors import CenacleError, ClusterError, InputError
from . import keys as key_commands

if TYPE_CHECKING:
    import ssl

    from ..cluster.formation import Joined
    from ..cluster.head import Head
    from ..cluster.hostsfile import Host
    from ..cluster.security.identity import Identity
    from ..runtime import LoadOptions
    from ..server.middleware import AccessPolicy
    from ..verification import SelfTest

err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
Name = Annotated[str | None, typer.Option(help="This machine's name. Default: its host name.")]
CACHE_DISK_GB = 8.0
CacheDiskGB = Annotated[
    float,
    typer.Option(
        min=0, help="Gigabytes of disk per node for prompts' beginnings, past restarts; 0: none."
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="The folder for those, on every node. Default: this user's cache folder."),
]
Mdns = Annotated[
    bool, typer.Option("--mdns/--no-mdns", help="Let heads be found by name in the network.")
]

_CHOICES = {
    "placement": ("auto", "whole", "sliced", "replicated"),
    "trunk": ("auto", "replicated", "sharded"),
    "backend": ("auto", "jaccl", "nccl", "mesh", "ring"),
    "wire": ("f32", "bf16"),
    "kernels": ("auto", "native", "mlx"),
}
Progress = Callable[[], AbstractContextManager[Any]]
_progress: list[Progress] = []


def up(
    model: Annotated[str, typer.Argument(help="A folder, a hub repository's name, or demo.")],
    nodes: Annotated[
        int, typer.Option("--nodes", "-n", min=0, help="Machines. 0: all that ever joined, from 2.")
    ] = 0,
    host: Annotated[str, typer.Option(help="Address of the API.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the API; 0: any.")] = 8080,
    listen: Annotated[str, typer.Option(help="Where machines join, HOST:PORT.")] = "0.0.0.0:4747",
    name: Name = None,
    hosts: Annotated[
        Path | None,
        typer.Option(
            help="A hosts file as mlx.launch reads it: who is awaited, which addresses are used."
        ),
    ] = None,
    mdns: Mdns = True,
    shares: Annotated[
        str | None,
        typer.Option(help="Relative speeds, head first, such as 2,1,1. Default: as measured."),
    ] = None,
    placement: Annotated[str, typer.Option(help="auto, whole, sliced or replicated.")] = "auto",
    trunk: Annotated[str, typer.Option(help="auto, replicated or sharded.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, mesh, ring, jaccl or nccl.")] = "auto",
    wire: Annotated[str, typer.Option(help="f32, or bf16: half the bytes, rounded.")] = "f32",
    kernels: Annotated[str, typer.Option(help="auto, native or mlx.")] = "auto",
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Most prompt tokens per step.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Most requests generated at once.")] = 32,
    draft: Annotated[
        str | None,
        typer.Option(help="A small model with the same tokenizer, on this machine, that drafts."),
    ] = None,
    cache_dir: CacheDir = None,
    cache_disk_gb: CacheDiskGB = CACHE_DISK_GB,
    require_key: key_commands.RequireKey = False,
    tls: key_commands.Tls = None,
    tls_cert: key_commands.TlsCert = None,
    tls_key: key_commands.TlsKey = None,
    allowed_host: key_commands.AllowedHost = None,
    cors_origin: key_commands.CorsOrigin = None,
    selftest: Annotated[
        bool | None,
        typer.Option(
            "--selftest/--no-selftest",
            help="Check what the group computes, its weights and links, before it serves. Default: "
            "when this plan on these machines has not passed yet.",
        ),
    ] = None,
    token_minutes: Annotated[
        float, typer.Option(min=0.01, help="How long the printed token lets machines in.")
    ] = 60.0,
) -> None:
    """Begin a cluster on this machine, and serve a model on all machines that join.

    Prints the line to run on each of the others.

    Example: [bold]cenacle up org/model -n 3[/]
    """
    _log()
    from ..cluster import client as joining
    from ..cluster import node_info

    for option, given in (
        ("placement", placement),
        ("trunk", trunk),
        ("backend", backend),
        ("wire", wire),
        ("kernels", kernels),
    ):
        if given not in _CHOICES[option]:
            choices = ", ".join(_CHOICES[option])
            raise InputError(f"--{option}: expected one of {choices}, got {given!r}", option)
    if model == "demo":
        model = str(node_info.PACKAGE / "demo" / "demo_model")
    at, at_port = joining.read_address(listen)
    expected = _expected(hosts)
    nodes = nodes or len(expected)
    from ..server.http_server import bind

    with bind(host, port) as sock:  # before what is slow
        from ..cluster.formation import Joined
        from ..cluster.head import Head
        from ..cluster.placement import Wanted
        from ..runtime import LoadOptions
        from ..verification import SelfTest

        policy = key_commands.access_policy(
            sock, require_key=require_key, hosts=allowed_host, cors_origins=cors_origin
        )
        context = key_commands.tls_context(host, tls, tls_cert, tls_key)
        folder = paths.cluster_dir()
        head = Head(folder, at, at_port, name or socket.gethostname(), 60 * token_minutes)
        with _leaving(head):
            token = head.invite()
            own = expected[0].ips[0] if expected else at
            for where in _join_addresses(own, head.port):
                err.print(f"cenacle join {where} --token {token}", soft_wrap=True, markup=False)
            with _announced(head, at if mdns else None), _own_agent(head):
                wanted = Wanted(placement, trunk, backend, wire, _numbers(shares))
                joined = Joined(head, nodes, wanted, lambda text: _wait(head, text), expected)
                options = LoadOptions(
                    model,
                    kernels=kernels,
                    draft_model=draft,
                    max_batch_size=batch,
                    prefix_cache_dir=absolute(cache_dir),
                    prefix_cache_disk_gb=cache_disk_gb,
                    prefill_chunk_size=prefill_chunk,
                )
                test = None if selftest is False else SelfTest(folder, bool(selftest), _say)
                _serve(head, joined, options, sock, policy, context, test)


def _expected(file: Path | None) -> tuple[Host, ...]:
    """The hosts of a hosts file, of which this machine is the first."""
    from ..cluster import hostsfile

    if file is None:
        return ()
    found = hostsfile.read(file)
    hostsfile.check_first(found, net.local_addresses())
    return found


@contextmanager
def _announced(head: Head, at: str | None) -> Iterator[None]:
    """Let the head be found by name; `at`: where it listens, None: not."""
    if at is None:
        yield
        return
    from ..cluster.discovery import Announced

    everywhere = at in ("0.0.0.0", "::")
    announced = Announced(
        head.identity.remembered()["name"],
        net.local_addresses() if everywhere else [at],
        head.port,
        lambda why: _say(f"this head cannot be found by name (mDNS): {why}"),
    )
    try:
        yield
    finally:
        announced.close()


def absolute(folder: Path | None) -> str | None:
    """A folder as ranks are told of it, wherever they are started."""
    return str(folder.expanduser().absolute()) if folder is not None else None


def _wait(head: Head, text: str) -> None:
    head.tell(waiting=text)
    _tell(text)


def _serve(
    head: Head,
    joined: Joined,
    options: LoadOptions,
    sock: socket.socket,
    policy: AccessPolicy,
    tls: ssl.SSLContext | None,
    selftest: SelfTest | None,
) -> None:
    from ..api import Model
    from ..server.http_server import serve

    def started(url: str) -> None:
        head.tell(url=url)
        _tell(f"serving {loaded.name} on {loaded.plan.nodes} machines at {url}")

    head.tell(model=Path(options.model).name)
    with _progress[0]() as progress:
        loaded = Model.load(options, progress=progress, joined=joined, selftest=selftest)
    with loaded:
        for line in (loaded.ranks.backend_reason, loaded.plan_reason):
            if line:
                _tell(line)
        serve(loaded, sock, on_started=started, policy=policy, tls=tls)


@contextmanager
def _leaving(head: Head) -> Iterator[None]:
    """Close the head at the end; `cenacle down` ends this program as SIGTERM does."""
    head.on_end = lambda: os.kill(os.getpid(), signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if not head.ended.is_set():
            raise
    except ClusterError:
        if not head.ended.is_set():
            raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already
        head.close(end_agents=head.ended.is_set())


@contextmanager
def _own_agent(head: Head) -> Iterator[None]:
    """The head's own machine takes part like any other."""
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
        with suppress(RuntimeError):  # it has ended by itself
            loop.call_soon_threadsafe(task.cancel)
        thread.join(10)


def _join_addresses(at: str, port: int) -> list[str]:
    """What to print: the address that others reach, or all that might be."""

    found = net.local_addresses()[:1] if at in ("0.0.0.0", "::") else [at]
    return [net.format_address(a, port) for a in found or [socket.gethostname()]]


def join(
    head: Annotated[
        str | None,
        typer.Argument(help="HOST:PORT. Default: as joined before; with --token: found by mDNS."),
    ] = None,
    token: Annotated[str | None, typer.Option(help="As `cenacle up` prints it.")] = None,
    models: Annotated[
        Path | None, typer.Option(help="Where this machine has models, if it has any.")
    ] = None,
    name: Name = None,
    cluster: Annotated[
        str | None, typer.Option(help="Whose head, by its machine's name, if there are several.")
    ] = None,
    mdns: Mdns = True,
    service: Annotated[
        bool, typer.Option(help="Write a service that rejoins after a restart, and stop.")
    ] = False,
) -> None:
    """Make this machine part of a cluster: pair with the head once, then serve it until the end.

    Example: [bold]cenacle join 192.168.1.10:4747 --token 7K2M-9QXD-41TB-W3HF --models /models[/]
    """
    _log()
    from ..cluster import agent as agents
    from ..cluster import client as joining
    from ..cluster import service_unit
    from ..cluster.head import take_lock
    from ..cluster.security import identity as identities

    folder = paths.cluster_dir()
    identity = identities.Identity(folder, "node")
    # An agent that runs already does not stand in the way of writing a service.
    running = nullcontext() if service else take_lock(folder / "agent.lock", "this machine's agent")
    with running:
        if token is not None:
            if head is None and not mdns:
                raise InputError("join: expected HOST:PORT before --token", "head")
            host, port = joining.read_address(head) if head is not None else _found(cluster)
            identity = joining.pair(folder, host, port, token, name or socket.gethostname())
        elif not identity.exists:
            raise InputError(
                "this machine is not part of a cluster yet: run the line that `cenacle up` prints "
                "on the head, cenacle join HOST:PORT --token ..."
            )
        elif head is not None:
            host, port = joining.read_address(head)
            joining.check(identity, host, port)
            identity.remember(host=host, port=port)
        if models is not None:
            if not models.is_dir():
                raise InputError(f"--models: {models} is not a folder", "models")
            identity.remember(models=str(models.resolve()))
        known = identity.remembered()
        if service:
            path, text, enable = service_unit.service(paths.config_dir())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            _say(f"{path} is written; switch it on with")
            print(enable)
            return
        folders = [Path(known["models"])] if known.get("models") else []
        agent = agents.Agent(identity, known["host"], known["port"], folders, _tell)
        _tell(f"ended: {agents.run(agent)}")


def _found(name: str | None) -> tuple[str, int]:
    """Where the head is that can be found in the network."""
    from ..cluster import discovery

    _say("looking for a head in this network (mDNS)")
    head = discovery.choose(discovery.look(), name)
    _say(f"found {head.name} at {head.host}:{head.port}")
    return head.host, head.port


def nodes(
    invite: Annotated[
        bool, typer.Option(help="Print a new line to join by; on the head's machine.")
    ] = False,
    strike: Annotated[
        str | None, typer.Option(help="Remove this machine; on the head's machine.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The machines of this machine's cluster, as the head sees them.

    Example: [bold]cenacle nodes[/]
    """
    identity, where = cluster()
    if invite:
        token = ask(identity, where, "invite")["token"]
        addresses = _join_addresses("0.0.0.0", where[1])
        for address in addresses:
            print(f"cenacle join {address} --token {token}")
        return
    if strike is not None:
        left = ask(identity, where, "strike", name=strike)["left"]
        _say(f"{left} is not part of this cluster any more")
        return
    answer = ask(identity, where, "status")
    if as_json:
        print(json.dumps(answer["nodes"]))
        return
    table = Table("machine", "rank", "address", "memory", "free", "reads", "what", "", box=None)
    for node in answer["nodes"]:
        rank = "" if node["rank"] is None else str(node["rank"])
        rate = node.get("read_bytes_s")
        table.add_row(
            node["name"],
            rank,
            node["address"],
            format_bytes(node["memory_bytes"]) if "memory_bytes" in node else "",
            format_bytes(node["available_bytes"]) if "available_bytes" in node else "",
            f"{rate / 1e9:.0f} GB/s" if rate else "",
            " ".join(str(node[k]) for k in ("system", "processor") if k in node),
            node["reason"] or _part(node) or "here",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def status(as_json: AsJson = False) -> None:
    """What this machine's cluster does at this moment.

    Example: [bold]cenacle status[/]
    """
    identity, where = cluster()
    answer = ask(identity, where, "status")
    answer.pop("type", None)
    if as_json:
        print(json.dumps(answer))
        return
    print(f"{answer['phase']}: {answer.get('model')} {answer.get('url', '')}".rstrip())
    for key in ("waiting", "formed", "exchange", "plan"):
        if answer.get(key):
            print(answer[key])
    for node in answer["nodes"]:
        rank = "" if node["rank"] is None else f"rank {node['rank']}, "
        print(f"  {node['name']}: {rank}{node['reason'] or _part(node) or 'here'}")


def _part(node: dict[str, Any]) -> str:
    """How far a machine has fetched its part of the model, while it does."""
    part = node.get("part")
    if part is None or part["done"] >= part["total"]:
        return ""
    return f"here, has fetched {format_bytes(part['done'])} of {format_bytes(part['total'])}"


def leave() -> None:
    """Take this machine out of its cluster; its agent ends, its keys are removed.

    Example: [bold]cenacle leave[/]
    """
    from ..cluster.security import identity as identities

    identity = identities.Identity(paths.cluster_dir(), "node")
    if not identity.exists:
        raise InputError("this machine is not part of a cluster")
    known = identity.remembered()
    try:
        ask(identity, (known["host"], known["port"]), "leave")
    except ClusterError as error:
        _say(
            f"{error}; this machine forgets its cluster all the same. On the head: "
            f"`cenacle nodes --strike {known['name']}`"
        )
    identity.forget()
    _say("this machine is not part of a cluster any more")


def down() -> None:
    """End the cluster that was begun on this machine: server, ranks, agents.

    Example: [bold]cenacle down[/]
    """
    from ..cluster.security import identity as identities

    identity = identities.Identity(paths.cluster_dir(), identities.HEAD)
    if not identity.exists:
        raise InputError("no cluster was begun on this machine; `cenacle leave` is for the others")
    known = identity.remembered()
    ask(identity, (known["host"], known["port"]), "down")
    _say("the cluster ends")


def cluster() -> tuple[Identity, tuple[str, int]]:
    """This machine's identity, the head's before a node's, and where the head is."""
    from .. import paths
    from ..cluster.security import identity as identities

    folder = paths.cluster_dir()
    identity = identities.Identity(folder, identities.HEAD)
    if identity.exists and "port" in (known := identity.remembered()):
        return identity, (known["host"], known["port"])
    identity = identities.Identity(folder, "node")
    if not identity.exists:
        raise InputError("this machine is not part of a cluster: see `cenacle up` and `join`")
    known = identity.remembered()
    return identity, (known["host"], known["port"])


def ask(identity: Identity, where: tuple[str, int], what: str, **more: Any) -> dict[str, Any]:
    """The head's answer, see `cluster.join.ask`."""
    from ..cluster import client as joining

    return joining.ask(identity, *where, what, **more)


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, markup=False)


def _tell(text: str) -> None:
    """What happens while a head or an agent runs; in a log with its time."""
    _say(text if err.is_terminal else f"{time.strftime('%H:%M:%S')} {text}")


def _log() -> None:
    """What parts of a head or an agent say of failures, likewise."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def _numbers(given: str | None) -> list[float] | None:
    if given is None:
        return None
    try:
        return [float(s) for s in given.split(",")]
    except ValueError as error:
        raise InputError(f"--shares: expected numbers such as 2,1,1, got {given!r}") from error


def register(app: typer.Typer, progress: Progress) -> None:
    """Put these verbs beside the others."""
    _progress.append(progress)
    for verb in (up, join, nodes, status, leave, down):
        app.command()(verb)
