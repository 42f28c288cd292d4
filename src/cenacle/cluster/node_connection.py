"""The head's side of one agent's connection: orders go out, heartbeats and results come in.

Owns: matching results to orders, the relays of the node's ranks, and why the connection ended.
Does not know: membership, other nodes.
Invariant: every order ends with a result, with the agent's error, or with the reason for which the
connection ended; the error carries the node's id.
Next: `agent.py` is the other side.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from ..errors import CenacleError, ClusterError, error_from_json, error_to_json
from ..message import Message, MessageError
from ..ranks.channel import ChannelClosed
from . import framing, membership, messages
from .relay import Relays, Stream

HEARTBEAT_INTERVAL_S = 0.25
SEND_TIMEOUT_S = 4.0
# Membership notices a silent agent earlier.
RECEIVE_TIMEOUT_S = 3 * membership.HEARTBEAT_TIMEOUT_S
R = TypeVar("R", bound=Message)


class NodeConnection:
    """A connected agent.

    Args:
        node_id, name: of its node.
        stream: of the connection.
    """

    def __init__(self, node_id: str, name: str, stream: Stream) -> None:
        self._node_id, self._name = node_id, name
        self._reader, self._writer = stream
        self.local_address: str = self._writer.get_extra_info("sockname")[0]
        self._ids = itertools.count(1)
        self._orders: dict[int, asyncio.Future[messages.OrderResult]] = {}
        self._relays: set[asyncio.Task[Any]] = set()
        self._close_reason = ""

    async def send(self, message: Message, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Send a message; raises as `framing.send`."""
        await framing.send(self._writer, message, timeout_s)

    async def send_heartbeats(self) -> None:
        """Send heartbeats until the connection ends."""
        with suppress(ClusterError):
            while True:
                await asyncio.sleep(HEARTBEAT_INTERVAL_S)
                await self.send(messages.Heartbeat())

    async def receive(
        self, on_message: Callable[[messages.Heartbeat | messages.RankExited], None]
    ) -> str:
        """Handle what the agent sends until the connection ends.

        Returns:
            Why it ended, to follow the node's name.
        """
        reason = "has lost its agent"
        try:
            while True:
                message: Message = await framing.receive(
                    self._reader,
                    RECEIVE_TIMEOUT_S,
                    messages.Heartbeat,
                    messages.OrderResult,
                    messages.RankExited,
                    messages.Leaving,
                )
                match message:
                    case messages.Heartbeat() | messages.RankExited():
                        on_message(message)
                    case messages.OrderResult():
                        future = self._orders.pop(message.id, None)
                        if future is not None and not future.done():
                            future.set_result(message)
                    case messages.Leaving():
                        reason = "has ended its agent"
        except MessageError as error:
            reason = f"sent an invalid message ({error})"
        except ClusterError as error:
            if not isinstance(error, ChannelClosed) or str(error) != "closed the connection":
                reason = str(error)
        return self._close_reason or reason

    async def execute(self, order: messages.Order[R], timeout_s: float) -> R:
        """Have the agent carry out an order.

        Raises:
            CenacleError: the agent's error, with the node's name in front.
            ClusterError: the connection ended, or there was no result in time.
        """
        order_id = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._orders[order_id] = future
        try:
            await self.send(messages.OrderRequest(order_id, order.to_json()))
            answer: messages.OrderResult = await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise self._error(f"did not finish {order.type} in {timeout_s:g} s") from None
        except ClusterError as error:
            raise self._error(str(error)) from None
        finally:
            self._orders.pop(order_id, None)
        if answer.error is not None:
            raise blame(self._node_id, error_from_json(answer.error, f"{self._name}: "))
        try:
            result: Any = order.result_type().from_json(answer.result, f"{order.type}.result")
        except MessageError as error:
            raise self._error(f"sent an invalid message ({error})") from None
        return result

    def _error(self, reason: str) -> CenacleError:
        return blame(self._node_id, ClusterError(f"{self._name} {reason}"))

    async def relay(self, relays: Relays, name: str, stream: Stream) -> None:
        """Serve a relay of one of the node's ranks; it ends with this connection."""
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        try:
            await relays.serve(name, stream)
        finally:
            self._relays.discard(task)

    async def reject(self, error: CenacleError) -> None:
        """Tell the agent why its node cannot take part."""
        with suppress(ClusterError):
            await self.send(messages.Rejection(error_to_json(error)))

    def close(self, reason: str) -> str:
        """Close the connection and all relays; returns the reason, the first one given."""
        self._close_reason = self._close_reason or reason
        framing.abort(self._writer)
        for relay in list(self._relays):
            relay.cancel()
        for future in self._orders.values():
            if not future.done():
                future.set_exception(ClusterError(self._close_reason))
        return self._close_reason


def blame(node_id: str, error: CenacleError) -> CenacleError:
    """The error, with the node that is to blame for it."""
    error.node_id = node_id
    return error
