"""The loader, the download and the checksums see the same bytes of a checkpoint: one list."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
from one_process import VECTORS

from cenacle.cluster import messages, node_info
from cenacle.cluster.download import distribution
from cenacle.core.plan import Plan
from cenacle.model import architecture
from cenacle.model.byte_ranges import ColumnRange, merge_spans, subtract_spans
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.checksums import compare_checksums, weight_checksums
from cenacle.model.loader import load_rank_model
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth

NODES = 3
WEIGHTS = "model.safetensors"
PLACEMENTS = ("whole", "sliced", "replicated")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Experts one by one, stacked, fused, and quantized with shared ones."""
    root = tmp_path_factory.mktemp("synth")
    options = {"quantize": 4, "group_size": 32, "dtype": "bfloat16"}
    return {
        "mixtral": VECTORS / "mixtral",
        "dbrx": VECTORS / "dbrx",
        "qwen3_moe": synth(root / "qwen3_moe", family="qwen3_moe").path,
        "qwen2_moe": synth(root / "qwen2_moe", family="qwen2_moe", **options).path,
    }


def spans_of(slices) -> list[tuple[int, int]]:
    """The spans that a rank must download of the weights, columns one by one."""
    spans = []
    for byte_range in required_ranges(slices)[WEIGHTS]:
        spans += byte_range.spans() if isinstance(byte_range, ColumnRange) else [byte_range]
    return merge_spans(spans)


def load(folder, plan, rank):
    return load_rank_model(Checkpoint.open(folder), plan, rank, lambda *_: None)


def parameters(model) -> dict[str, mx.array]:
    return dict(architecture.named_parameters(model))


def scrambled(folder, copy, spans):
    """A copy of a checkpoint with random bits instead of all weights outside `spans`."""
    shutil.copytree(folder, copy)
    data = np.fromfile(copy / WEIGHTS, np.uint8)
    start = min(t.start for t in Checkpoint.open(folder).tensors.values())
    draw = np.random.default_rng(0)
    for a, b in subtract_spans([(start, len(data))], spans):
        data[a:b] = draw.integers(0, 256, b - a)
    data.tofile(copy / WEIGHTS)
    return copy


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["mixtral", "dbrx", "qwen3_moe", "qwen2_moe"])
def test_bytes_outside_of_the_list_change_nothing(folders, name, placement, tmp_path):
    """Neither what a rank loads nor its checksums depend on them."""
    folder = folders[name]
    plan = getattr(Plan, placement)(read_model_spec(Checkpoint.open(folder)), NODES)
    layout = ModelLayout.read(Checkpoint.open(folder))
    for rank in range(NODES):
        slices = slices_for(plan, rank, layout)
        want = load(folder, plan, rank)
        assert want.rank_slices.tensors == slices.tensors, "the loader has the same list"
        got = load(scrambled(folder, tmp_path / str(rank), spans_of(slices)), plan, rank)
        expected = parameters(want)
        assert all(mx.array_equal(v, expected[k]) for k, v in parameters(got).items())
        assert weight_checksums(got) == weight_checksums(want)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_a_byte_of_the_list_changes_the_checksums_of_the_ranks_that_list_it(
    folders, name, placement, tmp_path
):
    folder = folders[name]
    checkpoint = Checkpoint.open(folder)
    spec = read_model_spec(checkpoint)
    plan = getattr(Plan, placement)(spec, NODES)
    layout = ModelLayout.read(checkpoint)
    slices = [slices_for(plan, rank, layout) for rank in range(NODES)]
    lists = [spans_of(s) for s in slices]
    # Sliced shared experts are listed whole, because mlx-lm may convert them before the slicing.
    unread = tuple(f"{path}." for path in slices[0].unread)
    tensors = [t for name, t in checkpoint.tensors.items() if not name.startswith(unread)]
    whole = weight_checksums(load(folder, Plan.whole(spec, 1), 0))
    unchanged = [weight_checksums(load(folder, plan, rank)) for rank in range(NODES)]
    # Each byte is of another tensor, so of another piece: all are changed at once.
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = np.fromfile(folder / WEIGHTS, np.uint8)
    draw = np.random.default_rng(1)
    chosen = [tensors[index] for index in draw.choice(len(tensors), 12, replace=False)]
    places = [int(draw.integers(tensor.start, tensor.stop)) for tensor in chosen]
    data[places] ^= 1
    data.tofile(copy / WEIGHTS)
    listed = [
        tuple(rank for rank, spans in enumerate(lists) if any(a <= at < b for a, b in spans))
        for at in places
    ]
    ranks = [weight_checksums(load(copy, plan, rank)) for rank in range(NODES)]
    changed: dict[str, tuple[int, ...]] = {}
    for rank in range(NODES):
        for piece, sum_ in ranks[rank].items():
            if sum_ != unchanged[rank][piece]:
                changed[piece] = (*changed.get(piece, ()), rank)
    assert sorted(changed.values()) == sorted(listed)
    blamed = dict(compare_checksums(whole, ranks).mismatches)
    assert blamed.keys() == changed.keys()
    assert all(set(changed[piece]) <= set(blamed[piece]) for piece in changed)


def test_a_piece_that_no_rank_holds_is_a_mismatch():
    folder = VECTORS / "mixtral"
    spec = read_model_spec(Checkpoint.open(folder))
    whole = weight_checksums(load(folder, Plan.whole(spec, 1), 0))
    ranks = [weight_checksums(load(folder, Plan.whole(spec, 2), rank)) for rank in range(2)]
    assert compare_checksums(whole, ranks).mismatches == ()
    lost = next(piece for piece in ranks[1] if piece.endswith("]"))
    del ranks[1][lost]
    assert compare_checksums(whole, ranks).mismatches == ((lost, (0, 1)),)


def test_the_model_is_built_once_for_all_nodes_that_lack_it(monkeypatch, tmp_path):
    """Not once per node: mlx-lm's classes take a second for a large model."""
    built = []
    real = architecture.model_classes

    def count(config):
        built.append(config["model_type"])
        return real(config)

    checkpoint = Checkpoint.open(VECTORS / "mixtral")
    plan = Plan.whole(read_model_spec(checkpoint), 4)
    orders = []

    class FakeHead:
        def serve_files(self, server):
            pass

        def set_download_progress(self, node, done, total):
            pass

        def send_orders(self, pairs, _):
            if isinstance(pairs[0][1], messages.StartDownload):
                orders.extend(message.order for _, message in pairs)
                return [messages.Done() for _ in pairs]
            digest = node_info.checkpoint_digest(checkpoint.folder)
            progress = messages.DownloadProgress(True, 1, 1, "folder", digest, 0)
            return [progress for _ in pairs]

    class Node:
        def __init__(self, name):
            self.name = name

    sharing = distribution.ModelDistribution(FakeHead(), "tiny", checkpoint, None)
    members = [Node(name) for name in "abcd"]
    local = [distribution.LocalModel(str(tmp_path / n.name), n.name == "a") for n in members]
    monkeypatch.setattr(architecture, "model_classes", count)
    sharing.distribute(members, local, plan, lambda _: None)
    assert built == ["mixtral"]
    layout = ModelLayout.read(checkpoint)
    for rank, order in enumerate(orders, 1):
        assert order["from_head"] == required_ranges(slices_for(plan, rank, layout))
