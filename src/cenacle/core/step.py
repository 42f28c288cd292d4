"""."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .request import Request


@dataclass(frozen=True)
class Part:
    """A part of one prompt that is processed in one step.

    Args:
        request: the request's id.
        begin, end: positions of its first token and behind its last; parts follow one another.
        mark: whether what cannot be cut later is kept as it is behind this part.
    """

    request: str
    begin: int
    end: int
    mark: bool = False


@dataclass(frozen=True)
class Reuse:
    """The beginning of an admitted request's prompt need not be computed.

    Args:
        request: the request's id.
        source: of whose cache it is the beginning: a request that runs, or has run.
        tokens: how many tokens of it.
    """

    request: str
    source: str
    tokens: int


@dataclass(frozen=True)
class Page:
    """A part of a prompt's caches, which every rank may have as a file.

    Args:
        key: made of all tokens up to its end, see `engine.pages.keys`.
        parent: key of the page that ends where this one begins; empty at the first token.
        begin, end: positions of its first token and behind its last.
    """

    key: str
    parent: str
    begin: int
    end: int


@dataclass(frozen=True)
class Store:
    """A page is written.

    Args:
        source: name of the cache that is kept and has it.
        page: which part of it.
    """

    source: str
    page: Page


@dataclass(frozen=True)
class Load:
    """A cache that pages make, as if it had been kept.

    Args:
        name: by which it is spoken of then.
        pages: in order, from the first token on.
    """

    name: str
    pages: tuple[Page, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Load:
        """Read what `asdict` gave."""
        return cls(data["name"], tuple(Page(**p) for p in data["pages"]))


@dataclass(frozen=True)
class Step:
    """One step of the group: every rank takes it or none does.

    Args:
        number: counts from 0; a rank that sees a gap refuses to go on.
        admitted: requests that the ranks get with this step.
        cancelled: ids of requests that end before this step.
        measured: whether ranks take their clocks (costs a synchronisation per layer).
        prefill: prompts of which a chunk is processed in this step.
        reused: what the admitted need not compute.
        kept: which of the cancelled have their caches kept.
        dropped: whose caches are let go, behind all else in this step.
        started: the last parts of prompts, processed together, whose requests join those that are
            answered.
        removed: keys of pages whose files go, before others are written.
        stored: pages that are written.
        sought: pages of which ranks say, when they know, whether they can read them all.
        loaded: those of which all ranks have said so: they are read, before
            anything is removed or reused.
    """

    number: int
    admitted: tuple[Request, ...] = ()
    cancelled: tuple[str, ...] = ()
    measured: bool = False
    prefill: tuple[Part, ...] = ()
    started: tuple[Part, ...] = ()
    reused: tuple[Reuse, ...] = ()
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    stored: tuple[Store, ...] = ()
    sought: tuple[Load, ...] = ()
    loaded: tuple[Load, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Step:
        """Read what `to_json` gave."""
        return cls(
            data["number"],
            tuple(Request.from_json(r) for r in data["admitted"]),
            tuple(data["cancelled"]),
            data["measured"],
            tuple(Part(**p) for p in data["prefill"]),
            tuple(Part(**p) for p in data["started"]),
            tuple(Reuse(**r) for r in data["reused"]),
            tuple(data["kept"]),
            tuple(data["dropped"]),
            tuple(data["removed"]),
            tuple(Store(s["source"], Page(**s["page"])) for s in data["stored"]),
            tuple(Load.from_json(x) for x in data["sought"]),
            tuple(Load.from_json(x) for x in data["loaded"]),
        )
