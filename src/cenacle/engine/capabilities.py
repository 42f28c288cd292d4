"""What works for a family, found out from a model of its tiny config, without weights.

Owns: the columns of `cenacle families` that follow from the model's modules and caches.
Does not know: checkpoints, requests.
Invariant: nothing is stated here that the loader or the batch decides otherwise; a test of each
column runs every family.
Next: `model/families.py`, what differs between families.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..model import architecture
from ..model.config_catalog import tiny_config
from ..model.families import Batching, FamilyInfo, family_of
from ..model.format_recognition import PUBLISHED_FORMATS
from ..model.gguf_families import FAMILIES as GGUF_FAMILIES
from ..model.image_settings import IMAGE_FAMILIES, needs_extra
from ..model.mtp import MTP_FAMILIES
from ..model.request_caches import install_request_attention
from ..model.spec_reader import find_dense_modules
from .batch import find_batching
from .cache.state_rewinder import can_drop


@dataclass(frozen=True)
class Capabilities:
    """What works for a family.

    Args:
        formats: of published checkpoints, beside floats and mlx-lm's own quantization.
        gguf: whether GGUF files are read.
        images: whether requests may have images.
        drafts: whether speculative decoding works: the caches can drop rejected tokens.
        mtp: whether a checkpoint's own layer for multi-token prediction drafts.
        attention_sharding: whether a sharded trunk divides the heads of attention.
        batching: which requests share passes.
    """

    formats: tuple[str, ...]
    gguf: bool
    images: bool
    drafts: bool
    mtp: bool
    attention_sharding: bool
    batching: Batching

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields above."""
        return {**asdict(self), "batching": self.batching.name.lower()}


def find_capabilities(row: FamilyInfo) -> Capabilities | None:
    """What works for a family; None: it cannot run on this machine."""
    if row.refused is not None:
        return None
    family = family_of(row.name)
    config = tiny_config(row.name)
    with architecture.discard_random_init():
        model_class, arguments = architecture.model_classes(config)
        model = model_class(arguments.from_dict(config))  # type: ignore[call-arg]
        architecture.unify_experts(model)
        if family.request_attention:
            install_request_attention(model, family.request_attention)
        batching = find_batching(model, family.batching)
        drafts = batching is not Batching.ONE_BY_ONE and can_drop(model)
        return Capabilities(
            formats=PUBLISHED_FORMATS,
            gguf=any(gguf.model_type == row.name for gguf in GGUF_FAMILIES.values()),
            images=row.name in IMAGE_FAMILIES and not needs_extra(),
            drafts=drafts,
            mtp=drafts and row.name in MTP_FAMILIES,
            attention_sharding=any(
                part.kind == "attention" for part in find_dense_modules(model, family)
            ),
            batching=batching,
        )
