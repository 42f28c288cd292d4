"""Products of parameters, too long for `make test`: there one value of an axis at a time, in turn.

A test of every family with `in_turn(PLACEMENTS, number of the family + nodes)` has every placement
beside every family and every number of nodes, not all three together. `make parity` has the whole
products. Each user has a test of which pairs occur.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")
WHOLE = "CENACLE_WHOLE_PRODUCTS"  # environment variable that `make parity` sets


def are_whole() -> bool:
    return bool(os.environ.get(WHOLE))


def in_turn(values: Sequence[Value], turn: int) -> list[Value]:
    """The value whose turn it is; where products are whole, all of them."""
    return list(values) if are_whole() else [values[turn % len(values)]]
