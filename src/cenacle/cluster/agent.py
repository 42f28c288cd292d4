"""The program on each machine of a cluster: it reports to the head and starts ranks as it is told.

Owns: this machine's connection to its head, the ranks that run here, passing their messages on, and
fetching this machine's part of the model.
Does not know: models, plans, which group a rank is of beyond its number.
Invariant: it listens to nobody but its head, which has to prove that it is; when the connection to
the head is lost, or this process ends, so do all ranks here; a lost head is called again for ever.
Next: `control.py` is the other side; `engine/worker.py` is what is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import net, paths
from ..collective import mesh, socket_options
from ..core.units import format_bytes
from ..errors import CenacleError, ClusterError, error_from_json, error_to_json
from ..ranks import exit_reason
from ..ranks.channel import ChannelClosed
from ..ranks.local_ranks import MALLOC_TUNABLES, WORKER_COMMAND
from . import doctor, framing, link_probe, node_info
from .download import node_cache, task
from .membership import HEARTBEAT_TIMEOUT_S
from .security import identity as identities
from .security import pairing

log = logging.getLogger(__name__)

ALIVE_EVERY_S = 0.25
# Longer than the head waits for agents: the head's TCP may ask again only a second after a cable is
# back, and the head may have noticed nothing.
HEAD_SILENCE_S = 6.0
FACTS_EVERY = 4  # of these with what changes on the machine
CONNECT_S = 5.0
AGAIN_S = (0.2, 0.5, 1.0, 2.0)  # between calls to a head that does not answer
STOP_S = 5.0
FETCHED_S = 1.0  # after which it is said how far a fetch is
SAY_EVERY_S = 10.0


class Ended(Exception):
    """The head says that this agent shall end; says why."""


@dataclass
class _Rank:
    """A rank that runs here."""

    group_id: int
    rank: int
    process: asyncio.subprocess.Process
    kills_before: int | None = field(default_factory=exit_reason.oom_kill_count)
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Agent:
    """One machine's agent.

    Args:
        identity: what this machine proves itself with.
        host, port: of the head.
        folders: where models are looked for, the first one first.
        say: told, in sentences, what happens.
        place: the folder of parts of models that are fetched; None: `paths.models_dir`.
    """

    def __init__(
        self,
        identity: identities.Identity,
        host: str,
        port: int,
        folders: list[Path],
        say: Callable[[str], None] = lambda _: None,
        place: Path | None = None,
    ) -> None:
        self._identity, self._host, self._port = identity, host, port
        self._folders, self._say = folders, say
        self._ranks: list[_Rank] = []
        self._group_id = 0
        self._writer: asyncio.StreamWriter | None = None
        self._address = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._said = ""
        self._parts = place or paths.models_dir()
        self._verified: set[Path] = set()  # parts that were compared with their hashes
        self._fetching: task.DownloadTask | None = None

    async def run(self) -> str:
        """Serve the head until it says that this shall end; says why.

        Raises:
            CenacleError: the head refuses this machine, and will again.
        """
        facts = await asyncio.to_thread(node_info.facts)
        tries = 0
        try:
            while True:
                came = time.monotonic()
                try:
                    await self._session(facts)
                except Ended as end:
                    return str(end)
                except (OSError, ClusterError) as error:
                    if isinstance(error, _Refused):
                        raise
                    self._tell(self._why(error))
                tries = 0 if time.monotonic() - came > 2 * AGAIN_S[-1] else tries + 1
                await asyncio.sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])
        finally:
            await self._end_ranks()
            if self._writer is not None:
                framing.hang_up(self._writer)
            for task in self._tasks:
                task.cancel()

    def _tell(self, text: str) -> None:
        if text != self._said:
            self._said = text
            self._say(text)

    def _why(self, error: Exception) -> str:
        where = f"{self._host}:{self._port}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"what answers at {where} is not the head of this machine's cluster; waiting"
        return f"the head at {where} does not answer ({error}); waiting for it"

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(
                    self._host,
                    self._port,
                    ssl=self._identity.client(),
                    server_hostname=identities.SERVER_NAME,
                    limit=framing.PIECE,
                )
        except TimeoutError:
            raise ChannelClosed(f"no connection within {CONNECT_S:g} s") from None
        socket_options.configure_socket(writer.get_extra_info("socket"))
        return reader, writer

    async def _session(self, facts: dict[str, Any]) -> None:
        """One connection to the head, until it ends."""
        reader, writer = await self._open()
        self._writer = writer
        self._address = writer.get_extra_info("sockname")[0]
        alive: asyncio.Task[None] | None = None
        try:
            hello = {**facts, **node_info.changing(), "group_id": self._group_id}
            await framing.send(writer, {"type": "agent", "facts": hello}, HEARTBEAT_TIMEOUT_S)
            while True:
                message = await framing.receive(reader, HEAD_SILENCE_S)
                match message["type"]:
                    case "welcome":
                        self._tell(
                            f"{message['name']} is in the cluster of {self._host}:{self._port}"
                        )
                        alive = self._start(self._say_alive(writer))
                    case "order":
                        self._start(self._obey(message, writer))
                    case "end":
                        with contextlib.suppress(ClusterError):
                            await framing.send(writer, {"type": "leaving"}, 1)
                        raise Ended(str(message.get("reason")))
                    case "refused":
                        error = error_from_json(message.get("error"))
                        raise error if message.get("again") else _Refused(str(error))
        finally:
            if alive is not None:
                alive.cancel()
            if self._fetching is not None:
                self._fetching.stop()  # the head orders it again
            framing.hang_up(writer)
            await self._end_ranks()

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _say_alive(self, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ClusterError):
            for beat in itertools.count(1):
                await asyncio.sleep(ALIVE_EVERY_S)
                word = {"type": "alive"} if beat % FACTS_EVERY else _alive()
                await framing.send(writer, word, HEARTBEAT_TIMEOUT_S)

    async def _obey(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        orders: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "find": self._find,
            "fetch": self._fetch,
            "fetched": self._fetched,
            "ports": self._ports,
            "answer_link": self._answer_link,
            "measure_link": self._measure_link,
            "start": self._start_rank,
            "stop": self._stop_ranks,
            "examine": self._examine,
        }
        answer: dict[str, Any] = {"type": "answer", "id": message["id"]}
        try:
            result = await orders[message["what"]](**message["arguments"])
            answer["result"] = result
        except (CenacleError, OSError) as error:
            if not isinstance(error, CenacleError):
                error = ClusterError(str(error))
            answer["error"] = error_to_json(error)
        except (KeyError, TypeError) as error:
            reason = f"this agent cannot do that ({error!r}): are its versions the head's?"
            answer["error"] = error_to_json(ClusterError(reason))
        with contextlib.suppress(ClusterError):
            await framing.send(writer, answer, HEARTBEAT_TIMEOUT_S)

    # Orders

    async def _find(self, model: str, digest: str, config: str) -> dict[str, Any]:
        """What of the model is here, or where a part of it goes."""
        asked = (model, digest, config, self._folders, self._parts)
        return vars(await asyncio.to_thread(node_cache.find_local_model, *asked))

    async def _fetch(self, model: str, folder: str, order: dict[str, Any]) -> dict[str, Any]:
        """Begin to fetch a part; one that goes on is ended."""
        into, before = Path(folder), self._fetching
        if into.parent.resolve() != self._parts.resolve():
            raise ClusterError(f"{into} is no place for a part of a model")
        head = task.HeadSource(self._identity, self._host, self._port)
        what = task.DownloadOrder.from_json(order)
        self._fetching = task.DownloadTask(into, what, head, self._verified, before)
        self._start(self._tell_of(self._fetching, model))
        return {}

    async def _tell_of(self, fetching: task.DownloadTask, model: str) -> None:
        began = time.monotonic()
        try:
            while not await asyncio.to_thread(fetching.wait, FETCHED_S):
                if time.monotonic() - began > SAY_EVERY_S:
                    began += SAY_EVERY_S
                    self._say(
                        f"{model}: {format_bytes(fetching.done_bytes)} of "
                        f"{format_bytes(fetching.total_bytes)} here"
                    )
        except CenacleError as error:
            self._say(f"{model}: {error}")
            return
        if fetching.damaged_bytes:
            self._say(
                f"{model}: {format_bytes(fetching.damaged_bytes)} here were damaged, and "
                f"fetched again"
            )
        if fetching.fetched_bytes:
            self._say(
                f"{model}: {format_bytes(fetching.fetched_bytes)} fetched into {fetching.folder}"
            )

    async def _fetched(self) -> dict[str, Any]:
        """How far that is, after a second or when it has come to its end."""
        now = self._fetching
        if now is None:
            raise ClusterError("fetches nothing")
        ended = await asyncio.to_thread(now.wait, FETCHED_S)
        said = {
            "ended": ended,
            "done": now.done_bytes,
            "total": now.total_bytes,
            "folder": str(now.folder),
        }
        if ended:
            said["digest"] = await asyncio.to_thread(node_info.digest, now.folder)
            said["fetched"] = now.fetched_bytes
        return said

    async def _ports(self, address: str, count: int) -> dict[str, Any]:
        return {"ports": net.free_ports(count, address)}

    async def _answer_link(self, address: str, secret: str) -> dict[str, Any]:
        return {"port": link_probe.answer(address, pairing.decode(secret))}

    async def _measure_link(self, address: str, port: int, secret: str) -> dict[str, Any]:
        found = await asyncio.to_thread(link_probe.measure, address, port, pairing.decode(secret))
        return asdict(found)

    async def _examine(self, now_s: float) -> dict[str, Any]:
        """What `cenacle doctor` would say here; `now_s`: the head's clock."""
        skew_s = now_s - time.time()
        facts = await asyncio.to_thread(doctor.gather, self._host)
        found = doctor.examine(replace(facts, skew_s=skew_s))
        return {"findings": [f.to_json() for f in found]}

    async def _start_rank(
        self,
        group_id: int,
        epoch: int,
        rank: int,
        backend: str,
        addresses: list[str],
        devices: list[list[str | None]],
        secret: str,
        relay: str,
        token: str,
    ) -> dict[str, Any]:
        if group_id < self._group_id:
            raise ClusterError(
                f"start_rank: expected a group id of at least {self._group_id}, got {group_id}"
            )
        if group_id > self._group_id:
            await self._end_ranks()
        self._group_id = group_id
        # No file has a name: however this process ends, nothing of a rank is left on the disk.
        near, far = socket.socketpair()
        with contextlib.ExitStack() as files:
            files.enter_context(far)
            env = {
                **os.environ,
                "CENACLE_CONTROL": f"fd:{far.fileno()}",
                "CENACLE_TOKEN": token,
                "CENACLE_RANK": str(rank),
                "CENACLE_EPOCH": str(epoch),
                "CENACLE_LOCAL_RANKS": "1",
                "MLX_RANK": str(rank),
            }
            env["GLIBC_TUNABLES"] = ":".join(
                filter(None, [env.get("GLIBC_TUNABLES"), MALLOC_TUNABLES])
            )
            inherited = [far.fileno()]

            def given(content: object) -> str:
                """Where the rank finds this as JSON."""
                file = files.enter_context(tempfile.TemporaryFile())
                file.write(json.dumps(content).encode())
                file.seek(0)
                inherited.append(file.fileno())
                return f"/dev/fd/{file.fileno()}"

            if backend == "mesh":
                env[mesh.ADDRESSES] = json.dumps(addresses)
                env[mesh.SECRET] = secret
            elif backend == "ring":
                env["MLX_HOSTFILE"] = given([[a] for a in addresses])
            elif backend == "jaccl":  # never run
                env["MLX_IBV_DEVICES"] = given(devices)
                env["MLX_JACCL_COORDINATOR"] = addresses[0]
            elif backend == "nccl":  # never run
                host, port = net.parse_address(addresses[0])
                env |= {"NCCL_HOST_IP": host, "NCCL_PORT": str(port)}
                env["MLX_WORLD_SIZE"] = str(len(addresses))
            try:
                process = await asyncio.create_subprocess_exec(
                    *WORKER_COMMAND,
                    env=env,
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=inherited,
                )
            except BaseException:
                near.close()
                raise
        self._start(self._relay(relay, near))
        started = _Rank(group_id, rank, process)
        self._ranks.append(started)
        self._start(self._watch(started))
        return {"pid": process.pid}

    async def _relay(self, name: str, near: socket.socket) -> None:
        """A rank's messages, to and from the front."""
        reader, writer = await asyncio.open_unix_connection(sock=near, limit=framing.PIECE)
        try:
            theirs = await self._open()
            await framing.send(theirs[1], {"type": "relay", "name": name}, HEARTBEAT_TIMEOUT_S)
            await framing.receive(theirs[0], HEARTBEAT_TIMEOUT_S)
            await framing.pass_on((reader, writer), theirs)
        except (OSError, ClusterError) as error:
            log.info("a rank's connection ended: %s", error)
        finally:
            writer.close()

    async def _watch(self, rank: _Rank) -> None:
        """Until a rank has ended: clean up and report how."""
        try:
            status = await rank.process.wait()
            if status and self._writer is not None:
                message = {
                    "type": "rank_exited",
                    "group_id": rank.group_id,
                    "rank": rank.rank,
                    "pid": rank.process.pid,
                    "reason": exit_reason.describe_exit(status, rank.kills_before),
                }
                with contextlib.suppress(ClusterError):
                    await framing.send(self._writer, message, HEARTBEAT_TIMEOUT_S)
        finally:
            if rank in self._ranks:
                self._ranks.remove(rank)
            rank.gone.set()

    async def _stop_ranks(self, group_id: int, patience_s: float) -> dict[str, Any]:
        ending = [r for r in self._ranks if r.group_id == group_id]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                for rank in ending:
                    await rank.gone.wait()
        await self._end_ranks(group_id)
        if self._writer is not None:
            # The next plan is made of what is free now, and not of what was a second ago.
            with contextlib.suppress(ClusterError):
                await framing.send(self._writer, _alive(), HEARTBEAT_TIMEOUT_S)
        return {}

    async def _end_ranks(self, group_id: int | None = None) -> None:
        """Kill the ranks here, of all formations or of one, and wait until they are gone."""
        ending = [r for r in self._ranks if group_id in (None, r.group_id)]
        for rank in ending:
            with contextlib.suppress(ProcessLookupError):
                rank.process.kill()
        for rank in ending:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(rank.gone.wait(), STOP_S)


def _alive() -> dict[str, Any]:
    return {"type": "alive", "facts": node_info.changing()}


class _Refused(ClusterError):
    """The head will not have this machine; asking again would not help."""


def run(agent: Agent) -> str:
    """Run an agent until its head ends it or this process is told to end; says why.

    Raises:
        CenacleError: the head refuses this machine.
    """

    async def until_told() -> str:
        loop, own = asyncio.get_running_loop(), asyncio.current_task()
        assert own is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, own.cancel)
        return await agent.run()

    try:
        return asyncio.run(until_told())
    except asyncio.CancelledError:
        return "it was told to end"
