"""Proposals by a draft model.

Owns: `DraftModelConfig`, a draft model or another drafter as every rank knows it, checked before
anything is loaded; `DraftModelProposer`, a draft model's proposals, on every rank.
Does not know: requests, what becomes of proposals (`decoder.py`).
Rank 0 has the whole draft model. It sends each draft to the others in one all-reduce of a few
integers; the pass that verifies it takes one per layer. A copy on every rank would save this
all-reduce and lose more: ranks that round differently would draft differently, and ranks with
different drafts cannot continue; ranks that share a machine would read the same weights at once.
Invariant: whether and how much is drafted depends only on counts of tokens, which are the same on
every rank; the draft model's cache on rank 0 holds the first `DraftModelProposer.length` tokens.
Next: `decoder.py`, which lets the model verify the drafts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from ...collective.base import Collective
from ...collective.single import SingleRank
from ...core import model_config
from ...core.plan import Plan
from ...core.units import format_bytes
from ...errors import CheckpointError, InputError
from ...model import architecture, dflash, eagle3, loader, native_blocks, native_layers
from ...model.checkpoint import Checkpoint, locate_checkpoint
from ...model.draft_heads import DraftHead, TokenHead, make_mtp_head
from ...model.drafter_config import (
    DFLASH,
    DSPARK,
    EAGLE3,
    SUPPORTED,
    FittingDrafter,
    ServedShape,
    find_form,
)
from ...model.expert_parallel import parallelize
from ...model.mtp import (
    describe_misfit,
    describe_unused,
    find_embedding,
    find_head,
    has_mtp,
    mtp_checkpoint,
    record_layer_outputs,
)
from ...model.spec_reader import read_model_spec
from ...model.step_timer import StepTimer
from ...model.tensor_parallel import VocabParallelEmbedding, VocabParallelHead
from ...model.zoo import ModelClasses
from ...planning import memory
from ...scheduler.prefix_index import common_prefix_length, pack_tokens
from ..cache.kv_cache import can_merge, can_trim
from ..cache.state_rewinder import can_drop

if TYPE_CHECKING:
    from ...text.tokenizer import ChatTokenizer

log = logging.getLogger(__name__)

SampleToken = Callable[[mx.array, int], mx.array]
"""Log-probabilities [1, vocabulary] and a position in the output -> token id [1]."""

_READERS = {EAGLE3: eagle3.read_eagle3, DFLASH: dflash.read_dflash, DSPARK: dflash.read_dflash}

READ_TOKENS = 128  # of a text that the draft model reads beside one token of the output
MAX_UNREAD_TOKENS = 32  # tokens that it reads in the pass that drafts


@dataclass(frozen=True)
class DraftModelConfig:
    """A draft model, as far as every rank knows it.

    Args:
        folder: on rank 0's machine.
        vocab_size: number of token ids.
        context_length: maximum tokens; None: its config does not say.
        weight_bytes: of its weights in memory.
        cache_bytes: planned for its KV cache.
        mtp: it is the multi-token prediction layer of the served checkpoint, in `folder`.
        form: of a checkpoint that drafts for this model alone, such as "EAGLE-3"; empty: another.
        layers: of the served model, whose outputs a drafter with a form reads, ascending.
        longest: how many tokens it drafts at most; None: any number.
    """

    folder: str
    vocab_size: int
    context_length: int | None
    weight_bytes: int
    cache_bytes: int
    mtp: bool = False
    form: str = ""
    layers: tuple[int, ...] = ()
    longest: int | None = None

    @property
    def description(self) -> str:
        """What it is, for people."""
        size = f"{format_bytes(self.weight_bytes)} on rank 0"
        if self.mtp:
            return f"layer for multi-token prediction of {size}"
        name = Path(self.folder).name
        if not self.form:
            return f"draft model {name} of {size}"
        layers = ", ".join(map(str, self.layers))
        return f"{self.form} drafter {name} of {size}, reads layers {layers} of the model"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": Path(self.folder).name,
            "form": self.form or None,
            "layers": list(self.layers),
            "bytes": self.weight_bytes,
        }

    @property
    def total_bytes(self) -> int:
        """What rank 0 keeps besides its part of the model."""
        return self.weight_bytes + self.cache_bytes

    @classmethod
    def inspect(
        cls,
        name: str,
        checkpoint: Checkpoint,
        tokenizer: ChatTokenizer | None,
        kernels: str,
        speculative: str,
        *,
        plain_kv_cache: bool,
    ) -> DraftModelConfig:
        """Check a draft model, or a drafter that was made for this model, without reading its
        weights.

        Args:
            name: a folder or Hub repository.
            checkpoint: of the served model.
            tokenizer: of the served model; None: it has none.
            kernels: see `runtime.LoadOptions`.
            speculative, plain_kv_cache: see `EngineOptions`.

        Raises:
            CheckpointError: mlx-lm cannot run it.
            InputError: it cannot draft for this model; gives the reason.
        """
        draft = Checkpoint.open(locate_checkpoint(name))
        if speculative == "off":
            raise _draft_error("expected --speculative auto or always with a draft model, got off")
        served = _build_lazily(checkpoint)
        if not (plain_kv_cache and can_merge(served) and can_drop(served)):
            raise _draft_error(
                f"expected a KV cache of {checkpoint.folder.name} that can drop its last tokens, "
                f"and it cannot (it is quantized, limited in size, or a state); leave out "
                f"--draft-model, or --kv-bits and --max-kv-size"
            )
        if (form := find_form(draft.config)) is not None:
            return cls._inspect_drafter(draft, form, checkpoint, served, kernels)
        model = _build_lazily(draft)
        refusal = f"{draft.folder.name} cannot draft for {checkpoint.folder.name}"
        if not can_trim(model):
            raise _draft_error(
                f"{refusal}: expected a KV cache that can drop its last tokens, got one that "
                f"rotates or is a state"
            )
        _require_same_tokens(refusal, draft, checkpoint, tokenizer)
        context_length = model_config.find_int(draft.config, model_config.CONTEXT_LENGTH_KEYS)
        return cls(
            str(draft.folder.resolve()),
            _vocab_size(draft),
            context_length,
            sum(array.nbytes for _, array in architecture.named_parameters(model)),
            _cache_bytes(draft.config, len(model.layers), context_length, kernels),
        )

    @classmethod
    def _inspect_drafter(
        cls,
        draft: Checkpoint,
        form: str,
        checkpoint: Checkpoint,
        served: nn.Module,
        kernels: str,
    ) -> DraftModelConfig:
        if form not in _READERS:
            raise _draft_error(
                f"{draft.folder.name} is a drafter of the form {form}, which is not supported; "
                f"expected {SUPPORTED}"
            )
        shape = ServedShape.read(checkpoint)
        fitting = _READERS[form](draft, shape)
        model: Any = loader.build_dense_model(fitting.checkpoint, classes=fitting.classes)
        _require_layer_outputs(served, fitting, shape)
        head = find_head(served)
        if not fitting.has_head and (head is None or checkpoint.gguf is not None):
            raise _draft_error(
                f"{draft.folder.name} ({form}) needs the served model's output head: expected one "
                f"that can be read alone, got that of {shape.name} (a GGUF file, or of another "
                f"form); use an {EAGLE3} drafter, or a small language model with the same tokenizer"
            )
        _make_drafter_head(fitting, model, served, None, shape)  # its tensors fit
        weights = [model] if fitting.has_head else [model, head]
        context_length = model_config.find_int(checkpoint.config, model_config.CONTEXT_LENGTH_KEYS)
        return cls(
            str(draft.folder.resolve()),
            shape.vocab_size,
            context_length,
            sum(a.nbytes for part in weights for _, a in architecture.named_parameters(part)),
            _cache_bytes(fitting.checkpoint.config, len(model.layers), context_length, kernels),
            form=form,
            layers=fitting.layers,
            longest=fitting.longest,
        )

    @classmethod
    def find_mtp(
        cls,
        checkpoint: Checkpoint,
        kernels: str,
        *,
        plain_kv_cache: bool,
        report: Callable[[str], None] | None = None,
    ) -> DraftModelConfig | None:
        """The multi-token prediction layer of a checkpoint; None: it has none that can draft.

        Reads no weights.

        Args:
            kernels, plain_kv_cache: see `inspect`.
            report: told why a layer cannot draft, in one line; None: the log is, once.
        """
        family = architecture.resolve_family(checkpoint.config)
        tell = report or partial(_log_unused, checkpoint.folder)
        if (reason := describe_unused(checkpoint, family)) is not None:
            tell(reason)
        if not plain_kv_cache or not has_mtp(checkpoint, family):
            return None
        try:
            part = mtp_checkpoint(checkpoint, family)
            model = _build_lazily(part)
        except CheckpointError as error:  # the model itself may be whole
            tell(describe_misfit(checkpoint, family, str(error)))
            return None
        context_length = model_config.find_int(part.config, model_config.CONTEXT_LENGTH_KEYS)
        return cls(
            str(checkpoint.folder.resolve()),
            _vocab_size(part),
            context_length,
            sum(array.nbytes for _, array in architecture.named_parameters(model)),
            _cache_bytes(part.config, 1, context_length, kernels),
            mtp=True,
        )


@cache
def _log_unused(folder: Path, reason: str) -> None:
    log.warning("%s: %s", folder.name, reason)


def _cache_bytes(
    config: model_config.Config, layers: int, context_length: int | None, kernels: str
) -> int:
    native = kernels != "mlx" and native_layers.is_supported()
    return memory.kv_cache_bytes(
        model_config.kv_cache_elements_per_token(config, layers),
        context_length,
        max_kv_size=None,
        kv_bits=None,
        element_bytes=4 if native else 2,
    )


def _draft_error(message: str) -> InputError:
    return InputError(f"draft_model: {message}", "draft_model")


def _require_same_tokens(
    refusal: str, draft: Checkpoint, checkpoint: Checkpoint, tokenizer: ChatTokenizer | None
) -> None:
    """Token ids must mean the same in both models."""
    from ...text.tokenizer import ChatTokenizer

    if tokenizer is None:  # without a tokenizer only their number is known
        expected, got = _vocab_size(checkpoint), _vocab_size(draft)
        if expected != got:
            raise _draft_error(f"{refusal}: expected {expected} token ids, it has {got}")
        return
    ids = tokenizer.vocabulary
    draft_ids = ChatTokenizer(draft.folder, draft.config).vocabulary
    texts = {token: text for text, token in ids.items()}
    different = [
        text
        for text, token in draft_ids.items()
        if ids.get(text, token) != token or texts.get(token, text) != text
    ]
    if different:
        first = draft_ids[different[0]]
        raise _draft_error(
            f"{refusal}: expected the same tokenizer, but {len(different)} of its "
            f"{len(draft_ids)} tokens differ, such as {first}: {different[0]!r} in the draft "
            f"model, {texts.get(first)!r} in the served model; use a small model of the same "
            f"family"
        )


def _require_layer_outputs(served: nn.Module, drafter: FittingDrafter, shape: ServedShape) -> None:
    """The served model's layers must give hidden states: it is called once, lazily."""
    shapes: list[tuple[int, ...]] = []
    name = drafter.checkpoint.folder.name
    try:
        record_layer_outputs(served, drafter.layers, lambda states: shapes.append(states.shape))
        served(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(served))
    except Exception as error:  # whatever a family's code raises where a layer gives something else
        log.debug("%s: outputs of layers cannot be read: %r", shape.name, error)
    if shapes != [(1, 1, shape.width * len(drafter.layers))]:
        raise _draft_error(
            f"{shape.name}: expected layers that give hidden states of {shape.width}, which "
            f"{name} reads, and they do not; use a small language model with the same tokenizer"
        )
    if not drafter.has_embedding and find_embedding(served) is None:
        raise _draft_error(
            f"{name}: expected an embedding in its files, since that of {shape.name} is not "
            f"known, got none"
        )


def _vocab_size(checkpoint: Checkpoint) -> int:
    return model_config.find_int(checkpoint.config, model_config.VOCAB_SIZE_KEYS) or 0


def _is_dense(checkpoint: Checkpoint) -> bool:
    return (model_config.find_int(checkpoint.config, model_config.EXPERT_COUNT_KEYS) or 0) < 2


def _build_lazily(checkpoint: Checkpoint) -> nn.Module:
    if _is_dense(checkpoint):
        return loader.build_dense_model(checkpoint)
    return loader.build_model(checkpoint, None, 0)


def load_draft_model(checkpoint: Checkpoint, kernels: str) -> nn.Module:
    """Load a whole model, dense or with experts, into this process.

    Args:
        kernels: see `model.expert_parallel.parallelize`.

    Raises:
        CheckpointError, InputError: see `model.loader.load_rank_model` and `parallelize`.
    """
    if not _is_dense(checkpoint):
        spec = read_model_spec(checkpoint)
        plan = Plan.whole(spec, 1)
        with loader.open_rank_model(checkpoint, plan, 0, lambda *_: None) as (model, reader):
            parallelize(model, spec.family, plan, SingleRank(), StepTimer(), kernels, reader.read)
        return model
    return _load_dense(checkpoint, kernels)


def _load_dense(
    checkpoint: Checkpoint, kernels: str, classes: ModelClasses | None = None
) -> nn.Module:
    try:
        model = loader.build_dense_model(checkpoint, is_read=True, classes=classes)
        loader.require_checks(checkpoint, model)
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: reading the weights failed: {error}"
        ) from error
    if kernels != "mlx" and native_layers.is_supported():
        native_layers.install_native_layers(model)
        native_blocks.install_native_blocks(model)
    return model


def load_mtp(checkpoint: Checkpoint, kernels: str) -> TokenHead:
    """Load the multi-token prediction layer of a checkpoint into this process.

    Args:
        kernels: see `model.expert_parallel.parallelize`.

    Raises:
        CheckpointError, InputError: see `load_draft_model`.
    """
    family = architecture.resolve_family(checkpoint.config)
    return make_mtp_head(load_draft_model(mtp_checkpoint(checkpoint, family), kernels), family)


def load_drafter(
    draft: Checkpoint, checkpoint: Checkpoint, served: nn.Module, kernels: str
) -> DraftHead:
    """Load a drafter that was made for a model into this process.

    Args:
        draft: see `DraftModelConfig.inspect`.
        checkpoint: of the served model.
        served: the served model, in memory.
        kernels: see `model.expert_parallel.parallelize`.

    Raises:
        CheckpointError, InputError: see `load_draft_model` and `DraftModelConfig.inspect`.
    """
    shape = ServedShape.read(checkpoint)
    fitting = _READERS[find_form(draft.config) or EAGLE3](draft, shape)
    model = _load_dense(fitting.checkpoint, kernels, fitting.classes)
    return _make_drafter_head(fitting, model, served, checkpoint, shape)


def _make_drafter_head(
    fitting: FittingDrafter,
    model: nn.Module,
    served: nn.Module,
    checkpoint: Checkpoint | None,
    shape: ServedShape,
) -> DraftHead:
    """
    Args:
        checkpoint: of the served model, whose output head is read where ranks have parts of it;
            None: it is whole.
    """
    embedding = find_embedding(served)
    if fitting.classes.family == EAGLE3:
        token_ids = eagle3.read_token_ids(model, fitting.checkpoint.folder, shape.vocab_size)
        return eagle3.Eagle3Head(model, embedding, token_ids, shape.vocab_size)
    head: Any = find_head(served)
    if isinstance(head, VocabParallelEmbedding):
        head = head.embedding
    elif isinstance(head, VocabParallelHead):
        assert checkpoint is not None
        head = find_head(loader.build_model(checkpoint, None, 0))
        mx.eval(head.parameters())
    return dflash.DFlashHead(model, embedding, getattr(head, "as_linear", head))


def fit_vocabulary(logits: mx.array, size: int) -> mx.array:
    """[1, any] -> [1, size]: random numbers depend on the width."""
    logits = logits[:, :size]
    missing = size - logits.shape[-1]
    return mx.pad(logits, [(0, 0), (0, missing)], constant_values=-mx.inf) if missing else logits


class DraftModelProposer:
    """Proposes the tokens that a draft model would generate.

    Args:
        config: of the draft model.
        collective: the ranks; rank 0 has the draft model.
        model: on rank 0; None on the others.
        vocab_size: number of the served model's token ids.
    """

    def __init__(
        self,
        config: DraftModelConfig,
        collective: Collective,
        model: nn.Module | None,
        vocab_size: int,
    ) -> None:
        self.config, self.collective, self.model = config, collective, model
        self.vocab_size = vocab_size
        self._tokens: list[int] = []  # in the cache
        self._caches: list[Any] = make_prompt_cache(model) if model is not None else []

    @property
    def length(self) -> int:
        """How many tokens of the text it has read."""
        return len(self._tokens)

    def fits_context(self, length: int) -> bool:
        """Whether it can read a text of so many tokens."""
        return self.config.context_length is None or length <= self.config.context_length

    def reset(self, text: Sequence[int]) -> None:
        """Start a text; keep the common prefix with the last one, without the final token."""
        common = common_prefix_length(pack_tokens(self._tokens), pack_tokens(text))
        self.truncate(min(common, len(text) - 1))

    def truncate(self, length: int) -> None:
        """Forget the tokens beyond `length`."""
        surplus = self.length - length
        if surplus > 0:
            trim_prompt_cache(self._caches, surplus)
            del self._tokens[length:]

    def clear(self) -> None:
        """Forget the text, and free the cache."""
        self._tokens = []
        self._caches = make_prompt_cache(self.model) if self.model is not None else []

    @property
    def is_ready(self) -> bool:
        """Always."""
        return True

    def recording(self) -> AbstractContextManager[None]:
        """It reads nothing of the served model."""
        return nullcontext()

    def drop_states(self, count: int) -> None:
        """It has none."""

    def read(self, new_tokens: Sequence[int]) -> None:
        """Read more of the text without drafting."""
        if self.model is not None:
            self.model(self._input(new_tokens), cache=self._caches)
            mx.eval([cache.state for cache in self._caches])
        self._tokens += new_tokens

    def propose(
        self, new_tokens: Sequence[int], count: int, sample: SampleToken, position: int
    ) -> list[int]:
        """Draft the next `count` tokens.

        They are sampled with the same random numbers as the model's own tokens. Where both models
        have similar distributions they sample the same token, which is accepted much more often
        than the most probable token would be.

        Args:
            new_tokens: of the text, since it last read; at least one.
            sample: see `SampleToken`.
            position: of the first drafted token in the output.
        """
        if self.model is None:
            drafted = mx.zeros((count,), dtype=mx.uint32)
        else:
            token, samples = self._input(new_tokens), []
            for i in range(count):
                logits = self.model(token, cache=self._caches)[:, -1]
                logits = fit_vocabulary(logits, self.vocab_size)
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                samples.append(sample(logprobs, position + i))
                token = samples[-1][None]
            drafted = mx.concatenate(samples).astype(mx.uint32)
        draft = [int(t) for t in np.asarray(self.collective.broadcast_from(0, drafted))]
        self._tokens += [*new_tokens, *draft[:-1]]
        return draft

    def _input(self, tokens: Sequence[int]) -> mx.array:
        """[1, tokens]; ids beyond its vocabulary, which no text contains, become the last id."""
        last = self.config.vocab_size - 1
        return mx.array([[min(t, last) for t in tokens]])
