"""Sampling parameters that a checkpoint recommends.

Owns: reading them from generation_config.json, as vLLM and SGLang do.
Does not know: requests; the HTTP APIs use them for what a request leaves out.
Invariant: every value that was read is one that `Sampling` accepts.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..core.request import Sampling
from ..errors import InputError

log = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"
NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
MAX_BYTES = 1 << 20


def read_sampling_defaults(folder: Path) -> dict[str, Any]:
    """Arguments of `Sampling` that the checkpoint's generation_config.json gives.

    A file that is no JSON object and a value that is out of range are left out with a warning.
    """
    file = folder / FILE_NAME
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"{file.stat().st_size:,} bytes")
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: expected a JSON object, got %.200s; it is ignored", file, error)
        return {}
    defaults = {}
    for name in NAMES:
        value = content.get(name)
        if value is None or (name == "top_k" and value == -1):  # -1: all tokens
            continue
        try:
            defaults[name] = getattr(Sampling(**{name: value}), name)
        except InputError as error:
            log.warning("%s: %s; it is ignored", file, error)
    return defaults
