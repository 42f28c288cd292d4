"""Steps: what every rank does at the same time.

Owns: `Step` and its parts; plain data with a JSON form.
Does not know: MLX, sockets, time, how steps are chosen.
Invariant: all ranks take the same steps in the same order.
Next: `scheduler/scheduler.py` makes steps, `engine/engine.py` carries them out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from .request import Request


@dataclass(frozen=True)
class PromptChunk:
    """Part of a prompt that is processed in one step.

    Args:
        request_id: whose prompt.
        begin, end: positions [begin, end); chunks of a prompt are contiguous.
        checkpoint: keep a copy, at `end`, of the caches that cannot be truncated later.
    """

    request_id: str
    begin: int
    end: int
    checkpoint: bool = False


@dataclass(frozen=True)
class PrefixReuse:
    """An admitted request starts from the beginning of an existing cache.

    Args:
        request_id: the admitted request.
        source: name of the cache: a request that is running or has ended, or a `PageLoad`.
        tokens: how many tokens of it to reuse.
    """

    request_id: str
    source: str
    tokens: int


@dataclass(frozen=True)
class Page:
    """Part of a prompt's cache, stored as one file on each rank.

    Args:
        key: hash of all tokens up to `end`, see `scheduler.disk_index.page_keys`.
        parent: key of the page that ends at `begin`; empty for the first page.
        begin, end: positions [begin, end).
    """

    key: str
    parent: str
    begin: int
    end: int


@dataclass(frozen=True)
class PageWrite:
    """Write `page` from the retained cache named `source`."""

    source: str
    page: Page


@dataclass(frozen=True)
class PageLoad:
    """A cache read from pages.

    Args:
        name: name of the cache in later steps.
        pages: contiguous, from the first token on.
    """

    name: str
    pages: tuple[Page, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PageLoad:
        """Read the output of `asdict`."""
        return cls(data["name"], tuple(Page(**p) for p in data["pages"]))


@dataclass(frozen=True)
class PageReport:
    """What has become of pages on one rank's disk.

    Args:
        written: key and bytes of a page that was written.
        failed: key of a page that could not be written.
        checked: name of a `PageLoad`, and keys of its pages that cannot be read.
        notices: what the user should know, as sentences.
    """

    written: tuple[str, int] | None = None
    failed: str | None = None
    checked: tuple[str, list[str]] | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of the group. Every rank takes it or none does.

    Args:
        number: counts from 0; a rank that sees a gap raises.
        admitted: requests that start with this step.
        cancelled: ids of requests that end before this step.
        measured: whether ranks time this step (one synchronization per layer).
        prefill: prompt chunks, each processed in a pass of its own.
        final_chunks: last chunks of prompts, processed together; their requests join the batch.
        reused: cached prefixes of admitted requests.
        retained: ids of cancelled requests whose caches stay available for reuse.
        evicted: names of caches to free at the end of this step.
        page_removals: keys of pages to delete, before any page is written.
        page_writes: pages to write.
        page_checks: pages that ranks verify; each reports whether it can read them all.
        page_loads: pages that every rank has verified; read before anything is removed or reused.
    """

    number: int
    admitted: tuple[Request, ...] = ()
    cancelled: tuple[str, ...] = ()
    measured: bool = False
    prefill: tuple[PromptChunk, ...] = ()
    final_chunks: tuple[PromptChunk, ...] = ()
    reused: tuple[PrefixReuse, ...] = ()
    retained: tuple[str, ...] = ()
    evicted: tuple[str, ...] = ()
    page_removals: tuple[str, ...] = ()
    page_writes: tuple[PageWrite, ...] = ()
    page_checks: tuple[PageLoad, ...] = ()
    page_loads: tuple[PageLoad, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads."""
        admitted = [request.to_json() for request in self.admitted]
        return asdict(replace(self, admitted=())) | {"admitted": admitted}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Step:
        """Inverse of `to_json`."""
        return cls(
            data["number"],
            tuple(Request.from_json(r) for r in data["admitted"]),
            tuple(data["cancelled"]),
            data["measured"],
            tuple(PromptChunk(**c) for c in data["prefill"]),
            tuple(PromptChunk(**c) for c in data["final_chunks"]),
            tuple(PrefixReuse(**r) for r in data["reused"]),
            tuple(data["retained"]),
            tuple(data["evicted"]),
            tuple(data["page_removals"]),
            tuple(PageWrite(w["source"], Page(**w["page"])) for w in data["page_writes"]),
            tuple(PageLoad.from_json(x) for x in data["page_checks"]),
            tuple(PageLoad.from_json(x) for x in data["page_loads"]),
        )
