"""The program of one rank: `python -m cenacle.ranks.worker`, started by `cluster.launcher`.

Owns: the life of a rank: connect to the front, form the group, load, take steps until told to
stop or until the front is gone.
Does not know: who sends the steps, text, HTTP.
Invariant: the process ends when its control connection does, whatever it is waiting for; a rank
that fails says why before it ends.
Next: `engine.py` is what a step does.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.plan import Plan
from ..core.step import Step
from ..errors import CenacleError, ClusterError, error_to_json
from . import exit_reason
from .channel import Channel

if TYPE_CHECKING:
    from ..collective.base import Collective
    from ..engine.cache.disk_store import PageStore
    from ..engine.options import EngineOptions

HEARTBEAT_INTERVAL_S = 0.25


def main() -> None:
    """Run one rank until the front says stop or goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle
    pin_to_cores()
    channel = connect_to_front()
    threading.Thread(target=send_heartbeats, args=(channel,), daemon=True).start()
    try:
        _serve(channel, receive_message(channel))
    except Exception as error:
        if not isinstance(error, CenacleError):
            traceback.print_exc()
        report_failure(channel, error)
        os._exit(0)  # MLX's threads may wait for ever for a peer that is lost


def rank_from_environment() -> int:
    """This process's rank: from the launcher, or from MPI's."""
    for name in ("CENACLE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    raise ClusterError("this program is started by cenacle, not by hand: it has no rank")


def epoch_from_environment() -> int:
    """Which of a group's successive sets of ranks this process is of."""
    return int(os.environ.get("CENACLE_EPOCH", "0"))


def pin_to_cores() -> None:
    """Run on this rank's cores only, where the launcher was given some (Linux)."""
    cores = json.loads(os.environ.get("CENACLE_CORES", "null"))
    if cores is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[rank_from_environment()])


def ranks_sharing_cores(nodes: int) -> int:
    """Number of ranks that share the cores this process may run on."""
    if "CENACLE_CORES" in os.environ:
        return 1
    return int(os.environ.get("CENACLE_LOCAL_RANKS", nodes))


def connect_to_front() -> Channel:
    """Say to the front who this is."""
    where = os.environ["CENACLE_CONTROL"]
    if where.startswith("fd:"):  # of a cluster: one end of what the agent made
        sock = socket.socket(fileno=int(where.removeprefix("fd:")))
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(where)
    channel = Channel(sock, deadline_s=30)
    hello = {
        "type": "hello",
        "epoch": epoch_from_environment(),
        "rank": rank_from_environment(),
        "pid": os.getpid(),
    }
    channel.send({**hello, "token": os.environ.pop("CENACLE_TOKEN")})
    return channel


def send_heartbeats(channel: Channel) -> None:
    """Tell the front that this rank lives; when it is gone, end, whatever the main thread does."""
    while True:
        time.sleep(HEARTBEAT_INTERVAL_S)
        try:
            channel.send({"type": "alive"})
        except ClusterError:
            os._exit(1)


def receive_message(channel: Channel) -> dict[str, Any]:
    """Wait for the front's next message; an idle front is silent, so this has no deadline of its
    own: `say_alive` notices when the front is gone."""
    from .channel import ChannelTimeout

    while True:
        try:
            return channel.receive()
        except ChannelTimeout:
            continue


def report_failure(channel: Channel, error: Exception) -> None:
    """Tell the front why this rank ends."""
    if not isinstance(error, CenacleError):
        error = ClusterError(exit_reason.describe_error(error))
    try:
        channel.send(
            {"type": "error", "epoch": epoch_from_environment(), "error": error_to_json(error)}
        )
    except ClusterError:
        sys.exit(1)


def _serve(channel: Channel, order: dict[str, Any]) -> None:
    # Imported here: the front must hear of this process before MLX is loaded.
    import mlx.core as mx

    from .. import native
    from ..engine.engine import Engine
    from ..engine.memory import estimate_memory
    from ..engine.options import EngineOptions
    from ..engine.sampling.grammar import Vocabulary
    from ..engine.speculative import draft_model
    from ..model.checkpoint import Checkpoint
    from ..model.checksums import weight_checksums
    from ..model.expert_parallel import parallelize
    from ..model.loader import load_rank_model
    from ..model.step_timer import StepTimer
    from ..planning import memory
    from ..text.tokenizer import ChatTokenizer

    plan = Plan.from_json(order["plan"])
    native.set_threads(local_ranks=ranks_sharing_cores(plan.nodes))
    collective = join_collective(order, plan.nodes)
    watch = StepTimer()
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.1:
            last = time.monotonic()
            channel.send({"type": "progress", "done": done, "total": total})

    checkpoint, options = Checkpoint.open(Path(order["folder"])), EngineOptions(**order["options"])
    draft = draft_model.DraftModelConfig(**order["draft"]) if order.get("draft") else None
    if mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available():  # never run
        need = estimate_memory(
            checkpoint.config, plan, collective.rank, options, order["kernels"], draft
        )
        mx.set_wired_limit(memory.wired_limit(mx.device_info(), need))
    native.set_activations(order.get("activations", "int16"))
    model = load_rank_model(checkpoint, plan, collective.rank, progress)
    summed = weight_checksums(model) if order.get("sums") else None
    parallelize(model, plan.spec.family, plan, collective, watch, order["kernels"])
    drafter = None
    if draft is not None:
        small = None
        if collective.rank == 0:
            small = draft_model.load_draft_model(
                Checkpoint.open(Path(draft.folder)), order["kernels"]
            )
        drafter = draft_model.DraftModelProposer(draft, collective, small, plan.spec.vocab_size)
    gc.collect()
    gc.freeze()  # a loaded model's objects stay: the collector need not look at them again
    collective.barrier()
    vocabulary = Vocabulary(lambda: ChatTokenizer(checkpoint.folder, checkpoint.config))
    disk = _open_page_store(channel, order, options, collective.rank)
    engine = Engine(model, collective, watch, options, vocabulary, drafter, disk)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024
    device = str(mx.default_device())
    if order["kernels"] != "mlx" and mx.default_device().type == mx.DeviceType.cpu:
        device += f", {native.describe_kernels()}"
    ready = {"type": "ready", "device": device, "peak_rss_bytes": peak * scale}
    # What the draft will keep of the text comes out of what is left for requests.
    kept = draft.cache_bytes if draft is not None and collective.rank == 0 else 0
    ready["memory_left"] = available_memory() - kept
    if disk is not None:
        ready |= {"pages": disk.listing, "notices": disk.notices}
    ready["sums"] = summed
    channel.send({**ready, "footprint": asdict(engine.footprint())})
    while True:
        message = receive_message(channel)
        if message["type"] == "stop":
            engine.close()
            collective.close()
            return
        if message["epoch"] != epoch_from_environment():
            raise ClusterError(
                f"expected steps of epoch {epoch_from_environment()}, got one of {message['epoch']}"
            )
        step = Step.from_json(message["step"])
        events, report = engine.step(step)
        channel.send(
            {
                "type": "stepped",
                "epoch": epoch_from_environment(),
                "number": step.number,
                "tokens": [list(asdict(e).values()) for e in events],
                "report": report,
                "drafts": asdict(engine.take_draft_stats()),
            }
        )


def _open_page_store(
    channel: Channel, order: dict[str, Any], options: EngineOptions, rank: int
) -> PageStore | None:
    """Where prompts outlive this program, if they shall."""
    import mlx.core as mx

    from .. import native, paths
    from ..engine.cache.disk_store import PageStore, fingerprint

    if not options.prefix_cache_disk_gb or options.prefix_cache_gb == 0:
        return None
    # All that decides what is in a cache: also what only changes how it is rounded.
    facts = {name: order.get(name) for name in ("plan", "wire", "kernels", "activations")}
    facts |= {name: version(name) for name in ("cenacle", "mlx", "mlx-lm")}
    facts["device"] = str(mx.default_device())
    if native.is_available():
        facts["native"] = native.extension().used()
    home = Path(options.prefix_cache_dir) if options.prefix_cache_dir else paths.prefix_cache_dir()

    def say(said: dict[str, Any]) -> None:
        with suppress(ClusterError):  # the front is gone: so is this process, in a moment
            channel.send({"type": "pages", "epoch": epoch_from_environment(), **said})

    group = fingerprint(Path(order["folder"]), facts)
    return PageStore(home.expanduser(), group, rank, int(options.prefix_cache_disk_gb * 1e9), say)


def available_memory() -> int:
    """Bytes that are left now that the weights are there, for all ranks of this machine."""
    import mlx.core as mx
    import psutil

    if mx.metal.is_available():  # never run
        return int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory()
    return int(psutil.virtual_memory().available)


def join_collective(order: dict[str, Any], nodes: int) -> Collective:
    """Form the group that the front asked for; a `Collective`."""
    from ..collective.delayed import DelayedCollective
    from ..collective.mesh import Mesh
    from ..collective.mlx import Mlx
    from ..collective.single import SingleRank

    group: Collective
    if nodes == 1:
        group = SingleRank()
    elif order["backend"] == "mesh":
        group = Mesh.from_environment(rank_from_environment(), nodes, order["wire"])
    else:
        group = Mlx(order["backend"], nodes)
    return DelayedCollective(group, order["latency_s"]) if order["latency_s"] else group


if __name__ == "__main__":
    main()
