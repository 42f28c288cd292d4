"""A long answer is rendered in pieces, so that other threads run in between."""

import json

from hypothesis import given
from hypothesis import strategies as st

from cenacle.server.generation import json_pieces

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=30,
)


@given(VALUES)
def test_pieces_are_what_json_gives(value):
    assert "".join(json_pieces(value, elements=3)) == json.dumps(value)


def test_no_piece_holds_a_long_list():
    body = {"choices": [{"logprobs": {"content": [{"token": "a", "top": [1.5] * 20}] * 10_000}}]}
    pieces = list(json_pieces(body))
    assert "".join(pieces) == json.dumps(body)
    assert max(map(len, pieces)) < 20_000
