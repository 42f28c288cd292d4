"""Downloading a node's part of a checkpoint from a fake Hub and from another node."""

import json
import logging
import shutil

import mlx.core as mx
import pytest

from cenacle.cluster.download import download, source, sparse_store
from cenacle.cluster.download.download import fetch_metadata, fetch_ranges
from cenacle.cluster.download.hub import Hub
from cenacle.cluster.download.local_folder import LocalFolder
from cenacle.cluster.download.sparse_store import SparseStore
from cenacle.core.plan import Plan
from cenacle.errors import CheckpointError
from cenacle.model.architecture import named_parameters
from cenacle.model.byte_ranges import JOURNAL, ColumnRange, total_bytes
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.loader import load_rank_model
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth
from fake_hub import REPO, FakeHub, use_fake_hub

FAMILIES = ("qwen3_moe", "mixtral", "dbrx", "gpt_oss")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return {family: synth(root / family, family=family).path for family in FAMILIES}


@pytest.fixture(autouse=True)
def small_headers(monkeypatch):
    """The models are tiny: the first guess at a header must not hold all of them."""
    monkeypatch.setattr(source, "FIRST_RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(download, "HEADER_BYTES", 2048)


@pytest.fixture
def hub(folders, monkeypatch):
    server = FakeHub(folders["qwen3_moe"])
    use_fake_hub(monkeypatch, server.url)
    yield server
    server.close()


def ranges_of(checkpoint, plan, rank, **options):
    return required_ranges(slices_for(plan, rank, ModelLayout.read(checkpoint)), **options)


def parameters(folder, plan, rank):
    model = load_rank_model(Checkpoint.open(folder), plan, rank, lambda *_: None)
    return dict(named_parameters(model))


@pytest.mark.parametrize("gap", [0, 1 << 16])
@pytest.mark.parametrize("placement", ["whole", "replicated", "sliced"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_is_enough_to_load_a_rank(folders, family, placement, gap, tmp_path):
    """From a folder elsewhere, span by span; what was not fetched is holes, and is not missed."""
    whole = folders[family]
    plan = getattr(Plan, placement)(read_model_spec(Checkpoint.open(whole)), 3)
    for rank in range(3):
        store = fetch_metadata(LocalFolder(whole), tmp_path / str(rank))
        described = Checkpoint.open(store.folder)
        assert read_model_spec(described) == plan.spec
        wanted = ranges_of(described, plan, rank, column_gap_bytes=gap)
        # Zeros where they are not known to be wanted would not be noticed in a missing part.
        fetched = fetch_ranges([LocalFolder(whole)], store, wanted)
        assert fetched <= total_bytes(w for each in wanted.values() for w in each)
        assert fetch_ranges([LocalFolder(whole)], store, wanted) == 0
        expected, got = parameters(whole, plan, rank), parameters(store.folder, plan, rank)
        assert expected.keys() == got.keys()
        assert all(mx.array_equal(expected[k], got[k]) for k in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_node_downloads_more_than_its_part(folders, family):
    checkpoint = Checkpoint.open(folders[family])
    for placement in ("whole", "replicated"):
        plan = getattr(Plan, placement)(read_model_spec(checkpoint), 3)
        for rank in range(3):
            wanted = ranges_of(checkpoint, plan, rank)
            fetched = total_bytes(w for each in wanted.values() for w in each)
            assert fetched <= 1.05 * plan.bytes_of(rank)["total"]


def test_only_required_ranges_come_from_the_hub(hub, folders, tmp_path):
    store = fetch_metadata(Hub(REPO), tmp_path / "part")
    described = Checkpoint.open(store.folder)
    plan = Plan.whole(read_model_spec(described), 2)
    wanted = ranges_of(described, plan, 1)
    before, progress = hub.sent, []
    fetched = fetch_ranges([Hub(REPO)], store, wanted, lambda *p: progress.append(p))
    assert hub.sent - before == fetched
    assert progress[0][0] < progress[-1][0] == progress[-1][1]
    expected, got = parameters(folders["qwen3_moe"], plan, 1), parameters(store.folder, plan, 1)
    assert all(mx.array_equal(expected[k], got[k]) for k in expected)
    taken = sum(p.stat().st_blocks * 512 for p in store.folder.glob("*.safetensors"))
    assert taken < sum(p.stat().st_size for p in store.folder.glob("*.safetensors"))


@pytest.fixture
def with_stray_files(tmp_path):
    """A checkpoint whose index names an odd file, beside weights that it does not name."""
    folder = synth(tmp_path / "stray", family="qwen3_moe", shard_bytes=200_000).path
    index = folder / "model.safetensors.index.json"
    shard = min(folder.glob("*.safetensors"))
    index.write_text(index.read_text().replace(shard.name, "first[1].safetensors"))
    shard.rename(folder / "first[1].safetensors")
    for name in ("model.safetensors", "model-99999.safetensors", "consolidated.safetensors"):
        (folder / name).write_bytes(bytes(1000))
    return folder


def named_by_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return set(index["weight_map"].values())


@pytest.mark.parametrize("kind", ["hub", "folder", "part"])
def test_the_index_decides_which_weights_are_transferred(
    with_stray_files, kind, tmp_path, monkeypatch, caplog
):
    server = FakeHub(with_stray_files)
    use_fake_hub(monkeypatch, server.url)
    source = Hub(REPO) if kind == "hub" else LocalFolder(with_stray_files)
    if kind == "part":  # as a program without this rule has left it
        part = SparseStore(tmp_path / "part")
        for file in with_stray_files.iterdir():
            part.create_file(file.name, file.stat().st_size)
            data = file.read_bytes()
            digest = part.write(file.name, 0, iter([data]), len(data))
            part.mark_present(file.name, [((0, len(data)), digest)])
        source = LocalFolder(part.folder)
    with caplog.at_level(logging.WARNING):
        store = fetch_metadata(source, tmp_path / "copy")
        source.files()
        Checkpoint.open(store.folder)
    server.close()
    weights = {file.name for file in store.folder.glob("*.safetensors")}
    assert weights == named_by_index(with_stray_files)
    assert "first[1].safetensors" in weights
    warnings = [r for r in caplog.records if "not named by the index" in r.getMessage()]
    assert len(warnings) == 1
    assert "such as consolidated.safetensors, model-99999.safetensors" in warnings[0].getMessage()
    if kind == "hub":
        assert {name for name, *_ in server.requests if name.endswith(".safetensors")} == weights


def test_an_index_of_the_hub_that_is_none_is_refused(with_stray_files, tmp_path, monkeypatch):
    server = FakeHub(with_stray_files)
    use_fake_hub(monkeypatch, server.url)
    index = with_stray_files / "model.safetensors.index.json"
    for text in (
        "[" * 100_000,
        "{}",
        '{"weight_map": {"a": "../b.safetensors"}}',
        " " * 70_000_000,
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="index"):
            fetch_metadata(Hub(REPO), tmp_path / "copy")
    server.close()


def test_interrupted_download_is_resumed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK_BYTES", 4096)
    store = fetch_metadata(Hub(REPO), tmp_path / "part")
    wanted = {"model.safetensors": [(0, 50_000)]}
    hub.break_after, hub.refuse = 1000, 2
    fetch_ranges([Hub(REPO)], store, wanted)
    # A program that was killed knows what it had, and a line that was half written does no harm.
    with (store.folder / JOURNAL).open("a") as f:
        f.write('{"file": "model.safetens')
    again = SparseStore(store.folder)
    assert again.missing(wanted) == {}
    hub.requests.clear()
    fetch_ranges([Hub(REPO)], again, {"model.safetensors": [(0, 60_000)]})
    assert min(start for _, start, _ in hub.requests) == 50_000


def test_unreachable_source_is_given_up_for_another(hub, folders, tmp_path):
    store = fetch_metadata(Hub(REPO), tmp_path / "part")
    wanted = {"model.safetensors": [(0, 50_000)]}
    hub.refuse = 1000
    with pytest.raises(CheckpointError, match="responds 503; gave up after 6 attempts"):
        fetch_ranges([Hub(REPO)], store, wanted)
    fetch_ranges([Hub(REPO), LocalFolder(folders["qwen3_moe"])], store, wanted)
    assert store.missing(wanted) == {}


def test_from_a_node_with_a_part(hub, tmp_path):
    one, other = (fetch_metadata(Hub(REPO), tmp_path / n) for n in ("one", "other"))
    fetch_ranges([Hub(REPO)], one, {"model.safetensors": [(20_000, 40_000)]})
    before = hub.sent
    fetch_ranges(
        [LocalFolder(one.folder), Hub(REPO)], other, {"model.safetensors": [(25_000, 35_000)]}
    )
    assert hub.sent == before
    with pytest.raises(CheckpointError, match="does not have bytes 35000 to 50000"):
        fetch_ranges([LocalFolder(one.folder)], other, {"model.safetensors": [(30_000, 50_000)]})


def test_server_without_ranges_is_rejected(hub, tmp_path):
    store = fetch_metadata(Hub(REPO), tmp_path / "part")
    hub.ranges = False
    with pytest.raises(CheckpointError, match=r"expected status 206 .*, got 200"):
        fetch_ranges([Hub(REPO)], store, {"model.safetensors": [(30_000, 50_000)]})


def test_damage_on_the_way_is_detected(hub, folders, tmp_path):
    size = (folders["qwen3_moe"] / "model.safetensors").stat().st_size
    store = fetch_metadata(Hub(REPO), tmp_path / "part")
    hub.damage = 100_000
    with pytest.raises(CheckpointError, match="damaged in transit"):
        fetch_ranges([Hub(REPO)], store, {"model.safetensors": [(0, size)]})
    hub.damage = None
    fetch_ranges([Hub(REPO)], store, {"model.safetensors": [(0, size)]})
    assert (store.folder / "model.safetensors").read_bytes() == (
        folders["qwen3_moe"] / "model.safetensors"
    ).read_bytes()


def test_damage_on_the_disk_is_found_and_repaired(folders, tmp_path):
    store = fetch_metadata(LocalFolder(folders["qwen3_moe"]), tmp_path / "part")
    wanted = {"model.safetensors": [(30_000, 50_000)]}
    fetch_ranges([LocalFolder(folders["qwen3_moe"])], store, wanted)
    assert store.find_damaged() == {}
    with (store.folder / "model.safetensors").open("r+b") as f:
        f.seek(40_000)
        byte = f.read(1)
        f.seek(40_000)
        f.write(bytes([byte[0] ^ 255]))
    again = SparseStore(store.folder)
    wrong = again.find_damaged()
    assert [a <= 40_000 < b for a, b in wrong["model.safetensors"]] == [True]
    again.mark_missing(wrong)
    assert SparseStore(store.folder).missing(wanted) == again.missing(wanted) != {}
    fetch_ranges([LocalFolder(folders["qwen3_moe"])], again, wanted)
    assert again.find_damaged() == {}


def test_full_disk_is_explained_before_and_during_a_download(folders, tmp_path, monkeypatch):
    source = LocalFolder(folders["qwen3_moe"])
    store = fetch_metadata(source, tmp_path / "part")
    wanted = {"model.safetensors": [(30_000, 50_000)]}
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(CheckpointError, match=r"needs 20\.0 KB, this disk has 1\.00 KB free"):
            fetch_ranges([source], store, wanted)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(sparse_store.os, "fsync", full)
        with pytest.raises(CheckpointError, match="the disk is full; free some space"):
            fetch_ranges([source], store, wanted)
    assert fetch_ranges([source], store, wanted) == 20_000


def test_changed_source_is_rejected(folders, tmp_path):
    store = fetch_metadata(LocalFolder(folders["qwen3_moe"]), tmp_path / "part")
    with pytest.raises(CheckpointError, match="remove the folder to download the new model"):
        store.create_file("model.safetensors", 17)


def test_missing_checkpoint_is_explained(hub, tmp_path):
    with pytest.raises(CheckpointError, match="no such repository"):
        fetch_metadata(Hub("circle/none"), tmp_path / "none")
    with pytest.raises(CheckpointError, match="no such folder"):
        fetch_metadata(LocalFolder(tmp_path / "nowhere"), tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no weights"):
        fetch_metadata(LocalFolder(tmp_path / "empty"), tmp_path / "none")


def test_columns_are_tracked_separately(folders, tmp_path):
    """What is known of one set of columns says nothing of another's; rows that are here do."""
    whole = LocalFolder(folders["qwen3_moe"])
    store = fetch_metadata(whole, tmp_path / "part")
    rows = [30_000 + 100 * i for i in range(200)]
    columns = ColumnRange(30_000, 50_000, 100, ((10, 30), (60, 80)))
    assert (
        fetch_ranges([whole], store, {"model.safetensors": [columns]}) == columns.nbytes == 200 * 40
    )
    got = (store.folder / "model.safetensors").read_bytes()
    expected = (folders["qwen3_moe"] / "model.safetensors").read_bytes()
    for row in rows:
        assert got[row + 10 : row + 30] == expected[row + 10 : row + 30]
        assert got[row + 60 : row + 80] == expected[row + 60 : row + 80]
        assert not any(got[row + 30 : row + 60])
    again = SparseStore(store.folder)
    narrower, other = columns._replace(columns=((12, 20),)), columns._replace(columns=((25, 35),))
    assert again.missing({"model.safetensors": [columns, narrower]}) == {}
    assert again.missing({"model.safetensors": [other]}) == {"model.safetensors": [other]}
    assert again.missing({"model.safetensors": [(30_000, 31_000)]})
    fetch_ranges([whole], again, {"model.safetensors": [(35_050, 45_020)]})
    left = [other._replace(stop=35_100), other._replace(start=45_000)]
    assert again.missing({"model.safetensors": [other]}) == {"model.safetensors": left}
    assert again.find_damaged() == {}
    with (store.folder / "model.safetensors").open("r+b") as f:
        f.seek(30_000 + 65)
        f.write(bytes([expected[30_065] ^ 1]))
    wrong = again.find_damaged()
    assert wrong == {"model.safetensors": [columns]}
    again.mark_missing(wrong)
    assert SparseStore(store.folder).missing({"model.safetensors": [columns]})


def test_file_name_outside_of_the_folder_is_rejected(tmp_path):
    for name in ("../model.safetensors", "/tmp/model.safetensors"):
        with pytest.raises(CheckpointError, match="is not a valid file name"):
            SparseStore(tmp_path).create_file(name, 10)
