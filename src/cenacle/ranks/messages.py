"""The messages between the front and a rank.

Owns: their fields.
Does not know: sockets (`channel.py`), who sends what when (`rank_group.py`, `worker.py`).
Invariant: each side reads them with `message.parse`, which checks every field.

    front -> rank    LoadOrder, then StepOrder for each step, at the end Stop; VocabularyUpload
                     before the first step with a grammar; to rank 0 also ImageUpload, before the
                     step that admits the image's request
    rank -> front    Hello, LoadProgress, Ready, StepResult for each step, PageUpdate when the disk
                     has something to report, Heartbeat all the time; RankFailure instead of any

Programs that measure instead of serving get a MeasureOrder and answer with Ready.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from ..core.emulation import EmulationStats
from ..core.plan import Plan
from ..core.request import PromptLogprobs, TokenEvent
from ..core.step import PageReport, Step
from ..engine.speculative.ngram import DraftStats
from ..errors import CenacleError, error_from_json, error_to_json
from ..message import Count, Message, Range, Seconds
from ..scheduler.prefix_index import CacheFootprint
from .step_timings import StepReport

ProcessId = Annotated[int, Range(2, 2**31 - 1)]  # never one that `kill` takes for a group


@dataclass(frozen=True)
class Hello(Message, type="hello"):
    """The first message of a rank.

    Args:
        token: proves that the front started this process.
    """

    epoch: Count
    rank: Count
    pid: ProcessId
    token: str


@dataclass(frozen=True)
class RankMemory(Message):
    """Memory of a rank and of the machine that it runs on."""

    resident_bytes: Count
    total_bytes: Count
    available_bytes: Count


@dataclass(frozen=True)
class RankDisk(Message):
    """The file system that a rank's model is on; `free_bytes` for this user."""

    total_bytes: Count
    free_bytes: Count


@dataclass(frozen=True)
class Heartbeat(Message, type="heartbeat"):
    """The rank is alive.

    Args:
        memory: of the rank and its machine.
        disk: of its model; None: not known yet.
        sent_bytes: that it has put into all-reduces since it started.
    """

    memory: RankMemory | None = None
    disk: RankDisk | None = None
    sent_bytes: Count = 0


@dataclass(frozen=True)
class LoadOrder(Message, type="load"):
    """Which part of which model to load, and how to run it; see `runtime.LoadOptions`.

    Args:
        folder: the checkpoint on the rank's machine.
        engine: fields of `EngineOptions`.
        draft_model: fields of `DraftModelConfig`; None: no draft model.
        bandwidth_gb_s: see `LoadOptions`.
        checksums: report checksums of the loaded weights.
    """

    folder: str
    plan: Plan
    kernels: str
    backend: str = ""
    comm_dtype: str = "f32"
    latency_s: Seconds = 0.0
    bandwidth_gb_s: tuple[float, ...] | None = None
    activations: str = "int16"
    engine: Mapping[str, Any] = field(default_factory=dict)
    draft_model: Mapping[str, Any] | None = None
    checksums: bool = False


@dataclass(frozen=True)
class MeasureOrder(Message, type="measure"):
    """Form a group that measures instead of serving."""

    nodes: Count
    backend: str = ""


@dataclass(frozen=True)
class LoadProgress(Message, type="load_progress"):
    """Bytes of weights that are loaded."""

    done_bytes: Count
    total_bytes: Count


@dataclass(frozen=True)
class Ready(Message, type="ready"):
    """The rank can take steps.

    Args:
        device: what it computes with.
        peak_rss_bytes: largest resident memory so far.
        available_bytes: memory of the machine that is left.
        footprint: memory of a KV cache by length.
        pages: pages in its prefix cache on disk, longest unused first; None: it can write none.
        notices: what the user should know, as sentences.
        checksums: of the loaded weights, if the order asked for them.
    """

    device: str = ""
    peak_rss_bytes: Count = 0
    available_bytes: Annotated[int, Range(-(2**60), 2**60)] = 0
    footprint: CacheFootprint = field(default_factory=lambda: CacheFootprint(0))
    pages: tuple[tuple[str, str, int, int, int], ...] | None = None
    notices: tuple[str, ...] = ()
    checksums: Mapping[str, list[int]] | None = None


@dataclass(frozen=True)
class StepOrder(Message, type="step"):
    """Take the next step."""

    epoch: Count
    step: Step


@dataclass(frozen=True)
class ImageUpload(Message, type="image"):
    """The pixels of an image of a request that is about to be admitted.

    Args:
        request_id: whose.
        index: which of its images.
        pixels: see `PromptImage`, in base64.
    """

    epoch: Count
    request_id: str
    index: Count
    pixels: str


@dataclass(frozen=True)
class VocabularyUpload(Message, type="vocabulary"):
    """The model's tokens, for grammars; see `SerializedTokenizer`."""

    epoch: Count
    text: str
    stop_tokens: tuple[int, ...]


@dataclass(frozen=True)
class StepResult(Message, type="step_result"):
    """A step is finished.

    Args:
        report: clocks, if the step was a measured one.
        drafts: what was drafted since the last step.
        prompt_logprobs: of prompts in this step; only rank 0 sends them.
        emulation: of passes since the last step, on an emulated machine.
    """

    epoch: Count
    number: Count
    tokens: tuple[TokenEvent, ...]
    report: StepReport | None = None
    drafts: DraftStats = field(default_factory=DraftStats)
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    emulation: EmulationStats | None = None


@dataclass(frozen=True)
class PageUpdate(Message, type="pages"):
    """What has become of pages on the rank's disk."""

    epoch: Count
    report: PageReport


@dataclass(frozen=True)
class RankFailure(Message, type="error"):
    """The rank ends. `error` is what `errors.error_to_json` gives."""

    epoch: Count
    error: Mapping[str, Any]

    @classmethod
    def of(cls, epoch: int, error: CenacleError) -> RankFailure:
        """The message for an error."""
        return cls(epoch, error_to_json(error))

    def to_error(self, prefix: str = "") -> CenacleError:
        """The error, with `prefix` in front of its text."""
        return error_from_json(self.error, prefix)


@dataclass(frozen=True)
class Stop(Message, type="stop"):
    """The rank is to end."""
