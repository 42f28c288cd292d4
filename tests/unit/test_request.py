"""A request that exists is valid, and comes through JSON unchanged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.core.request import Request, Sampling, TokenEvent
from cenacle.core.step import Step
from cenacle.errors import InputError

samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 1000),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_context_size=st.integers(-1, 100),
    logit_bias=st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100)),
)
tokens = st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple)
requests = st.builds(
    Request,
    id=st.text(max_size=5),
    tokens=tokens,
    max_tokens=st.integers(1, 10**6),
    stop_tokens=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    sampling=samplings,
)


@given(
    st.builds(
        Step,
        number=st.integers(0),
        admitted=st.lists(requests, max_size=3).map(tuple),
        cancelled=st.lists(st.text(max_size=4), max_size=3).map(tuple),
        measured=st.booleans(),
    )
)
def test_json_round_trip(step):
    assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("temperature", [0, 2, 0.7], [-0.1, 2.01, float("nan"), float("inf"), "1", None, True]),
        ("top_p", [1, 1e-9], [0, -1, 1.1, float("nan"), "1", None]),
        ("top_k", [0, 10**6, 2**31 - 1], [-1, 2**31, 10**1300, "3", None]),
        ("min_p", [0, 1], [-0.1, 1.1, float("nan")]),
        ("repetition_penalty", [0.1, 1, 10], [0, -1, 10.1, float("nan")]),
        ("presence_penalty", [-2, 0, 2], [-2.1, 2.1, float("nan"), False]),
        ("frequency_penalty", [-2, 0, 2], [-2.1, 2.1, float("nan")]),
        ("repetition_context_size", [-1, 0, 2**31 - 1], [-2, 2**31, 1.5, "3", None]),
        ("presence_context_size", [-1, 0, 64], [-2, True]),
        ("frequency_context_size", [-1, 0, 64], [-2, True]),
        ("seed", [None, 0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1, "x", True]),
    ],
)
def test_fields_of_sampling(name, good, bad):
    for value in good:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(InputError, match=f"^{name}: expected") as caught:
            Sampling(**{name: value})
        assert caught.value.field == name


def test_fields_of_request():
    with pytest.raises(InputError, match="at least one token") as caught:
        Request("a", (), 1)
    assert caught.value.field == "prompt"
    for number in (0, -5, 2**31, 10**1300):
        reason = "max_tokens: expected an integer from 1 to 2147483647, got"
        with pytest.raises(InputError, match=reason) as caught:
            Request("a", (1,), number)
        assert caught.value.field == "max_tokens"
        assert len(str(caught.value)) < 120
    with pytest.raises(InputError, match="min_tokens"):
        Request("a", (1,), 1, min_tokens=2**31)


def test_greedy_is_the_default():
    assert Request("a", (1,), 1).sampling == Sampling(temperature=0.0, seed=None)
    assert TokenEvent("a", 3).finish is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 3.5), ("seed", 1.5), ("logit_bias", {7: 101.0}), ("logit_bias", {2**40: 1})],
)
def test_whole_numbers_and_biases_are_checked(field, value):
    with pytest.raises(InputError, match=field):
        Sampling(**{field: value})


def test_what_is_left_of_a_request():
    request = Request("a", (1, 2), 5, sampling=Sampling(seed=3))
    assert request.resumed_with([]) == request
    left = request.resumed_with([7]).resumed_with([8, 9])
    assert left == request.resumed_with([7, 8, 9])
    assert (left.tokens, left.max_tokens, left.resumed_tokens) == ((1, 2, 7, 8, 9), 2, 3)
    with pytest.raises(InputError, match="resumed_tokens"):
        Request("a", (1, 2), 5, resumed_tokens=2)
