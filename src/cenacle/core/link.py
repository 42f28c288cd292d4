"""What is known of the link between two nodes.

Owns: `Link`.
Does not know: how it is measured (`cluster/link_probe.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..message import Message, Range


@dataclass(frozen=True)
class Link(Message):
    """A link from one node to another.

    Args:
        latency_s: half the median round trip of a small message.
        bytes_per_s: of a transfer of a few megabytes.
    """

    latency_s: Annotated[float, Range(1e-9, 1e3)]
    bytes_per_s: Annotated[float, Range(1.0, 1e18)]
