"""A drafter that was made for a model, on one and two nodes: the answers of one node without it."""

import pytest

import cenacle
from support.drafter_checkpoint import write_dflash, write_eagle3, write_served
from support.drafts import PlainAnswers


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return write_served(tmp_path_factory.mktemp("drafters") / "served")


@pytest.fixture(scope="module")
def expected(served):
    with cenacle.load(str(served), 1, speculative="off") as plain:
        return PlainAnswers(plain, 20)


@pytest.mark.parametrize(
    ("nodes", "trunk", "form"),
    [(1, "replicated", "EAGLE-3"), (2, "sharded", "EAGLE-3"), (2, "sharded", "DSpark")],
)
def test_answers_are_those_of_one_node_without_it(tmp_path, served, expected, nodes, trunk, form):
    if form == "EAGLE-3":
        drafter = write_eagle3(tmp_path / "drafter", served, (0, 1, 2), "trained")
    else:
        drafter = write_dflash(tmp_path / "drafter", served, (0, 2), "trained", is_dspark=True)
    options = {"speculative": "always", "trunk": trunk, "draft_model": str(drafter)}
    with cenacle.load(str(served), nodes, **options) as model:
        expected.require_same(model)
