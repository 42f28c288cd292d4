"""Finding a head in the local network by name (mDNS), instead of typing its address.

Owns: saying that a head is here, and looking for heads.
Does not know: tokens, certificates.
Invariant: what is found is an address and nothing more: whoever answers has to prove that it knows
the token, as any head (`pairing.py`); without multicast nothing else fails.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zeroconf import Error, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from ..errors import ClusterError, InputError

SERVICE = "_cenacle._tcp.local."
LOOK_S = 3.0
ASK_S = 2.0


@dataclass(frozen=True)
class Found:
    """A head: its name, and where it says that it listens."""

    name: str
    host: str
    port: int


class Announced:
    """A head that can be found, until it is closed.

    Args:
        name: of the head's machine.
        addresses: where it can be reached; loopback ones are left out.
        port: where machines join.
        say: told why it cannot be found, if so; from another thread, as asking around whether the
            name is taken lasts a second.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        port: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._say = say
        self._closing = threading.Event()
        reachable = [a for a in addresses if not ipaddress.ip_address(a).is_loopback]
        label = name.replace(".", "-")[:40] or "head"
        info = ServiceInfo(
            SERVICE,
            f"{label}.{SERVICE}",
            port=port,
            parsed_addresses=reachable,
            server=f"{label}.cenacle.local.",
        )
        self._thread = threading.Thread(target=self._run, args=(info,), daemon=True)
        if reachable:  # else it listens on this machine only
            self._thread.start()

    def _run(self, info: ServiceInfo) -> None:
        try:
            with Zeroconf() as here:
                # Another head of this name: then this one is announced as NAME-2.
                here.register_service(info, allow_name_change=True)
                self._closing.wait()
        except (OSError, Error) as error:
            self._say(f"{type(error).__name__} {error}".strip())

    def close(self) -> None:
        """Say goodbye. Safe to call again."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5)


def look(seconds: float = LOOK_S) -> list[Found]:
    """All heads that answer within some seconds, by name.

    Raises:
        ClusterError: this machine has no network where one could be asked for.
    """
    found: dict[str, Found] = {}
    names: set[str] = set()
    lock = threading.Lock()

    def seen(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        del zeroconf, service_type
        with lock:
            if state_change is ServiceStateChange.Removed:
                names.discard(name)
            else:
                names.add(name)

    try:
        asking = Zeroconf()
    except (OSError, Error) as error:
        raise ClusterError(
            f"heads cannot be looked for here ({error}): give the address that `cenacle up` prints"
        ) from error
    try:
        browser = ServiceBrowser(asking, SERVICE, handlers=[seen])
        threading.Event().wait(seconds)
        with lock:
            every = sorted(names)
        for name in every:
            info = asking.get_service_info(SERVICE, name, timeout=int(1000 * ASK_S))
            if info is None or not info.port:
                continue
            address = _reachable(info.parsed_scoped_addresses(), info.port)
            if address is not None:
                label = name.removesuffix(f".{SERVICE}")
                found[label] = Found(label, address, info.port)
        browser.cancel()
    finally:
        asking.close()
    return list(found.values())


def _reachable(addresses: Sequence[str], port: int) -> str | None:
    """The first address that takes a connection, else the first."""
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=ASK_S).close()
        except OSError:
            continue
        return address
    return addresses[0] if addresses else None


def choose(found: Sequence[Found], name: str | None = None) -> Found:
    """The head that is meant.

    Args:
        found: see `look`.
        name: of the head's machine; None: the only one.

    Raises:
        ClusterError: there is none.
        InputError: there are several, or none of that name.
    """
    if not found:
        raise ClusterError(
            "no head was found in this network (mDNS): give the address that `cenacle up` "
            "prints, cenacle join HOST:PORT --token ..."
        )
    wanted = [f for f in found if name in (None, f.name)]
    if len(wanted) == 1:
        return wanted[0]
    every = ", ".join(f"{f.name} ({f.host}:{f.port})" for f in found)
    if name is None:
        raise InputError(
            f"there are several heads in this network: {every}; say which with --cluster NAME",
            "cluster",
        )
    raise InputError(f"--cluster: no head is called {name}; there are: {every}", "cluster")
