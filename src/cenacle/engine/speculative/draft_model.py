"""Drafts by a small model.

Owns: `DraftModel`, what a draft model is, checked before anything is loaded; `Drafter`, the tokens
that it thinks come next, on every rank.
Does not know: what becomes of drafts (`speculation.py`), requests.
How: rank 0 has the whole small model and drafts; the others are told, in one sum of a few integers
(`Collective.share`) for each draft, against one for each layer of the pass that checks it. A copy
on every rank would save that sum and lose more: chips that round differently would draft
differently, and ranks that check different drafts, or drafts of different lengths, cannot go on;
and ranks that share a machine would read the same weights at the same time.
Invariant: all that decides whether and how much is drafted is counted from tokens, alike on every
rank; what rank 0 has in the draft's cache is `Drafter.length` tokens of the text, on all ranks the
same number.
Next: `speculation.py`, which lets the model check what is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from ...collective.base import Collective
from ...collective.single import SingleRank
from ...core import model_config
from ...core.plan import Plan
from ...errors import CheckpointError, InputError
from ...model import architecture, loader, native_blocks, native_layers
from ...model.checkpoint import Checkpoint, locate_checkpoint
from ...model.expert_parallel import parallelize
from ...model.spec_reader import read_model_spec
from ...model.step_timer import StepTimer
from ...planning import memory
from ...scheduler.prefix_index import common_prefix_length, pack_tokens
from ..cache.kv_cache import can_go_back, can_merge

if TYPE_CHECKING:
    from ...text.tokenizer import ChatTokenizer

Draw = Callable[[mx.array, int], mx.array]
"""Draws a token: log-probabilities [1, vocabulary], position in the answer -> id [1]."""

PIECE = 128  # tokens of a text that it reads beside one token of the answer
NEAR = 32  # tokens behind the text that it reads together with drafting


@dataclass(frozen=True)
class DraftModelConfig:
    """A draft model, as far as every rank has to know it.

    Args:
        folder: where it is, on rank 0's machine.
        vocabulary: how many ids it knows.
        context: most tokens that it can read; None: its config does not say.
        weights: bytes of its weights in memory.
        cache: bytes of its keys and values that are planned for.
    """

    folder: str
    vocabulary: int
    context: int | None
    weights: int
    cache: int

    @property
    def bytes(self) -> int:
        """What rank 0 keeps besides its part of the model."""
        return self.weights + self.cache

    @classmethod
    def check(
        cls,
        name: str,
        checkpoint: Checkpoint,
        text: ChatTokenizer | None,
        kernels: str,
        speculative: str,
        *,
        plain_kv_cache: bool,
    ) -> DraftModelConfig:
        """Look at a draft model before it is loaded; reads no weights.

        Args:
            name: a folder or a hub repository's name.
            checkpoint: of the model that is to be served.
            text: its tokenizer, or None: it has none.
            kernels: as `api.load`.
            speculative, plain_kv_cache: see `EngineOptions`.

        Raises:
            CheckpointError: it is no model that mlx-lm runs.
            InputError: it cannot draft for this model; says why.
        """
        own = Checkpoint.open(locate_checkpoint(name))
        said = f"draft: {own.folder.name} cannot draft for {checkpoint.folder.name}"
        if speculative == "off":
            raise InputError(
                "draft: expected --speculative auto or always with a draft model, got off", "draft"
            )
        if not (plain_kv_cache and can_merge(served := _lazy(checkpoint)) and can_go_back(served)):
            raise InputError(
                f"draft: the cache of {checkpoint.folder.name} must be able to forget tokens, and "
                f"it cannot: it is quantised, cut, or a state; leave --draft-model, --kv-bits and "
                f"--max-kv-size away",
                "draft",
            )
        if not can_go_back(model := _lazy(own)):
            raise InputError(
                f"{said}: its cache cannot forget tokens (it rotates, or is a state); expected "
                f"plain keys and values",
                "draft",
            )
        expected, known = (
            model_config.find_int(c.config, model_config.VOCAB_SIZE_KEYS) or 0
            for c in (checkpoint, own)
        )
        _same_words(said, text, own, (expected, known))
        sizes = sum(array.nbytes for _, array in architecture.named_parameters(model))
        native = kernels != "mlx" and native_layers.is_supported()
        context = model_config.find_int(own.config, model_config.CONTEXT_LENGTH_KEYS)
        cache = memory.kv_cache_bytes(
            model_config.kv_cache_elements_per_token(own.config, len(model.layers)),
            context,
            max_kv_size=None,
            kv_bits=None,
            element_bytes=4 if native else 2,
        )
        return cls(str(own.folder.resolve()), known, context, sizes, cache)


def _same_words(
    said: str, text: ChatTokenizer | None, own: Checkpoint, vocabularies: tuple[int, int]
) -> None:
    """The ids must mean the same in both."""
    from ...text.tokenizer import ChatTokenizer

    if text is None:  # asked with ids: they have no meaning but their number
        if vocabularies[0] != vocabularies[1]:
            expected, got = vocabularies
            raise InputError(f"{said}: expected {expected} token ids, it has {got}", "draft")
        return
    ours, theirs = text.vocabulary, ChatTokenizer(own.folder, own.config).vocabulary
    words = {token: word for word, token in ours.items()}
    differ = [w for w, t in theirs.items() if ours.get(w, t) != t or words.get(t, w) != w]
    if differ:
        first = theirs[differ[0]]
        raise InputError(
            f"{said}: expected the same tokenizer, but {len(differ)} of its {len(theirs)} tokens "
            f"are others, such as {first}, which is {differ[0]!r} there and {words.get(first)!r} "
            f"here; take a small model of the same family",
            "draft",
        )


def _dense(checkpoint: Checkpoint) -> bool:
    return (model_config.find_int(checkpoint.config, model_config.EXPERT_COUNT_KEYS) or 0) < 2


def _lazy(checkpoint: Checkpoint) -> nn.Module:
    if _dense(checkpoint):
        return loader.build_dense_model(checkpoint)
    return loader.build_model(checkpoint, None, 0)


def load(checkpoint: Checkpoint, kernels: str) -> nn.Module:
    """A whole model in this process's memory, with experts or without, computing as fast as it can.

    Args:
        kernels: as `model.experts.parallelize`.

    Raises:
        CheckpointError, InputError: see `weights.load` and `parallelize`.
    """
    if not _dense(checkpoint):
        spec = read_model_spec(checkpoint)
        plan = Plan.whole(spec, 1)
        model = loader.load_rank_model(checkpoint, plan, 0, lambda *_: None)
        parallelize(model, spec.family, plan, SingleRank(), StepTimer(), kernels)
        return model
    model = loader.build_dense_model(checkpoint)
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: reading the weights failed: {error}"
        ) from error
    if kernels != "mlx" and native_layers.is_supported():
        native_layers.install_native_layers(model)
        native_blocks.install_native_blocks(model)
    return model


class DraftModelProposer:
    """What a small model thinks comes next.

    Args:
        what: the draft model.
        collective: the ranks; the first has it.
        model: on rank 0; None on the others.
        vocabulary: how many ids the served model knows.
    """

    def __init__(
        self,
        what: DraftModelConfig,
        collective: Collective,
        model: nn.Module | None,
        vocabulary: int,
    ) -> None:
        self._what, self._collective, self._model = what, collective, model
        self._vocabulary = vocabulary
        self._tokens: list[int] = []  # that are in the cache
        self._caches: list[Any] = make_prompt_cache(model) if model is not None else []

    @property
    def length(self) -> int:
        """How many tokens of the text it has read."""
        return len(self._tokens)

    def reaches(self, length: int) -> bool:
        """Whether a text of so many tokens is not too long for it."""
        return self._what.context is None or length <= self._what.context

    def begin(self, text: Sequence[int]) -> None:
        """Another text, or the same again: what it has read of it stays, without the last."""
        self.forget(
            min(common_prefix_length(pack_tokens(self._tokens), pack_tokens(text)), len(text) - 1)
        )

    def forget(self, length: int) -> None:
        """Only the first tokens of what it has read are right, so many at most."""
        surplus = self.length - length
        if surplus > 0:
            trim_prompt_cache(self._caches, surplus)
            del self._tokens[length:]

    def read(self, fresh: Sequence[int]) -> None:
        """The text goes on with these tokens; nothing is drafted."""
        if self._model is not None:
            self._model(self._input(fresh), cache=self._caches)
            mx.eval([cache.state for cache in self._caches])
        self._tokens += fresh

    def draft(self, fresh: Sequence[int], count: int, draw: Draw, position: int) -> list[int]:
        """The next token as this model sees it, the one behind it, and so on.

        Drawn with the same random numbers as the model's own tokens: where both models think alike
        they draw alike, much more often than the likeliest token would be drawn.

        Args:
            fresh: how the text goes on from what it has read; one token at least.
            count: how many to draft.
            draw: see `Draw`.
            position: in the answer, of the first token that is drafted.
        """
        if self._model is None:
            drafted = mx.zeros((count,), dtype=mx.uint32)
        else:
            token, made = self._input(fresh), []
            for at in range(count):
                logits = self._model(token, cache=self._caches)[:, -1, : self._vocabulary]
                missing = self._vocabulary - logits.shape[-1]
                if missing:  # random numbers are dealt by the width
                    logits = mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf)
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                made.append(draw(logprobs, position + at))
                token = made[-1][None]
            drafted = mx.concatenate(made).astype(mx.uint32)
        told = [int(t) for t in np.asarray(self._collective.broadcast_from(0, drafted))]
        self._tokens += [*fresh, *told[:-1]]
        return told

    def _input(self, tokens: Sequence[int]) -> mx.array:
        """[1, tokens]; ids beyond its table, which no text has, are its last."""
        last = self._what.vocabulary - 1
        return mx.array([[min(t, last) for t in tokens]])
