"""A checkpoint as the package that has its family loads and runs it, alone."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model

from cenacle.model.families import Zoo
from cenacle.model.zoo import find_classes


class VlmLanguageModel(nn.Module):
    """mlx-vlm's own language model, called as mlx-lm's are."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from mlx_vlm.models.cache import make_prompt_cache
        from mlx_vlm.utils import load_model as load_vlm_model

        # Not strict: its towers have no weights here.
        model = load_vlm_model(folder, strict=False)
        self.prefix = "thinker.language_model" if "thinker" in model else "language_model"
        self.language_model = getattr(model, "thinker", model).language_model
        self.make_cache = lambda: make_prompt_cache(self.language_model)
        self.layers = self.language_model.layers

    def __call__(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        if cache is None or (
            cache[0].empty() if hasattr(cache[0], "empty") else True
        ):  # another conversation: forget the last one's places
            self.language_model._position_ids = self.language_model._rope_deltas = None
        return self.language_model(ids, cache=cache or self.make_cache()).logits

    def parameters(self) -> dict[str, Any]:
        return {self.prefix: self.language_model.parameters()}


def load_own_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of mlx-lm or mlx-vlm, and its config."""
    config = json.loads((folder / "config.json").read_text())
    if find_classes(config).zoo is Zoo.MLX_VLM:
        return VlmLanguageModel(folder), config
    return load_model(folder)
