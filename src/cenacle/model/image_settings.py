"""What a checkpoint says about images: sizes, colors, the tokens around them.

Owns: `ImageSettings`, read from config.json and preprocessor_config.json; which families have them.
Does not know: MLX, pixels, weights.
Invariant: None means that the checkpoint cannot be shown images, and `refusal` says why.
Next: `vision.py` embeds images; `images/decode_worker.py` brings pictures to these sizes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.model_config import Config
from ..errors import CheckpointError
from ..extras import is_installed

# Families by the name of their package in mlx-vlm, whose towers were compared with it.
IMAGE_FAMILIES = ("glm4v_moe", "qwen3_vl_moe", "qwen3_5_moe")
_GLM = "glm4v_moe"
# Attention of a tower grows with the square: more would keep a CPU, and all requests, for minutes.
MAX_PIXELS = 1 << 20
MIN_PIXELS_DEFAULT, MAX_PIXELS_DEFAULT = 56 * 56, 14 * 14 * 4 * 1280  # mlx-vlm's
_MAX_FILE_BYTES = 1 << 20
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageSettings:
    """How a model is shown images.

    Args:
        family: of mlx-lm.
        patch_size: pixels of a patch's side.
        merge_size: patches of a token's side.
        temporal_patch_size: frames of a patch; an image is repeated.
        min_pixels, max_pixels: to which images are resized.
        mean, deviation: of red, green and blue, from 0 to 1.
        image_token: id of the placeholder.
        start_token, end_token: ids before and behind the placeholders.
        enlarges: an image with a side shorter than a token is made larger first.
    """

    family: str
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    image_token: int
    start_token: int
    end_token: int
    enlarges: bool = False

    @property
    def token_side(self) -> int:
        """Pixels of a token's side."""
        return self.patch_size * self.merge_size

    @classmethod
    def read(cls, folder: Path, config: Config, family: str) -> ImageSettings | None:
        """Those of a checkpoint; None: its config knows no images.

        Raises:
            CheckpointError: values that no model has.
        """
        vision = config.get("vision_config")
        if family not in IMAGE_FAMILIES or not isinstance(vision, dict) or not vision:
            return None
        values = _read_json(folder / "preprocessor_config.json")
        processor = _read_json(folder / "processor_config.json").get("image_processor")
        values |= processor if isinstance(processor, dict) else {}
        size = values.get("size") if isinstance(values.get("size"), dict) else {}
        assert isinstance(size, dict)
        min_pixels = values.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS_DEFAULT
        max_pixels = values.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS_DEFAULT
        # GLM counts an image's pixels as often as it repeats it.
        frames = int(values.get("temporal_patch_size") or 2) if family == _GLM else 1
        colors = _CLIP if family == _GLM else ((0.5,) * 3,) * 2

        def token(name: str, *others: str) -> int:
            return int(next(config[n] for n in (name, *others) if n in config))

        try:
            settings = cls(
                family,
                int(values.get("patch_size") or vision.get("patch_size") or 16),
                int(values.get("merge_size") or vision.get("spatial_merge_size") or 2),
                int(values.get("temporal_patch_size") or vision.get("temporal_patch_size") or 2),
                int(min_pixels) // frames,
                min(int(max_pixels) // frames, MAX_PIXELS),
                tuple(map(float, values.get("image_mean") or colors[0])),
                tuple(map(float, values.get("image_std") or colors[1])),
                token("image_token_id"),
                token("vision_start_token_id", "image_start_token_id"),
                token("vision_end_token_id", "image_end_token_id"),
                enlarges=family == _GLM,
            )
        except (StopIteration, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: config.json and preprocessor_config.json: expected sizes and tokens of "
                f"images, got {error!r:.200}"
            ) from error
        settings._check(folder)
        return settings

    def _check(self, folder: Path) -> None:
        sides = (self.patch_size, self.merge_size, self.temporal_patch_size)
        is_valid = all(1 <= side <= 256 for side in sides)
        is_valid &= 1 <= self.min_pixels <= self.max_pixels
        is_valid &= self.token_side**2 <= self.max_pixels
        is_valid &= len(self.mean) == len(self.deviation) == 3 and 0 not in self.deviation
        if not is_valid:
            raise CheckpointError(
                f"{folder}: preprocessor_config.json: expected sizes of images from one token of "
                f"{self.token_side} x {self.token_side} pixels on, and three colors, got {self}"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError("too large")
        members = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a JSON object, got {error!r:.200}") from error
    if not isinstance(members, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return members


def needs_extra() -> bool:
    """Whether what sees is not installed."""
    return not (is_installed("mlx_vlm") and is_installed("PIL"))
