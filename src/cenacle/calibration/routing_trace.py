"""Recording a model's routing: which experts each token chose in each layer.

Owns: running a model in this process, on one rank, with a tape instead of a clock.
Does not know: what is made of a recording (`cost/routing.py`), files.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

from ..collective.single import SingleRank
from ..core.plan import Plan
from ..errors import InputError
from ..model import native_layers
from ..model.checkpoint import Checkpoint, locate_checkpoint
from ..model.expert_parallel import parallelize
from ..model.loader import load_rank_model
from ..model.spec_reader import read_model_spec
from ..model.step_timer import StepTimer
from ..planning.routing_stats import RoutingTrace
from ..text.tokenizer import ChatTokenizer


class RoutingRecorder(StepTimer):
    """Keeps the ids of every token: layer -> arrays [tokens, k]."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: dict[int, list[np.ndarray]] = {}

    def record_routing(self, layer: int, ids: mx.array) -> None:
        """See `StepTimer`; here every token is recorded."""
        rows = np.asarray(ids).reshape(-1, ids.shape[-1]).astype(np.int16)
        self.ids.setdefault(layer, []).append(rows)


def record_routing(model: str, prompts: Sequence[str], max_tokens: int) -> RoutingTrace:
    """Answer each prompt greedily and note every routing decision, of prompts and answers.

    Args:
        model: a folder or a hub repository's name.
        prompts: texts; rendered as a user's message where the model has a chat template.
        max_tokens: most tokens of an answer.

    Raises:
        CheckpointError: see `Checkpoint.open`.
        InputError: no prompt.
    """
    if not prompts:
        raise InputError("prompts: expected at least one, got none", "prompts")
    checkpoint = Checkpoint.open(locate_checkpoint(model))
    spec = read_model_spec(checkpoint)
    plan = Plan.whole(spec, 1)
    tape = RoutingRecorder()
    loaded = load_rank_model(checkpoint, plan, 0, lambda *_: None)
    kernels = "native" if native_layers.is_supported() else "mlx"
    parallelize(loaded, spec.family, plan, SingleRank(), tape, kernels)
    text = ChatTokenizer(checkpoint.folder, checkpoint.config)
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = text.render(chat) if text.has_template else text.encode(prompt)
        for token, _ in generate_step(mx.array(ids), loaded, max_tokens=max_tokens):
            if int(token) in text.stop_tokens:
                break
    layers = sorted(tape.ids)
    arrays = [np.concatenate(tape.ids[layer]) for layer in layers]
    count = spec.moe[0].experts
    stacked = np.stack([np.where(a >= count, -1, a) for a in arrays])
    facts = {
        "model": Path(checkpoint.folder).resolve().name,
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "expert_bytes": spec.moe[0].expert_bytes,
        "date": datetime.now(UTC).date().isoformat(),
    }
    return RoutingTrace(tuple(layers), count, stacked, facts)
