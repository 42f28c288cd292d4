"""The program of one rank: `python -m cenacle.ranks.worker`.

Owns: the life of a rank: connect to the front, join the group, load, take steps until told to stop
or until the front is gone.
Does not know: who starts it (`local_ranks.py` or an agent), who sends the steps, text, HTTP.
Invariant: the process ends when its control connection does, whatever it is waiting for; a rank
that fails reports why before it ends.
Next: `engine/engine.py` is what a step does.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from .. import deferred_transformers
from ..core.step import PageReport
from ..errors import CenacleError, CheckpointError, ClusterError
from ..message import parse
from ..paths import use_private_temp_dir
from . import exit_reason
from .channel import Channel, ChannelTimeout
from .messages import (
    Heartbeat,
    Hello,
    ImageUpload,
    LoadOrder,
    LoadProgress,
    PageUpdate,
    RankDisk,
    RankFailure,
    RankMemory,
    Ready,
    StepOrder,
    StepResult,
    Stop,
    VocabularyUpload,
)
from .step_timings import StepReport

if TYPE_CHECKING:
    import mlx.nn as nn

    from ..collective.base import Collective, Traffic
    from ..engine.cache.disk_store import PageStore
    from ..engine.emulated_machine import EmulatedMachine
    from ..engine.engine import Engine
    from ..engine.prompt_vision import PromptVision
    from ..engine.sampling.grammar import Vocabulary
    from ..engine.speculative.decoder import Drafter
    from ..engine.speculative.draft_model import DraftModelConfig
    from ..model.checksums import Checksums
    from ..model.draft_heads import DraftHead
    from ..model.step_timer import StepTimer
    from ..text.tokenizer import ChatTokenizer

HEARTBEAT_INTERVAL_S = 0.25
PROGRESS_INTERVAL_S = 0.1
DISK_INTERVAL_S = 10.0
IDLE_S = 0.5
LIBRARIES = ("engine.engine", "engine.speculative.draft_model", "model.loader")


def main() -> None:
    """Run one rank until the front says stop or goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front to handle
    use_private_temp_dir()
    pin_to_cores()
    gc.disable()  # a tenth of the imports' time
    deferred_transformers.defer()
    try:
        channel = connect_to_front()
    except (ClusterError, OSError):
        sys.exit(1)  # the front has gone meanwhile: nobody is to be told
    vitals = Vitals()
    threading.Thread(target=send_heartbeats, args=(channel, vitals), daemon=True).start()
    try:
        import_libraries()
        gc.freeze()  # what was imported stays: the collector need not visit it
        gc.enable()
        _Worker(channel, parse(receive_message(channel), LoadOrder), vitals).run()
    except Exception as error:
        if not isinstance(error, CenacleError):
            traceback.print_exc()
        report_failure(channel, error)
        os._exit(0)  # MLX's threads may wait for ever for a lost peer


def import_libraries() -> None:
    """What loading needs, while the front decides what is loaded.

    Only now: the front must hear from this process before MLX is loaded.
    """
    for name in LIBRARIES:
        import_module(f"cenacle.{name}")


def rank_from_environment() -> int:
    """This process's rank, as set by Cenacle or by MPI."""
    for name in ("CENACLE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    raise ClusterError("this program is started by cenacle, not by hand: it has no rank")


def epoch_from_environment() -> int:
    """Which of a group's successive sets of ranks this process belongs to."""
    return int(os.environ.get("CENACLE_EPOCH", "0"))


def pin_to_cores() -> None:
    """Run on this rank's cores only, if it was given some (Linux)."""
    cores = json.loads(os.environ.get("CENACLE_CORES", "null"))
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[rank_from_environment()])


def ranks_sharing_cores(nodes: int) -> int:
    """Number of ranks that share the cores this process may run on."""
    if "CENACLE_CORES" in os.environ:
        return 1
    return int(os.environ.get("CENACLE_LOCAL_RANKS", nodes))


def connect_to_front() -> Channel:
    """Connect and say which rank this is."""
    address = os.environ["CENACLE_CONTROL"]
    if address.startswith("fd:"):  # in a cluster: one end of a socket pair of the agent
        sock = socket.socket(fileno=int(address.removeprefix("fd:")))
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(address)
    channel = Channel(sock, deadline_s=30)
    token = os.environ.pop("CENACLE_TOKEN")
    hello = Hello(epoch_from_environment(), rank_from_environment(), os.getpid(), token)
    channel.send(hello.to_json())
    return channel


class Vitals:
    """What heartbeats tell besides memory; threads of the rank set it."""

    def __init__(self) -> None:
        self.disk: RankDisk | None = None
        self.traffic: Traffic | None = None  # of the rank's group

    def watch_disk(self, folder: Path) -> None:
        """Look at the disk of a folder now and then, in a thread: one that hangs, as network file
        systems do, must not make the rank look dead."""

        def watch() -> None:
            while True:
                with suppress(OSError):
                    usage = shutil.disk_usage(folder)
                    self.disk = RankDisk(usage.total, usage.free)
                time.sleep(DISK_INTERVAL_S)

        threading.Thread(target=watch, daemon=True).start()


def send_heartbeats(channel: Channel, vitals: Vitals | None = None) -> None:
    """Tell the front that this rank is alive; end the process when the front is gone.

    From the order on: until then the front may be busy for longer than the connection can store
    what it does not read.
    """
    channel.wait_for_message()
    process = psutil.Process()
    while True:
        time.sleep(HEARTBEAT_INTERVAL_S)
        machine = psutil.virtual_memory()
        memory = RankMemory(process.memory_info().rss, machine.total, machine.available)
        disk, traffic = (vitals.disk, vitals.traffic) if vitals is not None else (None, None)
        sent_bytes = traffic.bytes if traffic is not None else 0
        try:
            channel.send(Heartbeat(memory, disk, sent_bytes).to_json())
        except ClusterError:
            os._exit(1)


def receive_message(channel: Channel) -> dict[str, Any]:
    """Wait for the front's next message, without a deadline: an idle front is silent, and
    `send_heartbeats` notices when it is gone."""
    while True:
        try:
            return channel.receive()
        except ChannelTimeout:
            continue


class _Inbox:
    """Messages of the front, read by a thread: a large one need not wait for the end of a step."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._messages: queue.Queue[dict[str, Any] | Exception] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def receive(self, on_idle: Callable[[], None]) -> dict[str, Any]:
        """Wait for the next message, without a deadline, as `receive_message`.

        Args:
            on_idle: called if there is none for `IDLE_S`.
        """
        try:
            message = self._messages.get(timeout=IDLE_S)
        except queue.Empty:
            on_idle()
            message = self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    def _read(self) -> None:
        while True:
            try:
                message: dict[str, Any] | Exception = receive_message(self._channel)
            except Exception as error:  # whatever it is, `run` reports it
                message = error
            self._messages.put(message)
            if isinstance(message, Exception):
                return


def report_failure(channel: Channel, error: Exception) -> None:
    """Tell the front why this rank ends."""
    if not isinstance(error, CenacleError):
        error = ClusterError(exit_reason.describe_error(error))
    try:
        channel.send(RankFailure.of(epoch_from_environment(), error).to_json())
    except ClusterError:
        sys.exit(1)


def join_collective(
    backend: str, nodes: int, comm_dtype: str = "f32", latency_s: float = 0.0
) -> Collective:
    """Join the group of ranks.

    Args:
        latency_s: added to every all-reduce.
    """
    from ..collective.delayed import DelayedCollective
    from ..collective.mesh import Mesh
    from ..collective.mlx import Mlx
    from ..collective.single import SingleRank

    collective: Collective
    if nodes == 1:
        collective = SingleRank()
    elif backend == "mesh":
        collective = Mesh.from_environment(rank_from_environment(), nodes, comm_dtype)
    else:
        collective = Mlx(backend, nodes)
    return DelayedCollective(collective, latency_s) if latency_s else collective


class _Worker:
    """One rank that serves steps."""

    def __init__(self, channel: Channel, order: LoadOrder, vitals: Vitals) -> None:
        # Imported here and below, see `import_libraries`.
        import mlx.core as mx

        from .. import native
        from ..engine.options import EngineOptions
        from ..engine.speculative.draft_model import DraftModelConfig
        from ..model.checkpoint import Checkpoint

        self._channel, self._order, self._plan = channel, order, order.plan
        self._epoch = epoch_from_environment()
        native.set_threads(local_ranks=ranks_sharing_cores(order.plan.nodes))
        rates = order.bandwidth_gb_s
        self._collective = join_collective(
            *(order.backend, order.plan.nodes, order.comm_dtype),
            order.latency_s if rates is None else 0.0,
        )
        vitals.traffic = self._collective.traffic
        vitals.watch_disk(Path(order.folder))
        self._machine: EmulatedMachine | None = None
        if mx.default_device().type == mx.DeviceType.cpu:
            # It runs a C++ compiler for seconds when a first request comes, and gains nothing.
            mx.disable_compile()
        self._checkpoint = Checkpoint.open(Path(order.folder))
        if rates is not None:
            self._machine = self._emulate_machine(rates)
            self._collective = self._machine
        self._options = EngineOptions(**order.engine)
        self._draft: DraftModelConfig | None = None
        if order.draft_model is not None:
            self._draft = DraftModelConfig(**order.draft_model)
        self._vocabulary: Vocabulary | None = None
        self._progress_sent_s = 0.0

    def run(self) -> None:
        """Load, then take steps until the front says stop."""
        from ..engine.sampling.grammar_process import SerializedTokenizer

        engine, machine = self._load(), self._machine
        inbox = _Inbox(self._channel)
        while True:
            received = inbox.receive(on_idle=engine.release_memory)
            message = parse(received, StepOrder, ImageUpload, VocabularyUpload, Stop)
            if isinstance(message, Stop):
                engine.close()
                self._collective.close()
                return
            if message.epoch != self._epoch:
                raise ClusterError(f"expected a step of epoch {self._epoch}, got {message.epoch}")
            if isinstance(message, ImageUpload):
                engine.add_image(message.request_id, message.index, message.pixels)
                continue
            if isinstance(message, VocabularyUpload):
                assert self._vocabulary is not None
                self._vocabulary.set_serialized(
                    SerializedTokenizer(message.text, message.stop_tokens)
                )
                continue
            tokens, report = engine.step(message.step)
            result = StepResult(
                self._epoch,
                message.step.number,
                tuple(tokens),
                StepReport(**report) if report is not None else None,
                engine.take_draft_stats(),
                engine.take_prompt_logprobs(),
                machine.take_stats() if machine is not None else None,
            )
            self._channel.send(result.to_json())

    def _load(self) -> Engine:
        """Load this rank's part and report that it is ready."""
        from .. import native
        from ..engine.engine import Engine
        from ..engine.sampling.grammar import Vocabulary
        from ..model.families import family_of
        from ..model.step_timer import StepTimer

        self._wire_memory()
        native.set_activations(self._order.activations)
        timer = StepTimer()
        model, checksums = self._load_model(timer)
        vision = self._load_tower(model) if self._plan.spec.tower_bytes else None
        drafter = self._load_drafter(model)
        gc.collect()
        gc.freeze()  # the objects of a loaded model stay: the collector need not visit them again
        self._collective.barrier()
        self._vocabulary = Vocabulary(
            partial(_load_tokenizer, self._checkpoint.folder, self._checkpoint.config)
        )
        store = self._open_page_store()
        engine = Engine(
            model,
            self._collective,
            timer,
            self._options,
            self._vocabulary,
            drafter,
            store,
            family_of(self._plan.spec.family).batching,
            vision,
        )
        with self._blame_checkpoint():
            footprint = engine.footprint()  # the model's first pass
        if self._machine is not None:
            self._machine.observe_passes(model)
        # What the draft model will keep of the text comes out of what is left for requests.
        is_first = self._collective.rank == 0
        draft_bytes = self._draft.cache_bytes if self._draft is not None and is_first else 0
        ready = Ready(
            self._describe_device(),
            _peak_rss_bytes(),
            available_memory() - draft_bytes,
            footprint,
            tuple(store.listing) if store is not None and store.listing is not None else None,
            tuple(self._collect_notices(model, engine, store)),
            checksums,
        )
        self._channel.send(ready.to_json())
        return engine

    def _load_model(self, timer: StepTimer) -> tuple[nn.Module, Checksums | None]:
        """This rank's part of the model, and its checksums if the order asks for them."""
        from ..model.checksums import weight_checksums
        from ..model.expert_parallel import parallelize
        from ..model.kv_dtype import install_kv_dtype
        from ..model.loader import open_rank_model
        from ..model.stream_support import install_stream_caches

        order, spec, checksums = self._order, self._plan.spec, None
        with open_rank_model(
            self._checkpoint, self._plan, self._collective.rank, self._report_progress
        ) as (model, reader):
            if order.checksums:
                reader.read_all()
                checksums = weight_checksums(model)
            with self._blame_checkpoint():
                parallelize(
                    model,
                    spec.family,
                    self._plan,
                    self._collective,
                    timer,
                    order.kernels,
                    reader.read,
                )
                if self._uses_native_kernels:
                    install_stream_caches(model)
                    install_kv_dtype(model, self._options.kept_dtype(spec.dtype))
        return model, checksums

    @property
    def _uses_native_kernels(self) -> bool:
        from ..model.native_layers import is_supported

        return self._order.kernels != "mlx" and is_supported()

    def _describe_device(self) -> str:
        import mlx.core as mx

        from .. import native

        device = mx.default_device()
        if self._order.kernels != "mlx" and device.type == mx.DeviceType.cpu:
            return f"{device}, {native.describe_kernels()}"
        return str(device)

    def _collect_notices(
        self, model: nn.Module, engine: Engine, store: PageStore | None
    ) -> list[str]:
        """What the owner of the server should know about this model, in sentences."""
        from ..model.format_notices import describe_formats

        notices = list(store.notices) if store is not None else []
        if self._collective.rank == 0:
            notices += describe_formats(
                model,
                self._checkpoint.quantized,
                self._checkpoint.gguf,
                uses_native_kernels=self._uses_native_kernels,
            )
            if not engine.batches_requests:
                notices.append(
                    "requests take turns in every step: with this model and these options of the "
                    "KV cache they cannot share a pass"
                )
        return notices

    def _emulate_machine(self, rates_gb_s: Sequence[float]) -> EmulatedMachine:
        """This rank's machine, as the order describes it."""
        from ..engine.emulated_machine import EmulatedMachine
        from ..planning.model_shapes import shape_from_config
        from ..planning.plan_cost import RankReads

        shape = shape_from_config(str(self._checkpoint.folder), self._checkpoint.config)
        rank = self._collective.rank
        reads = RankReads(self._plan, rank, shape)
        link_s = self._order.latency_s
        return EmulatedMachine(self._collective, reads, 1e9 * rates_gb_s[rank], link_s)

    @contextmanager
    def _blame_checkpoint(self) -> Iterator[None]:
        """mlx-lm believes some values of config.json until they are used."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self._checkpoint.folder}: the files do not fit {self._plan.spec.family}: "
                f"{exit_reason.describe_error(error)}"
            ) from error

    def _wire_memory(self) -> None:
        """On a Mac, keep the weights resident. Never run."""
        import mlx.core as mx

        from ..engine.memory import estimate_memory
        from ..planning import memory

        if mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available():
            estimate = estimate_memory(
                self._checkpoint.config,
                self._plan,
                self._collective.rank,
                self._options,
                self._order.kernels,
                self._draft,
            )
            mx.set_wired_limit(memory.wired_limit(mx.device_info(), estimate))

    def _report_progress(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if done_bytes == total_bytes or now - self._progress_sent_s > PROGRESS_INTERVAL_S:
            self._progress_sent_s = now
            self._channel.send(LoadProgress(done_bytes, total_bytes).to_json())

    def _load_drafter(self, served: nn.Module) -> Drafter | None:
        from ..engine.speculative import draft_model
        from ..engine.speculative.mtp import HiddenStates, MtpProposer
        from ..model.checkpoint import Checkpoint
        from ..model.mtp import record_hidden_states, record_layer_outputs

        draft, kernels = self._draft, self._order.kernels
        if draft is None:
            return None
        vocab_size, is_first = self._plan.spec.vocab_size, self._collective.rank == 0
        checkpoint = Checkpoint.open(Path(draft.folder)) if is_first else None
        if draft.mtp or draft.form:
            states = HiddenStates()
            head: DraftHead | None = None
            if draft.form:
                if checkpoint is not None:
                    head = draft_model.load_drafter(checkpoint, self._checkpoint, served, kernels)
                record_layer_outputs(served, draft.layers, states.record)
            else:
                if checkpoint is not None:
                    head = draft_model.load_mtp(checkpoint, kernels)
                record_hidden_states(served, states.record)
            return MtpProposer(
                *(self._collective, head, states, vocab_size),
                context_length=draft.context_length,
                longest=draft.longest,
            )
        model: nn.Module | None = None
        if checkpoint is not None:
            model = draft_model.load_draft_model(checkpoint, kernels)
        return draft_model.DraftModelProposer(draft, self._collective, model, vocab_size)

    def _load_tower(self, model: nn.Module) -> PromptVision:
        """What sees images: the tower on rank 0, and the model's side on all."""
        from ..engine.prompt_vision import PromptVision
        from ..model.image_settings import ImageSettings
        from ..model.vision import ImageEmbedder, ImageModel

        checkpoint, family = self._checkpoint, self._plan.spec.family
        settings = ImageSettings.read(checkpoint.folder, checkpoint.config, family)
        if settings is None:
            raise CheckpointError(
                f"{checkpoint.folder}: expected a vision_config, as the plan has a vision tower; "
                f"make the plan again"
            )
        embedder = ImageEmbedder.of(
            checkpoint,
            settings,
            has_tower=self._collective.rank == 0,
            kernels=self._order.kernels,
        )
        image_model = ImageModel(model, family, checkpoint.config, embedder.depth)
        return PromptVision(embedder, image_model, self._collective)

    def _open_page_store(self) -> PageStore | None:
        """The prefix cache on disk, if there is to be one."""
        from importlib.metadata import version

        import mlx.core as mx

        from .. import native, paths
        from ..engine.cache.disk_store import PageStore, fingerprint

        options, order = self._options, self._order
        if not options.prefix_cache_disk_gb or options.prefix_cache_gb == 0:
            return None
        # All that decides what is in a cache, also what only changes how it is rounded.
        facts: dict[str, Any] = {
            "plan": order.plan.to_json(),
            "comm_dtype": order.comm_dtype,
            "kernels": order.kernels,
            "activations": order.activations,
            "kv_dtype": self._options.kv_dtype,
        }
        facts |= {name: version(name) for name in ("cenacle", "mlx", "mlx-lm")}
        facts["device"] = str(mx.default_device())
        if native.is_available():
            facts["native"] = native.extension().selected_kernels()
        home = Path(options.prefix_cache_dir or paths.prefix_cache_dir()).expanduser()
        return PageStore(
            home,
            fingerprint(Path(order.folder), facts),
            self._collective.rank,
            int(options.prefix_cache_disk_gb * 1e9),
            self._report_pages,
        )

    def _report_pages(self, report: PageReport) -> None:
        with suppress(ClusterError):  # the front is gone: so is this process in a moment
            self._channel.send(PageUpdate(self._epoch, report).to_json())


def _load_tokenizer(folder: Path, config: dict[str, Any]) -> ChatTokenizer:
    from ..text.tokenizer import ChatTokenizer

    return ChatTokenizer(folder, config)


def available_memory() -> int:
    """Bytes of memory that are left for all ranks of this machine."""
    import mlx.core as mx
    import psutil

    if mx.metal.is_available():  # never run
        return int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory()
    return int(psutil.virtual_memory().available)


def _peak_rss_bytes() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
