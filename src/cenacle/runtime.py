"""From options to a running group: the assembly of the program.

Owns: `resolve`, which decides what runs where; `Deployment`, which starts the ranks and has them
verified.
Does not know: HTTP, terminals, prompts in text (`api.py`).
Invariant: when a function here raises, no process is left.
Next: `ranks/rank_group.py`, which answers requests; `cluster/formation.py`, where ranks on several
machines come from; `verification.py`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import psutil

from . import native, paths
from .core.plan import Plan
from .engine.memory import estimate_memory
from .engine.speculative.draft_model import DraftModelConfig
from .errors import InputError
from .load_options import LoadOptions
from .model.checkpoint import Checkpoint, locate_checkpoint
from .model.image_settings import ImageSettings
from .model.spec_reader import image_obstacle, read_model_spec
from .planning import choose_plan, plan_cost
from .planning.memory import MemoryEstimate, MemoryShare, check_available, kv_cache_budget
from .ranks.local_ranks import LocalRanks, LocalRankSource, resolve_backend
from .ranks.messages import LoadOrder
from .ranks.rank_group import RankGroup
from .ranks.ranks import Epoch, Ranks, RankSource, ReportProgress
from .scheduler.prefix_index import CacheFootprint
from .scheduler.scheduler import Scheduler
from .text.tokenizer import ChatTokenizer
from .verification import ReferenceAnswers, Verification, collect_answers

if TYPE_CHECKING:
    from .cluster.formation import Cluster  # needs libraries that a single machine does not

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"),
    "tiktoken.model",
)

Report = Callable[[str], None]
MakeRoom = Callable[[MemoryEstimate | None], MemoryShare]
"""Called before anything is started, with what a model needs of this machine (None: it runs on a
cluster, whose nodes it fits); returns when there is room, with what the model may take."""


def inspect(model: str, nodes: int = 1, **options: Any) -> Plan:
    """The plan that `load` would use for a checkpoint; reads no weights.

    Args:
        model, nodes, options: see `LoadOptions`.

    Raises:
        CheckpointError, PlanError: see those.
    """
    return select_plan(LoadOptions(model, nodes, **options))[0]


def select_plan(options: LoadOptions, checkpoint: Checkpoint | None = None) -> tuple[Plan, str]:
    """The plan for local ranks, and in one line why it was chosen (may be empty).

    Args:
        checkpoint: of the model, if it is open already.
    """
    checkpoint = checkpoint or Checkpoint.open(locate_checkpoint(options.model))
    if options.plan is not None:
        return _without_tower(options.plan, options), ""
    measurements = None
    if options.bandwidth_gb_s is not None:
        rates = [1e9 * gb_s for gb_s in options.bandwidth_gb_s]
        measurements = plan_cost.emulated_machines(checkpoint.config, rates, options.latency_s)
    elif options.nodes > 1:
        found = plan_cost.local_measurements(checkpoint.config, options.nodes, options.latency_s)
        measurements = None if isinstance(found, str) else found
    return choose_plan.choose_plan(
        read_model_spec(checkpoint, images=options.engine.sees_images),
        options.nodes,
        options.node_weights,
        options.placement,
        options.trunk,
        options.node_memory_bytes,
        mx.default_device().type != mx.DeviceType.cpu,
        choose_plan.ASSUMED_LATENCY_S + options.latency_s,
        measurements,
    )


def _without_tower(plan: Plan, options: LoadOptions) -> Plan:
    if options.engine.sees_images:
        return plan
    return replace(plan, spec=replace(plan.spec, tower_bytes=0))


def resolve(
    options: LoadOptions,
    cluster: Cluster | None = None,
    make_room: MakeRoom | None = None,
    cancel: threading.Event | None = None,
    *,
    with_tokenizer: bool = True,
) -> Deployment:
    """Decide what will run where; reads no weights and starts no process.

    Args:
        cluster: run on its nodes; it decides how many, and waits until they are connected.
        make_room: other models run as well; None: what is available is for this one.
        cancel: set to stop waiting for nodes.
        with_tokenizer: False: the deployment's is None unless a draft model needs it; to be loaded
            by `load_tokenizer` while the ranks load, since that takes seconds too.

    Raises:
        InputError: options that do not go together, or a draft model that does not fit the model.
        CheckpointError, PlanError, ClusterError: see those.
    """
    if cluster is None:
        _check_comm_dtype(options)
        folder = locate_checkpoint(options.model)
    else:
        folder = cluster.locate(options.model)
    checkpoint = Checkpoint.open(folder)
    name = model_name(options.model, checkpoint)
    tokenizer, draft_model = None, None
    if with_tokenizer or options.draft_model is not None:
        tokenizer = load_tokenizer(checkpoint)
    if options.draft_model is not None:
        draft_model = DraftModelConfig.inspect(
            options.draft_model,
            checkpoint,
            tokenizer,
            options.kernels,
            options.speculative,
            plain_kv_cache=options.engine.plain_kv_cache,
        )
    elif options.mtp and options.speculative != "off":
        draft_model = DraftModelConfig.find_mtp(
            checkpoint, options.kernels, plain_kv_cache=options.engine.plain_kv_cache
        )
    if cluster is None:
        plan, reason = select_plan(options, checkpoint)
    else:
        plan, reason = _form_group(
            cluster, name, checkpoint, options, draft_model, make_room, cancel
        )
    deployment = Deployment(
        options, name, checkpoint, tokenizer, draft_model, plan, reason, cluster
    )
    if cluster is None:
        estimate = deployment.estimate_memory(plan)
        if make_room is not None:
            return replace(deployment, share=make_room(estimate))
        _check_memory(estimate)
    return deployment


def model_name(model: str, checkpoint: Checkpoint) -> str:
    """The name of a model, for people and for the API."""
    # The folder of a Hub repository is named after a commit.
    is_folder = Path(model).expanduser().exists()
    return checkpoint.folder.resolve().name if is_folder else model


@dataclass(frozen=True)
class Deployment:
    """A model, and everything that was decided about running it.

    Args:
        options: as given.
        name: of the model, for people and for the API.
        checkpoint: its files.
        tokenizer: None: it has none, and takes token ids only.
        draft_model: a draft model or the checkpoint's own drafting layer; None: there is none.
        plan, plan_reason: what each of the first ranks holds, and why, in one line.
        cluster: where the ranks run; None: on this machine.
        share: of this machine's memory, beside other models.
    """

    options: LoadOptions
    name: str
    checkpoint: Checkpoint
    tokenizer: ChatTokenizer | None
    draft_model: DraftModelConfig | None
    plan: Plan
    plan_reason: str
    cluster: Cluster | None = None
    share: MemoryShare = field(default_factory=MemoryShare)

    @property
    def image_settings(self) -> ImageSettings | None:
        """How the model is shown images; None: it is not."""
        if not self.plan.spec.tower_bytes:
            return None
        config = self.checkpoint.config
        return ImageSettings.read(self.checkpoint.folder, config, self.plan.spec.family)

    @property
    def image_obstacle(self) -> str:
        """Why the model cannot be shown images, as the end of a sentence; empty: it can."""
        family, engine = self.plan.spec.family, self.options.engine
        if self.plan.spec.tower_bytes:
            return ""
        if (obstacle := image_obstacle(self.checkpoint, family)) is not None:
            return obstacle
        if not engine.images:
            return "served without images (--no-images)"
        if not engine.plain_kv_cache:
            return "served with --kv-bits or --max-kv-size, with which it cannot be shown images"
        return "served by a saved plan without its vision tower; make the plan again"

    def estimate_memory(self, plan: Plan) -> MemoryEstimate:
        """What the largest rank of a plan needs."""
        options = self.options
        return estimate_memory(
            self.checkpoint.config, plan, 0, options.engine, options.kernels, self.draft_model
        )

    def load_order(self, *, checksums: bool = False) -> LoadOrder:
        """What every rank is told to load.

        Args:
            checksums: have the first ranks report checksums of their weights.
        """
        options = self.options
        return LoadOrder(
            folder=str(self.checkpoint.folder.resolve()),
            plan=self.plan,
            kernels=options.kernels,
            comm_dtype=options.comm_dtype,
            latency_s=options.latency_s,
            bandwidth_gb_s=tuple(options.bandwidth_gb_s) if options.bandwidth_gb_s else None,
            activations=options.activations,
            engine=asdict(options.engine),
            draft_model=asdict(self.draft_model) if self.draft_model is not None else None,
            checksums=checksums,
        )

    def rank_source(self, order: LoadOrder, started: LocalRanks | None = None) -> RankSource:
        """Where ranks that load this come from.

        Args:
            started: the first ones, see `LocalRanks.start_early`.
        """
        if self.cluster is not None:
            from .cluster.formation import ClusterRankSource

            return ClusterRankSource(self.cluster, order)
        options = self.options
        return LocalRankSource(order, options.backend, options.cores, options.threads, started)

    def start(
        self,
        source: RankSource,
        progress: ReportProgress | None = None,
        cancel: threading.Event | None = None,
    ) -> RankGroup:
        """Start the ranks of a source; the group that they form answers requests.

        Args:
            progress: told how far each rank has loaded.
            cancel: set to give up; no rank is left.

        Raises:
            CenacleError: see `RankSource.start`.
        """
        epoch = Epoch() if cancel is None else Epoch(closing=cancel)
        ranks, options = source.start(epoch, progress), self.options
        kv_bytes, footprint, cache_bytes = self.measure_capacity(ranks)
        scheduler = Scheduler(
            options.max_batch_size,
            options.measure_every,
            prefill_chunk_size=options.prefill_chunk_size,
            max_queue=options.max_queue,
            kv_cache_bytes=kv_bytes,
            footprint=footprint,
            prefix_cache_bytes=cache_bytes,
            disk_bytes=int(options.prefix_cache_disk_gb * 1e9),
            share_prefixes=options.share_prefixes,
        )
        return RankGroup(
            ranks, scheduler, source if options.recover else None, self.measure_capacity
        )

    def measure_capacity(self, ranks: Ranks) -> tuple[int | None, CacheFootprint, int]:
        """Bytes on each rank for KV caches of running requests, what a cache takes, and bytes for
        the prefix cache."""
        footprint = CacheFootprint.maximum(ready.footprint for ready in ranks.ready)
        ranks_per_machine = ranks.plan.nodes if self.cluster is None else 1
        weights = sum(ranks.plan.bytes_of(rank)["total"] for rank in range(ranks.plan.nodes))
        available_bytes = self.share.of(
            min(ready.available_bytes for ready in ranks.ready), weights
        )
        planned_bytes = self.estimate_memory(ranks.plan).kv_cache
        kv_bytes = kv_cache_budget(available_bytes, ranks_per_machine, planned_bytes)
        if self.options.kv_cache_gb is not None:
            kv_bytes = int(self.options.kv_cache_gb * 1e9)
        cache_bytes = kv_cache_budget(available_bytes, ranks_per_machine, 0) // 4
        if self.options.prefix_cache_gb is not None:
            cache_bytes = int(self.options.prefix_cache_gb * 1e9)
        return kv_bytes, footprint, cache_bytes

    def promised_bytes(self, ranks: Ranks) -> int:
        """Bytes of this machine that all its ranks may take once their caches are full."""
        estimate = self.estimate_memory(ranks.plan)
        kv_bytes, _, cache_bytes = self.measure_capacity(ranks)
        more_caches = max(0, (kv_bytes or 0) - estimate.kv_cache) + cache_bytes
        return estimate.total + ranks.plan.nodes * more_caches

    def launch(
        self,
        progress: ReportProgress | None = None,
        report: Report = lambda _: None,
        cancel: threading.Event | None = None,
        *,
        started: LocalRanks | None = None,
    ) -> RankGroup:
        """Start the ranks where the options say, and have them verified if the options ask for it.

        Args:
            progress: told how far each rank has loaded.
            report: told what the verification does and finds, in sentences.
            cancel: set to give up; no rank is left.
            started: see `rank_source`; ended if this fails.

        Raises:
            CenacleError: see `start`.
            ClusterError: the verification failed.
        """
        options, verification, checksums = self.options, None, False
        if options.verify is not False:
            verification = Verification(paths.verification_dir(), bool(options.verify), report)
            checksums = self.prepare_verification(verification)
        source = self.rank_source(self.load_order(checksums=checksums), started)
        group = self.start(source, progress, cancel)
        if verification is not None:
            try:
                verification.verify(group, options.measure_every, options.latency_s)
            except BaseException:
                group.close()
                raise
        if self.cluster is not None and options.recover:
            self.cluster.watch_for_returns(group.reform)
        return group

    def prepare_verification(self, verification: Verification) -> bool:
        """See `Verification.prepare`."""
        cluster = self.cluster
        return verification.prepare(
            self.checkpoint,
            self.plan,
            self.verification_settings(),
            self._collect_single_node,
            cluster.formed if cluster is not None else None,
            cluster.measure_links_again if cluster is not None else dict,
        )

    def verification_settings(self) -> dict[str, Any]:
        """Everything that changes what ranks compute, besides checkpoint, plan and nodes."""
        order = self.load_order().to_json()
        settings = {k: v for k, v in order.items() if k not in ("type", "folder", "plan")}
        if self.cluster is None:
            settings["backend"], _ = resolve_backend(self.options.backend, self.plan.nodes)
        settings["device"] = str(mx.default_device())
        settings["native_kernels"] = native.describe_kernels() if native.is_available() else None
        return settings

    def _collect_single_node(self) -> ReferenceAnswers:
        """The answers of one local rank with the whole model and the same engine."""
        options = LoadOptions(
            str(self.checkpoint.folder.resolve()),
            kernels=self.options.kernels,
            activations=self.options.activations,
            recover=False,
            **{**asdict(self.options.engine), "prefix_cache_disk_gb": 0.0},
        )
        single = resolve(options)
        source = single.rank_source(single.load_order(checksums=True))
        with closing(single.start(source)) as group:
            return collect_answers(group, 0)


def _form_group(
    cluster: Cluster,
    name: str,
    checkpoint: Checkpoint,
    options: LoadOptions,
    draft_model: DraftModelConfig | None,
    make_room: MakeRoom | None,
    cancel: threading.Event | None,
) -> tuple[Plan, str]:
    from .cluster.formation import ClusterModel
    from .cluster.placement import PlacementOptions

    placement = PlacementOptions(
        options.placement,
        options.trunk,
        options.backend,
        options.comm_dtype,
        options.node_weights,
        options.node_memory_bytes,
    )
    model = ClusterModel(name, checkpoint, placement, options.engine, options.kernels, draft_model)
    if make_room is not None:
        cluster.check_fit(model)  # before the group that runs is ended for it
        make_room(None)
    formed = cluster.form(model, cancel)
    return formed.plan, formed.plan_reason


def _check_comm_dtype(options: LoadOptions) -> None:
    nodes = options.plan.nodes if options.plan is not None else options.nodes
    backend, _ = resolve_backend(options.backend, nodes)
    if options.comm_dtype != "f32" and nodes > 1 and backend != "mesh":
        raise InputError(
            f"comm_dtype: expected f32, since the backend {backend} sends vectors unchanged, got "
            f"{options.comm_dtype!r}; use --backend mesh",
            "comm_dtype",
        )


def _check_memory(estimate: MemoryEstimate) -> None:
    """On Linux CPUs the weights of all ranks come out of the memory that is available."""
    if sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu:
        check_available(psutil.virtual_memory().available, estimate)


def load_tokenizer(checkpoint: Checkpoint) -> ChatTokenizer | None:
    """A checkpoint's tokenizer; None: it has none.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    found = any((checkpoint.folder / name).exists() for name in TOKENIZER_FILES)
    if not found and not any(checkpoint.folder.glob("*.tiktoken")):
        return None
    return ChatTokenizer(checkpoint.folder, checkpoint.config)
