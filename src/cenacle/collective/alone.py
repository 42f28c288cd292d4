"""The group of one."""

from __future__ import annotations

import mlx.core as mx

from .base import Collective


class Alone(Collective):
    """One rank: every sum is what it gave."""

    rank = 0
    size = 1

    def _all_sum(self, x: mx.array) -> mx.array:
        return x
