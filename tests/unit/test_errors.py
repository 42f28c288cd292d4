"""The tree of errors is the one its docstring draws."""

import re

import pytest

from cenacle import errors

TREE = {
    "CenacleError": ("Exception", 1),
    "InputError": ("CenacleError", 2),
    "CheckpointError": ("CenacleError", 3),
    "PlanError": ("CenacleError", 4),
    "Busy": ("CenacleError", 6),
    "ClusterError": ("CenacleError", 5),
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
