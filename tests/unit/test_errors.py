"""The tree of errors is the one its docstring draws."""

import json
import logging
import re
import sys

import pytest

from cenacle import errors
from cenacle.errors import ClusterError
from cenacle.logs import PrintableFormatter

TREE = {
    "CenacleError": ("Exception", 1),
    "InputError": ("CenacleError", 2),
    "CheckpointError": ("CenacleError", 3),
    "PlanError": ("CenacleError", 4),
    "Busy": ("CenacleError", 6),
    "ClusterError": ("CenacleError", 5),
    "NodesMissing": ("ClusterError", 5),
    "RankLost": ("ClusterError", 5),
}


@pytest.mark.parametrize(("name", "parent", "code"), [(n, *v) for n, v in TREE.items()])
def test_parent_and_exit_code(name, parent, code):
    error = getattr(errors, name)
    assert error.__base__.__name__ == parent
    assert error.exit_code == code


def test_tree_has_no_other_error_and_the_docstring_draws_it():
    assert {n for n, v in vars(errors).items() if isinstance(v, type)} == set(TREE)
    drawn = re.findall(r"(\w+)\s+\((\d)\)", errors.__doc__)
    assert dict(drawn) == {n: str(code) for n, (_, code) in TREE.items() if n != "CenacleError"}


def test_fields():
    error = errors.InputError("top_p: expected 0 to 1, got 2", "top_p")
    assert (str(error), error.field) == ("top_p: expected 0 to 1, got 2", "top_p")
    assert errors.InputError("no").field is None
    lost = errors.RankLost(3, "rank 3 was killed")
    assert (str(lost), lost.rank) == ("rank 3 was killed", 3)


class OwnKind(errors.CheckpointError):
    """A kind that the other process does not know."""


NAMED = errors.PlanError("too large")
NAMED.node_id = "n"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.CenacleError("wrong"), errors.ClusterError),
        (errors.InputError("wrong", "top_p"), errors.InputError),
        (errors.InputError("wrong"), errors.InputError),
        (errors.CheckpointError("wrong"), errors.CheckpointError),
        (NAMED, errors.PlanError),
        (errors.Busy("full", 7), errors.Busy),
        (errors.ClusterError("wrong"), errors.ClusterError),
        (errors.RankLost(3, "wrong"), errors.RankLost),
        (OwnKind("wrong"), errors.CheckpointError),
    ],
)
def test_an_error_is_the_same_in_another_process(error, kind):
    sent = json.loads(json.dumps(errors.error_to_json(error)))
    received = errors.error_from_json(sent, "b: ")
    assert type(received) is kind
    assert str(received) == f"b: {error}"
    expected = {k: v for k, v in vars(error).items() if v is not None}
    assert {k: v for k, v in vars(received).items() if v is not None} == expected


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        [],
        {},
        {"kind": "SystemExit", "message": "x"},
        {"kind": "RankLost", "message": "x"},
        {"kind": "Busy", "retry_after_s": "soon"},
        {"kind": ["InputError"]},
    ],
)
def test_what_is_not_an_error_becomes_a_cluster_error(data):
    assert type(errors.error_from_json(data)) is errors.ClusterError


def test_a_line_of_a_log_stays_one_line():
    record = logging.LogRecord("x", logging.ERROR, "", 1, "%s", ("a\n2026 forged\x1b[2J\r",), None)
    assert PrintableFormatter("%(message)s").format(record) == "a\\n2026 forged\\x1b[2J\\r"
    try:
        raise ValueError("b")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert PrintableFormatter("%(message)s").format(record).splitlines()[1].startswith("Traceback")
    assert str(ClusterError("two\nlines\x00 \u202e" + "x" * 9999)).isprintable()
