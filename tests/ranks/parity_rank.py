"""One rank that runs many checkpoints in one group; started by `test_families.py`.

For each folder: the logits of a prompt and some greedy tokens, through the same loading, layer and
engine as `cenacle.ranks.worker`.
"""

import gc
import hashlib
import os
import threading
from pathlib import Path

from cenacle.message import parse
from cenacle.ranks.channel import Channel
from cenacle.ranks.messages import MeasureOrder, Ready
from cenacle.ranks.worker import (
    connect_to_front,
    join_collective,
    receive_message,
    report_failure,
    send_heartbeats,
)


def main() -> None:
    channel = connect_to_front()
    threading.Thread(target=send_heartbeats, args=(channel,), daemon=True).start()
    try:
        serve(channel)
    except Exception as error:
        report_failure(channel, error)
        raise
    os._exit(0)


def serve(channel: Channel) -> None:
    # Objects of libraries stay: looking through them after each model takes longer than the model.
    gc.set_threshold(50_000, 20, 50)
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from cenacle.core.plan import Plan
    from cenacle.core.request import Request
    from cenacle.engine.engine import Engine
    from cenacle.engine.options import EngineOptions
    from cenacle.model.architecture import named_parameters
    from cenacle.model.checkpoint import Checkpoint
    from cenacle.model.expert_parallel import parallelize
    from cenacle.model.families import family_of
    from cenacle.model.loader import load_rank_model
    from cenacle.model.step_timer import StepTimer
    from cenacle.scheduler.scheduler import Scheduler

    order = parse(receive_message(channel), MeasureOrder)
    collective = join_collective(order.backend, order.nodes)
    channel.send(Ready().to_json())
    while True:
        message = receive_message(channel)
        if message["type"] == "stop":
            return
        plan = Plan.load(Path(message["plan"]))
        watch = StepTimer()
        model = load_rank_model(
            Checkpoint.open(Path(message["folder"])), plan, collective.rank, lambda *_: None
        )
        held = sum(value.nbytes for _, value in named_parameters(model))
        kernels = message["kernels"]
        parallelize(model, plan.spec.family, plan, collective, watch, kernels)
        before = collective.traffic.calls
        logits = model(mx.array([message["prompt"]]), cache=make_prompt_cache(model)).astype(
            mx.float32
        )
        mx.eval(logits)
        calls = collective.traffic.calls - before
        if collective.rank == 0:
            mx.save_safetensors(message["out"], {"logits": logits})
        batching = family_of(plan.spec.family).batching
        options = EngineOptions(prefill_chunk_size=16)
        engine = Engine(model, collective, watch, options, batching=batching)
        request = Request("r", tuple(message["prompt"]), message["max_tokens"])
        request = Request.from_json({**request.to_json(), "sampling": {**GREEDY, "seed": 1}})
        tokens, scheduler = [], Scheduler(prefill_chunk_size=16)
        scheduler.submit(request)
        while (step := scheduler.next_step()) is not None:
            tokens += scheduler.on_tokens(engine.step(step)[0])
        engine.close()
        channel.send(
            {
                "type": "result",
                "calls": calls,
                "bytes": held,
                "digest": hashlib.sha256(memoryview(logits).tobytes()).hexdigest(),
                "tokens": [t.token for t in tokens],
            }
        )


GREEDY = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
}

if __name__ == "__main__":
    main()
