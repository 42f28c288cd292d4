"""The program on each node of a cluster: it reports to the head and carries out its orders.

Owns: the node's connection to the head, the node's ranks, relaying their messages, and the
download of the node's part of the model.
Does not know: models, plans, or what a group is for.
Invariant: it obeys only the head of its own cluster, which has to prove that it is. When the
connection to the head is lost, or this process ends, all ranks here end too. An agent never gives
up on a head that does not answer.
Next: `head.py` is the other side; `rank_processes.py` starts the ranks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import net, paths
from ..collective import socket_options
from ..core.link import Link
from ..core.units import format_bytes
from ..errors import CenacleError, ClusterError, error_from_json, error_to_json, printable
from ..message import Message, parse
from ..ranks.channel import ChannelClosed
from . import doctor, framing, link_probe, membership, messages, node_info
from .download import node_cache
from .download.task import DownloadOrder, DownloadTask, HeadSource
from .rank_processes import RankProcess, RankProcesses
from .relay import Stream, relay
from .security import identity as identities
from .security import pairing

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 0.25
METRICS_EVERY = 4  # heartbeats; the others have no metrics
SEND_TIMEOUT_S = membership.HEARTBEAT_TIMEOUT_S
# Longer than the head waits for agents: after a network outage the head's TCP may retransmit a
# second later, and the head may not have noticed the outage.
HEAD_TIMEOUT_S = 6.0
CONNECT_TIMEOUT_S = 5.0
RECONNECT_DELAYS_S = (0.2, 0.5, 1.0, 2.0)
DOWNLOAD_WAIT_S = 1.0
DOWNLOAD_REPORT_INTERVAL_S = 10.0


class _ShutdownReceived(Exception):
    """The head told this agent to end, with the reason."""


class _Rejected(ClusterError):
    """The head refuses this node, and would refuse it again."""


class Agent:
    """The agent of a node.

    Args:
        identity: of the node.
        host, port: of the head.
        model_folders: where models are looked for, in this order.
        report: told, in sentences, what happens.
        download_folder: for parts of models; None: `paths.models_dir`.
    """

    def __init__(
        self,
        identity: identities.Identity,
        host: str,
        port: int,
        model_folders: list[Path],
        report: Callable[[str], None] = lambda _: None,
        download_folder: Path | None = None,
    ) -> None:
        self._identity, self._host, self._port = identity, host, port
        self._head_address = net.format_address(host, port)
        self._model_folders, self._report = model_folders, report
        self._download_folder = download_folder or paths.models_dir()
        self._ranks = RankProcesses()
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_report = ""
        self._verified: set[Path] = set()  # downloads that were compared with their checksums
        self._download: DownloadTask | None = None
        self._handlers: dict[type[Message], Callable[[Any], Awaitable[Message]]] = {
            messages.FindModel: self._find_model,
            messages.StartDownload: self._start_download,
            messages.WaitForDownload: self._wait_for_download,
            messages.FindPorts: self._find_ports,
            messages.ServeProbe: self._serve_probe,
            messages.ProbeLink: self._probe_link,
            messages.StartRank: self._start_rank,
            messages.StopRanks: self._stop_ranks,
            messages.Diagnose: self._diagnose,
        }

    async def run(self) -> str:
        """Serve the head until it tells this agent to end; returns the reason.

        Raises:
            CenacleError: the head refuses this node.
        """
        info = await asyncio.to_thread(node_info.describe_node)
        attempt = 0
        try:
            while True:
                started_s = time.monotonic()
                try:
                    await self._serve_head(info)
                except _ShutdownReceived as shutdown:
                    return str(shutdown)
                except _Rejected:
                    raise
                except (OSError, ClusterError) as error:
                    self._report_once(self._describe_failure(error))
                lasted_s = time.monotonic() - started_s
                attempt = 0 if lasted_s > 2 * RECONNECT_DELAYS_S[-1] else attempt + 1
                await asyncio.sleep(RECONNECT_DELAYS_S[min(attempt, len(RECONNECT_DELAYS_S) - 1)])
        finally:
            await self._ranks.kill()
            if self._writer is not None:
                framing.abort(self._writer)
            for task in self._tasks:
                task.cancel()

    # ---- The connection -----------------------------------------------------------------------

    async def _connect(self) -> Stream:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(
                    self._host,
                    self._port,
                    ssl=self._identity.client_tls_context(),
                    server_hostname=identities.SERVER_NAME,
                    limit=framing.CHUNK_BYTES,
                )
        except TimeoutError:
            raise ChannelClosed(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        socket_options.configure_socket(writer.get_extra_info("socket"))
        return reader, writer

    async def _serve_head(self, info: messages.NodeInfo) -> None:
        """Hold one connection to the head until it ends."""
        reader, writer = await self._connect()
        self._writer = writer
        heartbeats: asyncio.Task[None] | None = None
        try:
            info = replace(info, available_bytes=node_info.available_bytes())
            hello = messages.AgentHello(node_info.versions(), self._ranks.group_id, info.to_json())
            await framing.send(writer, hello, SEND_TIMEOUT_S)
            while True:
                message: Message = await framing.receive(
                    reader,
                    HEAD_TIMEOUT_S,
                    messages.Welcome,
                    messages.Heartbeat,
                    messages.OrderRequest,
                    messages.Shutdown,
                    messages.Rejection,
                )
                match message:
                    case messages.Welcome(name=name):
                        self._report_once(f"{name} is in the cluster of {self._head_address}")
                        heartbeats = self._spawn(self._send_heartbeats(writer))
                    case messages.OrderRequest():
                        self._spawn(self._carry_out(message, writer))
                    case messages.Shutdown(reason=reason):
                        with suppress(ClusterError):
                            await framing.send(writer, messages.Leaving(), 1)
                        raise _ShutdownReceived(reason)
                    case messages.Rejection(error=data, retry=retry):
                        reason = str(error_from_json(data))
                        raise ClusterError(reason) if retry else _Rejected(reason)
        finally:
            if heartbeats is not None:
                heartbeats.cancel()
            if self._download is not None:
                self._download.stop()  # the head orders it again
            framing.abort(writer)
            await self._ranks.kill()

    async def _send_heartbeats(self, writer: asyncio.StreamWriter) -> None:
        with suppress(ClusterError):
            for count in itertools.count(1):
                await asyncio.sleep(HEARTBEAT_INTERVAL_S)
                with_metrics = count % METRICS_EVERY == 0
                await framing.send(writer, _heartbeat(with_metrics), SEND_TIMEOUT_S)

    async def _carry_out(
        self, request: messages.OrderRequest, writer: asyncio.StreamWriter
    ) -> None:
        try:
            order = parse(request.order, *messages.ORDERS)
            result = await self._handlers[type(order)](order)
            answer = messages.OrderResult(request.id, result=result.to_json())
        except CenacleError as error:
            answer = messages.OrderResult(request.id, error=error_to_json(error))
        except Exception as error:  # an order that this node cannot carry out, for whatever reason
            if not isinstance(error, OSError):
                log.exception("an order of the head failed")
            failure = ClusterError(str(error) or type(error).__name__)
            answer = messages.OrderResult(request.id, error=error_to_json(failure))
        with suppress(ClusterError):
            await framing.send(writer, answer, SEND_TIMEOUT_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _report_once(self, text: str) -> None:
        if text != self._last_report:
            self._last_report = text
            self._report(printable(text))

    def _describe_failure(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"{self._head_address} is not the head of this node's cluster; waiting for the head"
            )
        reason = str(error)
        if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
            reason = os.strerror(error.errno)  # asyncio's text has numbers and tuples
        return f"the head at {self._head_address} does not answer ({reason}); waiting for it"

    # ---- Orders: the model --------------------------------------------------------------------

    async def _find_model(self, order: messages.FindModel) -> messages.ModelLocation:
        model = await asyncio.to_thread(
            node_cache.find_local_model,
            order.model,
            order.digest,
            order.config_sha256,
            self._model_folders,
            self._download_folder,
        )
        return messages.ModelLocation(model.folder, model.is_complete)

    async def _start_download(self, order: messages.StartDownload) -> messages.Done:
        folder, previous = Path(order.folder), self._download
        if folder.parent.resolve() != self._download_folder.resolve():
            raise ClusterError(
                f"start_download.folder: expected a folder in {self._download_folder}, got {folder}"
            )
        try:
            ranges = DownloadOrder.from_json(order.order)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ClusterError(f"start_download.order: {error!r}") from None
        head = HeadSource(self._identity, self._host, self._port)
        self._download = DownloadTask(folder, ranges, head, self._verified, previous)
        self._spawn(self._report_download(self._download, order.model))
        return messages.Done()

    async def _report_download(self, download: DownloadTask, model: str) -> None:
        reported_s = time.monotonic()
        try:
            while not await asyncio.to_thread(download.wait, DOWNLOAD_WAIT_S):
                if time.monotonic() - reported_s > DOWNLOAD_REPORT_INTERVAL_S:
                    reported_s += DOWNLOAD_REPORT_INTERVAL_S
                    done, total = (
                        format_bytes(download.done_bytes),
                        format_bytes(download.total_bytes),
                    )
                    self._report(f"{model}: downloaded {done} of {total}")
        except CenacleError as error:
            self._report(f"{model}: {error}")
            return
        if download.damaged_bytes:
            damaged = format_bytes(download.damaged_bytes)
            self._report(f"{model}: {damaged} on disk were damaged and were downloaded again")
        if download.fetched_bytes:
            self._report(
                f"{model}: downloaded {format_bytes(download.fetched_bytes)} into {download.folder}"
            )

    async def _wait_for_download(
        self, order: messages.WaitForDownload
    ) -> messages.DownloadProgress:
        del order
        download = self._download
        if download is None:
            raise ClusterError("no download was started")
        finished = await asyncio.to_thread(download.wait, DOWNLOAD_WAIT_S)
        progress = messages.DownloadProgress(
            finished, download.done_bytes, download.total_bytes, str(download.folder)
        )
        if not finished:
            return progress
        digest = await asyncio.to_thread(node_info.checkpoint_digest, download.folder)
        return replace(progress, digest=digest, downloaded_bytes=download.fetched_bytes)

    # ---- Orders: the node ---------------------------------------------------------------------

    async def _find_ports(self, order: messages.FindPorts) -> messages.Ports:
        return messages.Ports(tuple(net.free_ports(order.count, order.address)))

    async def _serve_probe(self, order: messages.ServeProbe) -> messages.ProbePort:
        port = link_probe.serve_probe(order.address, pairing.decode(order.secret))
        return messages.ProbePort(port)

    async def _probe_link(self, order: messages.ProbeLink) -> Link:
        secret = pairing.decode(order.secret)
        return await asyncio.to_thread(link_probe.probe_link, order.address, order.port, secret)

    async def _diagnose(self, order: messages.Diagnose) -> messages.Findings:
        clock_skew_s = order.now_s - time.time()
        facts = await asyncio.to_thread(doctor.gather, self._host)
        findings = doctor.examine(replace(facts, clock_skew_s=clock_skew_s))
        return messages.Findings(
            tuple(
                replace(finding, message=printable(finding.message), fix=printable(finding.fix))
                for finding in findings
            )
        )

    # ---- Orders: ranks ------------------------------------------------------------------------

    async def _start_rank(self, order: messages.StartRank) -> messages.RankStarted:
        rank, control = await self._ranks.start(order)
        self._spawn(self._relay(order.relay, control))
        self._spawn(self._watch(rank))
        return messages.RankStarted(rank.process.pid)

    async def _relay(self, name: str, control: socket.socket) -> None:
        local = await asyncio.open_unix_connection(sock=control, limit=framing.CHUNK_BYTES)
        try:
            stream = await self._connect()
            await framing.send(stream[1], messages.RelayHello(name), SEND_TIMEOUT_S)
            await framing.receive(stream[0], SEND_TIMEOUT_S, messages.Welcome)
            await relay(local, stream)
        except (OSError, ClusterError) as error:
            log.info("the connection of a rank ended: %s", error)
        finally:
            local[1].close()

    async def _watch(self, rank: RankProcess) -> None:
        """Wait until a rank has ended, and report a failure."""
        try:
            reason = await rank.wait()
            if reason is not None and self._writer is not None:
                message = messages.RankExited(rank.group_id, rank.rank, rank.process.pid, reason)
                with suppress(ClusterError):
                    await framing.send(self._writer, message, SEND_TIMEOUT_S)
        finally:
            self._ranks.remove(rank)

    async def _stop_ranks(self, order: messages.StopRanks) -> messages.Done:
        await self._ranks.stop(order.group_id, order.timeout_s)
        if self._writer is not None:
            # The next plan depends on the memory that is free now.
            with suppress(ClusterError):
                await framing.send(self._writer, _heartbeat(with_metrics=True), SEND_TIMEOUT_S)
        return messages.Done()


def _heartbeat(with_metrics: bool) -> messages.Heartbeat:
    return messages.Heartbeat(node_info.available_bytes() if with_metrics else None)


def run(agent: Agent) -> str:
    """Run an agent until the head ends it or this process gets SIGTERM or SIGINT.

    Returns:
        Why it ended.

    Raises:
        CenacleError: the head refuses this node.
    """

    async def run_until_signal() -> str:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        return await agent.run()

    try:
        return asyncio.run(run_until_signal())
    except asyncio.CancelledError:
        return "this process was told to end"
