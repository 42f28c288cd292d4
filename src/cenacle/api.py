"""The program from Python: `with cenacle.load(model, nodes=2) as m: m.generate(...)`.

Owns: prompts in text, chats or ids against tokens in the group.
Does not know: HTTP, terminals, how ranks are started (`runtime.py`).
Next: the command line and the server use `Model`.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .core.chat import Message
from .core.image import PromptImage
from .core.model_spec import ModelSpec
from .core.plan import Plan
from .core.request import GroupEvent, PromptLogprobs, Request, Sampling
from .engine.sampling.grammar import Vocabulary, check_grammar
from .errors import CenacleError, CheckpointError, ClusterError, InputError
from .images.decode_process import DecodedImage, DecodeProcess
from .images.placement import ImagePlaces, mark_parts
from .images.sources import is_remote, read_data_uri, take_sources
from .load_options import LoadOptions
from .model.generation_config import read_sampling_defaults
from .model.image_settings import ImageSettings
from .ranks.local_ranks import LocalRanks
from .ranks.rank_group import RankGroup
from .ranks.ranks import Ranks, ReportProgress
from .ranks.step_timings import StepTimings
from .runtime import Deployment, MakeRoom, load_tokenizer, resolve
from .text.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from .cluster.formation import Cluster  # needs libraries that a single machine does not

Prompt = str | Sequence[int] | Sequence[Message]
"""Text (rendered as a user message if the model has a chat template), token ids, or a chat."""

DEFAULT_MAX_TOKENS = 512
TOKEN_TIMEOUT_S = 900.0  # longer than any step may take: the group fails before


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer.

    Args:
        token: its token id.
        text: the text that became certain with it.
        finish: why the answer ended, or None.
        logprob, top: see `TokenEvent`.
    """

    token: int
    text: str
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """A complete answer.

    Args:
        text: without the stop token or stop string.
        tokens: the generated ids, including the stop token.
        finish: "stop" or "length".
        prompt_tokens: number of tokens of the prompt.
        first_token_s: seconds from the request to the first token.
        tok_per_s: tokens after the first, over the time since the first; 0.0 for a single one.
        step_timings_ms: where the time of a token went, see `docs/metrics.md`.
        nodes: number of ranks.
        routed: layer -> expert -> how often the router chose it, in measured steps.
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
    progress: ReportProgress | None = None,
    **options: Any,
) -> Model:
    """Load a model on `nodes` local processes.

    Args:
        model, nodes, options: see `LoadOptions`.
        progress: called with rank, bytes loaded and bytes in all.

    Raises:
        InputError: an unknown option or value, or options that do not go together.
        CheckpointError, PlanError, ClusterError: see those. No process is left.
    """
    try:
        load_options = LoadOptions(model, nodes, **options)
    except TypeError as error:
        raise InputError(f"unknown option: {error}") from error
    return Model.load(load_options, progress=progress)


class _EitherEvent(threading.Event):
    """Set when it is set itself, or another event is."""

    def __init__(self, other: threading.Event | None) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or (self._other is not None and self._other.is_set())

    def wait(self, timeout: float | None = None) -> bool:
        ends_s = math.inf if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (left_s := ends_s - time.monotonic()) > 0:
            super().wait(min(left_s, 0.1))
        return self.is_set()


class TokenizerLoader:
    """Loads the tokenizer in a thread, while ranks load.

    Args:
        deployment: whose.
        cancel: set if there is no use in loading anything; None: never.
        isolate_text: start the process of `ChatTokenizer.isolate` too.

    `stop` is set when there is no use in waiting for the ranks: `cancel` is, or this has failed.
    """

    def __init__(
        self, deployment: Deployment, cancel: threading.Event | None = None, *, isolate_text: bool
    ) -> None:
        self._deployment, self._isolate_text = deployment, isolate_text
        self._tokenizer: ChatTokenizer | None = None
        self._error: BaseException | None = None
        self._lock, self._is_abandoned = threading.Lock(), False
        self.stop = _EitherEvent(cancel)
        # A daemon: Ctrl-C does not wait until a large tokenizer is there.
        self._thread = threading.Thread(target=self._run, daemon=True, name="tokenizer")

    def _run(self) -> None:
        try:
            tokenizer = self._deployment.tokenizer
            tokenizer = tokenizer or load_tokenizer(self._deployment.checkpoint)
            if tokenizer is not None and self._isolate_text:
                tokenizer.start_process()
            with self._lock:
                self._tokenizer = tokenizer
                if tokenizer is not None and self._is_abandoned:
                    tokenizer.close()
        except BaseException as error:
            self._error = error
            self.stop.set()

    def result(self) -> ChatTokenizer | None:
        """Wait for it; None: the checkpoint has none.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._tokenizer

    def __enter__(self) -> TokenizerLoader:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        with self._lock:  # the thread may need long; then it ends the process itself
            self._is_abandoned = True
            if self._tokenizer is not None:
                self._tokenizer.close()
        if self._error is not None and isinstance(error, ClusterError):
            raise self._error from None  # the ranks were ended because of it


class Model:
    """A loaded model that answers; close it, or use it in a `with` statement.

    Args:
        deployment: what runs.
        group: of its ranks.
    """

    def __init__(self, deployment: Deployment, group: RankGroup) -> None:
        self.group, self._deployment = group, deployment
        self.name = deployment.name
        self.plan_reason = deployment.plan_reason  # why the first plan, in one line
        draft = deployment.draft_model
        self.drafter = draft.description if draft is not None else None  # beside the text itself
        self.config = deployment.checkpoint.config  # config.json
        # Arguments of `Sampling` that the checkpoint recommends; the HTTP APIs' defaults.
        self.sampling_defaults = read_sampling_defaults(deployment.checkpoint.folder)
        self._grammar_vocabulary = Vocabulary(lambda: self.text)
        group.read_vocabulary = lambda: self._grammar_vocabulary.serialized  # checked before
        self._decoder: DecodeProcess | None = None

    @classmethod
    def load(
        cls,
        options: LoadOptions,
        *,
        cluster: Cluster | None = None,
        progress: ReportProgress | None = None,
        report: Callable[[str], None] = lambda _: None,
        isolate_text: bool = False,
        make_room: MakeRoom | None = None,
        cancel: threading.Event | None = None,
        started: LocalRanks | None = None,
        while_loading: Callable[[], None] | None = None,
    ) -> Model:
        """Like `cenacle.load`, with the options in one object.

        Args:
            cluster: run on its nodes; it decides how many.
            report: told what the verification does and finds, in sentences.
            isolate_text: `text.isolate()` will follow: its process starts beside the ranks.
            make_room: see `runtime.resolve`.
            cancel: set to give up; no process is left.
            started: ranks from `LocalRanks.start_early` with these options; ended if this fails.
                None: it is tried here, unless room has to be made first.
            while_loading: called in a thread of its own once the ranks load.
        """
        if cluster is None and started is None and make_room is None:
            started = LocalRanks.start_early(options)
        try:
            deployment = resolve(options, cluster, make_room, cancel, with_tokenizer=False)
            with TokenizerLoader(deployment, cancel, isolate_text=isolate_text) as loader:
                if while_loading is not None:
                    threading.Thread(target=while_loading, daemon=True).start()
                group = deployment.launch(progress, report, loader.stop, started=started)
                try:
                    return cls(replace(deployment, tokenizer=loader.result()), group)
                except BaseException:
                    group.close()
                    raise
        except BaseException:
            if started is not None:
                started.close(now=True)
            raise

    @property
    def ranks(self) -> Ranks:
        """The processes that hold the model now."""
        return self.group.ranks

    @property
    def plan(self) -> Plan:
        """What each rank holds now; ranks that were started again may have another plan."""
        return self.ranks.plan

    @property
    def spec(self) -> ModelSpec:
        """Structure and sizes of the model."""
        return self._deployment.plan.spec

    @property
    def image_settings(self) -> ImageSettings | None:
        """How the model is shown images; None: it is not."""
        return self._deployment.image_settings

    @property
    def image_obstacle(self) -> str:
        """Why the model cannot be shown images, as the end of a sentence; empty: it can."""
        return self._deployment.image_obstacle

    @property
    def text(self) -> ChatTokenizer:
        """The tokenizer.

        Raises:
            CheckpointError: the checkpoint has none.
        """
        if self._deployment.tokenizer is None:
            raise CheckpointError(f"{self.name} has no tokenizer: give the prompt as token ids")
        return self._deployment.tokenizer

    def request(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        *,
        logprobs: int | None = None,
        grammar: str | None = None,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        prompt_logprobs: int | None = None,
        images: Sequence[PromptImage] = (),
    ) -> Request:
        """A request for a prompt, checked against the model's context and vocabulary.

        Args:
            prompt, max_tokens: see `stream`.
            sampling, logprobs, grammar, min_tokens, prompt_logprobs: see `Request`.
            ignore_eos: no token ends the output.
            images: of the prompt, whose tokens have placeholders for them.

        Raises:
            InputError: names what is wrong.
        """
        tokens = self.tokens_of(prompt)
        vocab_size, context_length = self.spec.vocab_size, self.spec.context_length
        room = (context_length or 2**31) - len(tokens)
        if room < 1:
            raise InputError(
                f"prompt: {len(tokens)} tokens do not fit the model's context of {context_length}; "
                f"shorten it by at least {1 - room}",
                "prompt",
            )
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens: expected at least 1, got {max_tokens}", "max_tokens")
        sampling = sampling or Sampling()
        if sampling.logit_bias and max(sampling.logit_bias) >= vocab_size:
            raise InputError(
                f"logit_bias: expected token ids from 0 to {vocab_size - 1}, got "
                f"{max(sampling.logit_bias)}",
                "logit_bias",
            )
        if grammar is not None:
            check_grammar(grammar, self._grammar_vocabulary)
        tokenizer = self._deployment.tokenizer
        return Request(
            uuid.uuid4().hex,
            tokens,
            min(max_tokens or DEFAULT_MAX_TOKENS, room),
            tokenizer.stop_tokens if tokenizer is not None and not ignore_eos else (),
            sampling,
            logprobs,
            grammar,
            min_tokens=min_tokens,
            prompt_logprobs=prompt_logprobs,
            images=tuple(images),
        )

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt in any of its forms.

        Raises:
            InputError: an id is not in the vocabulary.
        """
        tokens: tuple[int, ...]
        if isinstance(prompt, str) and self.text.has_template:
            tokens = self.text.render([{"role": "user", "content": prompt}])
        elif isinstance(prompt, str):
            tokens = self.text.encode(prompt)
        elif (items := list(prompt)) and isinstance(items[0], dict):
            tokens = self.text.render(items)  # type: ignore[arg-type]
        else:
            tokens = tuple(items)  # type: ignore[arg-type]
        last = self.spec.vocab_size - 1
        if tokens and not 0 <= min(tokens) <= max(tokens) <= last:
            raise InputError(
                f"prompt: expected token ids from 0 to {last}, got {min(tokens)} to {max(tokens)}",
                "prompt",
            )
        return tokens

    def prompt_of(self, prompt: Prompt) -> tuple[tuple[int, ...], tuple[PromptImage, ...]]:
        """The token ids of a prompt in any of its forms, and its images, which are parts of a chat:
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}.

        Raises:
            InputError: a bad image, or the model cannot be shown images; or see `tokens_of`.
        """
        if isinstance(prompt, str):
            return self.tokens_of(prompt), ()
        items: list[Any] = list(prompt)
        if not any(isinstance(m, dict) and isinstance(m.get("content"), list) for m in items):
            return self.tokens_of(items), ()
        messages, sources = take_sources(mark_parts(items))
        settings = self.image_settings
        if not sources:
            return self.tokens_of(messages), ()
        if settings is None:
            reason = f"the model is {self.image_obstacle}; remove the images"
            raise InputError(f"messages: {reason}", "messages")
        images = [self._decode(source, number) for number, source in enumerate(sources, 1)]
        names = [
            self.text.token_text(token)
            for token in (settings.start_token, settings.image_token, settings.end_token)
        ]
        places = ImagePlaces(images, settings.image_token, names, "messages")
        return places.expand(self.text.render(messages, edit_text=places.edit_text))

    def _decode(self, source: str, number: int) -> DecodedImage:
        settings = self.image_settings
        assert settings is not None
        if is_remote(source):
            reason = "from Python none is fetched; give it as a data: URI"
            raise InputError(f"image {number}: {reason}", "messages")
        if self._decoder is None:
            sizes = settings.min_pixels, settings.max_pixels
            self._decoder = DecodeProcess(settings.token_side, *sizes, enlarges=settings.enlarges)
        try:
            return self._decoder.decode(read_data_uri(source))
        except InputError as error:
            raise InputError(f"image {number}: {error}", "messages") from None

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        *,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        grammar: str | None = None,
        images: Sequence[PromptImage] = (),
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Answer a prompt piece by piece; ending the iteration early cancels the request.

        Args:
            prompt: text, token ids or a chat, whose parts may be images, see `prompt_of`.
            max_tokens: maximum number of tokens to generate.
            stop: strings before which the answer ends.
            logprobs: how many alternatives to report with each token's log-probability; None: no
                log-probabilities.
            grammar: what the answer must match, as llguidance reads it.
            images: of a prompt of token ids, as `prompt_of` gives them.
            sampling: fields of `Sampling`.

        Raises:
            InputError: a wrong argument.
            ClusterError: the group failed.
        """
        try:
            checked = Sampling(**sampling)
        except TypeError as error:
            raise InputError(f"unknown argument: {error}") from error
        tokens, own = self.prompt_of(prompt)
        request = self.request(
            tokens, max_tokens, checked, logprobs=logprobs, grammar=grammar, images=own or images
        )
        return self._stream(request, stop)

    def _stream(self, request: Request, stop: Sequence[str]) -> Iterator[Chunk]:
        events: queue.Queue[GroupEvent] = queue.Queue()
        tokenizer = self._deployment.tokenizer
        text = tokenizer.text_stream(stop) if tokenizer is not None else None
        self.group.submit(request, events.put)
        try:
            while True:
                try:
                    event = events.get(timeout=TOKEN_TIMEOUT_S)
                except queue.Empty:
                    raise ClusterError(f"no token within {TOKEN_TIMEOUT_S:g} s") from None
                if isinstance(event, CenacleError):
                    raise event
                assert not isinstance(event, PromptLogprobs), "they are not wanted"
                piece = text.add(event.token) if text else ""
                if text and event.finish:
                    piece += text.finish()
                stopped = text is not None and text.stopped
                finish = "stop" if stopped else event.finish
                yield Chunk(event.token, piece, finish, event.logprob, event.top)
                if finish:
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

        The step timings are those of all requests of the group since this call began, or, with
        `keep_timings`, since the last call without.
        """
        tokens, images = self.prompt_of(prompt)
        if not keep_timings:
            self.group.step_timings = StepTimings()
        started_s = time.perf_counter()
        chunks: list[Chunk] = []
        times_s: list[float] = []
        for chunk in self.stream(tokens, max_tokens, stop=stop, images=images, **sampling):
            chunks.append(chunk)
            times_s.append(time.perf_counter())
        decode_s = times_s[-1] - times_s[0]
        return Completion(
            text="".join(chunk.text for chunk in chunks),
            tokens=[chunk.token for chunk in chunks],
            finish=chunks[-1].finish or "stop",
            prompt_tokens=len(tokens),
            first_token_s=times_s[0] - started_s,
            tok_per_s=(len(times_s) - 1) / decode_s if decode_s > 0 else 0.0,
            step_timings_ms=self.group.step_timings.per_token_ms(),
            nodes=self.plan.nodes,
            routed=self.group.step_timings.routed,
        )

    @property
    def promised_bytes(self) -> int:
        """Bytes of this machine that the ranks may take once their caches are full."""
        return self._deployment.promised_bytes(self.ranks)

    @property
    def resident_bytes(self) -> int:
        """Bytes that the ranks take now: their weights, or more if they reported more."""
        plan, heartbeats = self.plan, self.group.heartbeats
        weights = [plan.bytes_of(rank)["total"] for rank in range(plan.nodes)]
        memory = [0 if h.memory is None else h.memory.resident_bytes for h in heartbeats]
        return sum(map(max, weights, memory)) if len(memory) == len(weights) else sum(weights)

    def ranks_json(self) -> list[dict[str, Any]]:
        """Each rank's process, device, planned bytes of weights, and peak resident bytes when it
        had loaded them."""
        ranks = self.ranks
        return [
            {
                "rank": rank,
                "pid": ranks.pids[rank],
                "device": ready.device,
                "weights_bytes": ranks.plan.bytes_of(rank)["total"],
                "peak_rss_bytes": ready.peak_rss_bytes,
            }
            for rank, ready in enumerate(ranks.ready)
        ]

    def close(self) -> None:
        """End the ranks."""
        self.group.close()
        if self._decoder is not None:
            self._decoder.close()

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
