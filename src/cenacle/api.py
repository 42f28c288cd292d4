"""The program from Python: `with cenacle.load(model, nodes=2) as m: m.generate(...)`.

Owns: putting the parts together, and prompts in text against tokens in the group.
Does not know: HTTP, terminals. The verbs and the server are thin over this.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .core.chat import Message
from .core.model_spec import ModelSpec
from .core.plan import Plan
from .core.request import Request, Sampling, TokenEvent
from .engine.memory import estimate_memory
from .engine.sampling.grammar import Vocabulary, check_grammar
from .engine.speculative.draft_model import DraftModelConfig
from .errors import CenacleError, CheckpointError, ClusterError, InputError
from .model.checkpoint import Checkpoint, locate_checkpoint
from .ranks.local_ranks import LocalRanks
from .ranks.rank_group import RankGroup
from .ranks.ranks import Epoch, Ranks
from .ranks.step_timings import StepTimings
from .runtime import (
    LoadOptions,
    _check_comm_dtype,
    _check_memory,
    _choose,
    _room,
    _scheduler,
    _text,
)
from .text.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from .cluster.formation import Joined  # needs libraries that one machine alone does not
    from .verification import Seen, SelfTest

Prompt = str | Sequence[int] | Sequence[Message]
"""Text (rendered as a user's message where the model has a chat template), ids, or a chat."""

DEFAULT_MAX_TOKENS = 512
ANSWER_DEADLINE_S = 900.0  # longer than any step may take: the group fails before


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer: its token, the text that became certain, and why it ended or None.

    `logprob` and `top` are those of `TokenEvent`.
    """

    token: int
    text: str
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    Args:
        text: without the stop token or stop string.
        tokens: the generated ids, the stop token included.
        finish: "stop" or "length".
        prompt_tokens: how many there were.
        first_token_s: seconds from asking to the first token.
        tok_per_s: tokens after the first, over the time since the first (0.0 for a single one).
        step_timings_ms: where the time of a token went, see `docs/metrics.md`.
        routed: layer -> expert -> times chosen, in measured steps.
    """

    text: str
    tokens: list[int]
    finish: str
    prompt_tokens: int
    first_token_s: float
    tok_per_s: float
    step_timings_ms: dict[str, float]
    nodes: int
    routed: dict[int, dict[int, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields above."""
        return asdict(self)


def load(
    model: str,
    nodes: int = 1,
    *,
    progress: Callable[[int, int, int], None] | None = None,
    **options: Any,
) -> Model:
    """Start `nodes` local processes that hold a model together.

    Args:
        model, nodes, options: see `LoadOptions`.
        progress: called with rank, bytes loaded and bytes in all.

    Raises:
        InputError: an unknown option or value, or options that do not go together.
        CheckpointError, PlanError, ClusterError: see those. No process is left.
    """
    try:
        how = LoadOptions(model, nodes, **options)
    except TypeError as error:
        raise InputError(f"unknown option: {error}") from error
    return Model.load(how, progress=progress)


def _load(
    how: LoadOptions,
    progress: Callable[[int, int, int], None] | None = None,
    joined: Joined | None = None,
    selftest: SelfTest | None = None,
    sums: bool = False,
) -> Model:
    if joined is None:
        _check_comm_dtype(how)
    model, kernels, options, reason = how.model, how.kernels, how.engine, ""
    checkpoint = Checkpoint.open(
        locate_checkpoint(model) if joined is None else joined.locate(model)
    )
    # A hub repository's folder is named after a commit.
    name = checkpoint.folder.resolve().name if Path(model).expanduser().exists() else model
    text = _text(checkpoint)
    drafting = None
    if how.draft_model is not None:
        drafting = DraftModelConfig.inspect(
            how.draft_model,
            checkpoint,
            text,
            kernels,
            options.speculative,
            plain_kv_cache=options.plain_kv_cache,
        )
    if joined is not None:
        plan, reason = joined.form(name, checkpoint, options, kernels, drafting)
    else:
        plan, reason = _choose(checkpoint, how)
    need = estimate_memory(checkpoint.config, plan, 0, options, kernels, drafting)
    if joined is None:
        _check_memory(need)
    order = {
        "type": "load",
        "folder": str(checkpoint.folder.resolve()),
        "plan": plan.to_json(),
        "wire": how.comm_dtype,
        "latency_s": how.latency_s,
        "kernels": kernels,
        "activations": how.activations,
        "options": asdict(options),
        "draft": asdict(drafting) if drafting is not None else None,
        "sums": sums,
    }
    if selftest is not None:
        decisive = {k: v for k, v in order.items() if k not in ("folder", "plan", "type", "sums")}

        def alone() -> Seen:
            from .verification import see

            one = _load(
                LoadOptions(
                    str(checkpoint.folder.resolve()),
                    kernels=kernels,
                    activations=how.activations,
                    speculative=how.speculative,
                    max_batch_size=how.max_batch_size,
                    kv_cache_gb=how.kv_cache_gb,
                    prefix_cache_gb=how.prefix_cache_gb,
                    prefill_chunk_size=how.prefill_chunk_size,
                    kv_bits=how.kv_bits,
                    kv_group_size=how.kv_group_size,
                    max_kv_size=how.max_kv_size,
                    recover=False,
                ),
                sums=True,
            )
            with one:
                return see(one, 0)

        formed = joined.formed if joined is not None else None
        measure = joined.measure_again if joined is not None else dict
        order["sums"] = selftest.before(checkpoint, plan, decisive, alone, formed, measure)

    def start(epoch: Epoch, report: Callable[[int, int, int], None] | None = None) -> LocalRanks:
        now = {**order, "sums": order["sums"] and epoch.number == 0}
        if joined is not None:
            found = joined.start(now, report, epoch)
            if epoch.number:  # on other machines, or with another plan
                need = estimate_memory(checkpoint.config, found.plan, 0, options, kernels, drafting)
                scheduler.resize(*_room(found.ready, options, need.kv_cache, 1))
            return found
        ranks = LocalRanks(
            plan.nodes, how.backend, cores=how.cores, threads=how.threads, epoch=epoch
        )
        try:
            ranks.load(now, report)
        except BaseException:
            ranks.close(now=True)
            raise
        return ranks

    ranks = start(Epoch(0, threading.Event()), progress)
    sharing = plan.nodes if joined is None else 1
    scheduler = _scheduler(ranks.ready, options, how.measure_every, need.kv_cache, sharing)
    group = RankGroup(ranks, scheduler, start=start if how.recover else None)
    loaded = Model(name, plan, text, group, reason, checkpoint.config)
    if selftest is not None:
        try:
            selftest.after(loaded, how.measure_every, how.latency_s)
        except BaseException:
            loaded.close()
            raise
    if joined is not None and how.recover:
        joined.serves(group.reform)
    return loaded


class Model:
    """A model that is loaded and answers; close it, or use it in a `with` statement."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        text: ChatTokenizer | None,
        group: RankGroup,
        plan_reason: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.name, self._plan, self.group = name, plan, group
        self.plan_reason = plan_reason  # why this plan, in one line
        self.config = config or {}  # the checkpoint's config.json
        self._text = text
        self._vocabulary = Vocabulary(lambda: self.text)

    @classmethod
    def load(
        cls,
        options: LoadOptions,
        *,
        progress: Callable[[int, int, int], None] | None = None,
        joined: Joined | None = None,
        selftest: SelfTest | None = None,
    ) -> Model:
        """As `cenacle.load`, with the options in one object.

        Args:
            joined: start the ranks on the machines of a cluster; it decides how many and how to
                place the model.
            selftest: the verification before the model serves.
        """
        return _load(options, progress, joined, selftest)

    @property
    def ranks(self) -> Ranks:
        """The processes that hold the model now."""
        return self.group.ranks

    @property
    def plan(self) -> Plan:
        """Who holds what now: ranks on other machines than before may have another plan."""
        plan: Plan = getattr(self.ranks, "plan", self._plan)
        return plan

    @property
    def spec(self) -> ModelSpec:
        """What the checkpoint is."""
        return self._plan.spec

    @property
    def text(self) -> ChatTokenizer:
        """The tokenizer.

        Raises:
            CheckpointError: the checkpoint has none.
        """
        if self._text is None:
            raise CheckpointError(f"{self.name} has no tokenizer: give the prompt as token ids")
        return self._text

    def request(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        *,
        logprobs: int | None = None,
        grammar: str | None = None,
    ) -> Request:
        """A request for a prompt, checked against the model's context and vocabulary.

        Args:
            prompt, max_tokens: see `stream`.
            sampling, logprobs, grammar: see `Request`.

        Raises:
            InputError: names what is wrong.
        """
        tokens = self.tokens_of(prompt)
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.spec.vocab_size:
            raise InputError(
                f"prompt: expected token ids from 0 to {self.spec.vocab_size - 1}, "
                f"got {min(tokens)} to {max(tokens)}",
                "prompt",
            )
        room = (self.spec.context_length or 2**31) - len(tokens)
        if room < 1:
            raise InputError(
                f"prompt: {len(tokens)} tokens do not fit the model's context of "
                f"{self.spec.context_length}; shorten it by at least {1 - room}",
                "prompt",
            )
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens: expected at least 1, got {max_tokens}", "max_tokens")
        stop = self._text.stop_tokens if self._text is not None else ()
        limit = min(max_tokens or DEFAULT_MAX_TOKENS, room)
        if grammar is not None:
            check_grammar(grammar, self._vocabulary)
        name = uuid.uuid4().hex
        return Request(name, tokens, limit, stop, sampling or Sampling(), logprobs, grammar)

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt in any of its forms."""
        if isinstance(prompt, str):
            if self.text.has_template:
                return self.text.render([{"role": "user", "content": prompt}])
            return self.text.encode(prompt)
        items = list(prompt)
        if items and isinstance(items[0], dict):
            return self.text.render(items)  # type: ignore[arg-type]
        return tuple(items)  # type: ignore[arg-type]

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        grammar: str | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Answer a prompt piece by piece; ending the iteration early cancels the request.

        Args:
            prompt: text, ids or a chat.
            max_tokens: most tokens to generate.
            stop: strings before which the answer ends.
            logprobs: how many alternatives to give with each token's log-probability; None: none.
            grammar: what the answer must match, as llguidance reads it.
            sampling: fields of `Sampling`.

        Raises:
            InputError: a wrong argument.
            ClusterError: the group failed.
        """
        try:
            how = Sampling(**sampling)
        except TypeError as error:
            raise InputError(f"unknown argument: {error}") from error
        request = self.request(prompt, max_tokens, how, logprobs=logprobs, grammar=grammar)
        return self._stream(request, stop)

    def _stream(self, request: Request, stop: Sequence[str]) -> Iterator[Chunk]:
        events: queue.Queue[TokenEvent | CenacleError] = queue.Queue()
        text = self._text.text_stream(stop) if self._text is not None else None
        self.group.submit(request, events.put)
        try:
            while True:
                try:
                    event = events.get(timeout=ANSWER_DEADLINE_S)
                except queue.Empty:
                    raise ClusterError(f"no token came for {ANSWER_DEADLINE_S:g} s") from None
                if isinstance(event, CenacleError):
                    raise event
                piece = text.add(event.token) if text else ""
                if text and event.finish:
                    piece += text.finish()
                stopped = text is not None and text.stopped
                finish = "stop" if stopped else event.finish
                yield Chunk(event.token, piece, finish, event.logprob, event.top)
                if stopped or event.finish:
                    return
        finally:
            self.group.cancel(request.id)

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        stop: Sequence[str] = (),
        keep_timings: bool = False,
        **sampling: Any,
    ) -> Completion:
        """Answer a prompt; arguments and errors as `stream`.

        The terms are those of all requests of the group since this call began, or, with
        `keep_timings`, since the last call without.
        """
        tokens = self.tokens_of(prompt)
        if not keep_timings:
            self.group.step_timings = StepTimings()
        began = time.perf_counter()
        chunks: list[Chunk] = []
        times: list[float] = []
        for chunk in self.stream(tokens, max_tokens, stop=stop, **sampling):
            chunks.append(chunk)
            times.append(time.perf_counter())
        after = times[-1] - times[0]
        return Completion(
            text="".join(c.text for c in chunks),
            tokens=[c.token for c in chunks],
            finish=chunks[-1].finish or "stop",
            prompt_tokens=len(tokens),
            first_token_s=times[0] - began,
            tok_per_s=(len(times) - 1) / after if after > 0 else 0.0,
            step_timings_ms=self.group.step_timings.per_token_ms(),
            nodes=self.plan.nodes,
            routed=self.group.step_timings.routed,
        )

    def ranks_json(self) -> list[dict[str, Any]]:
        """For each rank: its process, device, planned bytes of weights and peak resident bytes
        when it had loaded them."""
        return [
            {
                "rank": rank,
                "pid": self.ranks.pids[rank],
                "device": ready["device"],
                "weights_bytes": self.plan.bytes_of(rank)["total"],
                "peak_rss_bytes": ready["peak_rss_bytes"],
            }
            for rank, ready in enumerate(self.ranks.ready)
        ]

    def close(self) -> None:
        """End the ranks."""
        self.group.close()

    def __enter__(self) -> Model:
        """The model itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the ranks."""
        self.close()


__all__ = ["Chunk", "Completion", "Model", "load"]
