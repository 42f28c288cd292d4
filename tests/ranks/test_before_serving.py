"""Verification of real groups: what passes, what is recorded, and one byte that is wrong."""

import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

import cenacle
from cenacle.api import Model
from cenacle.errors import ClusterError
from cenacle.load_options import LoadOptions
from cenacle.model.checkpoint import Checkpoint
from cenacle.ranks import local_ranks
from cenacle.ranks.local_ranks import LocalRanks

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"


def serve(folder, nodes, verify=True, **options):
    """What a start with verification reports; its records are in `folder`."""
    reported = []
    load_options = LoadOptions(str(folder / "model"), nodes, verify=verify, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CENACLE_HOME", str(folder))
        loaded = Model.load(load_options, report=reported.append)
    with loaded as model:
        assert not any(model.group.counts.values())
        assert model.generate("What is 12 + 30?", max_tokens=8).text == "42"
    return reported


def flip(tensor, at, bit=1):
    """Change one bit of a tensor's file; again: as it was."""
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start + at)
        byte = file.read(1)[0]
        file.seek(tensor.start + at)
        file.write(bytes([byte ^ bit]))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A copy of the demo model that was served once, and what that start said."""
    folder = tmp_path_factory.mktemp("verification")
    shutil.copytree(DEMO, folder / "model")
    return folder, serve(folder, 2, verify=None, placement="whole")


def test_a_group_is_compared_with_one_node_and_what_passed_is_remembered(first):
    folder, messages = first
    assert "first a single node" in messages[1]
    assert "passed" in messages[2]
    assert "17 prompts" in messages[2]
    assert "an all-reduce takes" in messages[2]
    assert serve(folder, 2, verify=None, placement="whole") == []
    # Another plan is compared with what that one node gave.
    messages = serve(folder, 2, verify=None, placement="sliced", trunk="sharded")
    assert len(messages) == 2
    assert "passed" in messages[1]


def test_a_byte_that_is_wrong_is_named_and_not_served(first):
    """Of all the model's bytes one of the least telling: the lowest bits of one weight."""
    folder, _ = first
    tensors = Checkpoint.open(folder / "model").tensors
    name = next(n for n, t in tensors.items() if "experts" in n and t.start > 3 << 20)
    flip(tensors[name], 400)
    try:
        with pytest.raises(ClusterError, match=r"rank [01] does not hold .* of expert \d+\. The"):
            serve(folder, 2, placement="whole")
    finally:
        flip(tensors[name], 400)


def test_a_group_that_computes_something_else_is_not_served(first, monkeypatch):
    """As if a chip multiplied wrongly: the weights are right, and the ranks agree."""
    program = (sys.executable, str(Path(__file__).parent / "wrong_rank.py"))
    monkeypatch.setattr(local_ranks, "LocalRanks", partial(LocalRanks, program=program))
    with pytest.raises(ClusterError, match="tokens is answered differently than by a single node"):
        serve(first[0], 2, placement="whole")
