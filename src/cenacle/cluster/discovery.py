"""Finding a head in the local network by name (mDNS) instead of typing its address.

Owns: announcing a head, and looking for heads.
Does not know: tokens, certificates.
Invariant: a discovered head is only an address; it still has to prove that it knows the token
(`security/pairing.py`). Without multicast nothing else fails.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zeroconf import Error, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from ..errors import ClusterError, InputError

SERVICE_TYPE = "_cenacle._tcp.local."
BROWSE_S = 3.0
RESOLVE_TIMEOUT_S = 2.0
JOIN_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class DiscoveredHead:
    """A head: its name, and where it says that it listens."""

    name: str
    host: str
    port: int


class HeadAnnouncement:
    """Announces a head until it is closed.

    Args:
        name: of the head's machine.
        addresses: where the head can be reached; loopback addresses are left out.
        port: where nodes join.
        on_failure: told, from another thread, why the head cannot be announced.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        port: int,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._on_failure = on_failure
        self._closing = threading.Event()
        reachable = [a for a in addresses if not ipaddress.ip_address(a).is_loopback]
        label = name.replace(".", "-")[:40] or "head"
        info = ServiceInfo(
            SERVICE_TYPE,
            f"{label}.{SERVICE_TYPE}",
            port=port,
            parsed_addresses=reachable,
            server=f"{label}.cenacle.local.",
        )
        # In a thread, because checking that the name is unique takes a second.
        self._thread = threading.Thread(target=self._announce, args=(info,), daemon=True)
        if reachable:  # else the head listens on this machine only
            self._thread.start()

    def _announce(self, info: ServiceInfo) -> None:
        try:
            with Zeroconf() as zeroconf:
                # If another head has this name, this one becomes NAME-2.
                zeroconf.register_service(info, allow_name_change=True)
                self._closing.wait()
        except (OSError, Error) as error:
            self._on_failure(f"{type(error).__name__} {error}".strip())

    def close(self) -> None:
        """Withdraw the announcement. May be called again."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_TIMEOUT_S)


def discover_heads(browse_s: float = BROWSE_S) -> list[DiscoveredHead]:
    """The heads that answer within some seconds, by name.

    Raises:
        ClusterError: this machine has no network to browse.
    """
    names: set[str] = set()
    lock = threading.Lock()

    def on_change(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        del zeroconf, service_type
        with lock:
            if state_change is ServiceStateChange.Removed:
                names.discard(name)
            else:
                names.add(name)

    try:
        zeroconf = Zeroconf()
    except (OSError, Error) as error:
        raise ClusterError(
            f"mDNS is not available ({error}); give the address that `cenacle up` prints"
        ) from error
    try:
        browser = ServiceBrowser(zeroconf, SERVICE_TYPE, handlers=[on_change])
        threading.Event().wait(browse_s)
        with lock:
            found = sorted(names)
        heads = [_resolve(zeroconf, name) for name in found]
        browser.cancel()
    finally:
        zeroconf.close()
    return [head for head in heads if head is not None]


def _resolve(zeroconf: Zeroconf, name: str) -> DiscoveredHead | None:
    info = zeroconf.get_service_info(SERVICE_TYPE, name, timeout=int(1000 * RESOLVE_TIMEOUT_S))
    if info is None or not info.port:
        return None
    address = _first_reachable(info.parsed_scoped_addresses(), info.port)
    if address is None:
        return None
    return DiscoveredHead(name.removesuffix(f".{SERVICE_TYPE}"), address, info.port)


def _first_reachable(addresses: Sequence[str], port: int) -> str | None:
    """The first address that accepts a connection, else the first."""
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=RESOLVE_TIMEOUT_S).close()
        except OSError:
            continue
        return address
    return addresses[0] if addresses else None


def choose_head(heads: Sequence[DiscoveredHead], name: str | None = None) -> DiscoveredHead:
    """The head of that name, or the only one.

    Raises:
        ClusterError: there is none.
        InputError: there are several, or none of that name.
    """
    if not heads:
        raise ClusterError(
            "no head was found by mDNS; give the address that `cenacle up` prints: "
            "cenacle join HOST:PORT --token ..."
        )
    matches = [head for head in heads if name in (None, head.name)]
    if len(matches) == 1:
        return matches[0]
    choices = ", ".join(f"{head.name} ({head.host}:{head.port})" for head in heads)
    if name is None:
        raise InputError(
            f"several heads were found: {choices}; choose one with --cluster NAME", "cluster"
        )
    raise InputError(f"--cluster: expected one of {choices}, got {name}", "cluster")
