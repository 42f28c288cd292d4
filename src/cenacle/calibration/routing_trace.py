"""Recording a model's routing: which experts each token chose in each layer.

Owns: running a model in this process, on one rank, with a recorder instead of a timer.
Does not know: what a recording is used for (`planning/routing_stats.py`), files.
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
    """Answer each prompt greedily and record every routing decision, of prompts and answers.

    Args:
        model: a folder or the name of a Hub repository.
        prompts: texts, which become a user's message if the model has a chat template.
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
    recorder = RoutingRecorder()
    rank_model = load_rank_model(checkpoint, plan, 0, lambda *_: None)
    kernels = "native" if native_layers.is_supported() else "mlx"
    parallelize(rank_model, spec.family, plan, SingleRank(), recorder, kernels)
    tokenizer = ChatTokenizer(checkpoint.folder, checkpoint.config)
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.render(chat) if tokenizer.has_template else tokenizer.encode(prompt)
        for token, _ in generate_step(mx.array(ids), rank_model, max_tokens=max_tokens):
            if int(token) in tokenizer.stop_tokens:
                break
    layers, experts = sorted(recorder.ids), spec.moe[0].experts
    ids_of_layers = np.stack([np.concatenate(recorder.ids[layer]) for layer in layers])
    ids_of_layers[ids_of_layers >= experts] = -1
    facts = {
        "model": Path(checkpoint.folder).resolve().name,
        "prompts": len(prompts),
        "max_tokens": max_tokens,
        "expert_bytes": spec.moe[0].expert_bytes,
        "date": datetime.now(UTC).date().isoformat(),
    }
    return RoutingTrace(tuple(layers), experts, ids_of_layers, facts)
