"""Distribution of a model that only the head or only the Hub has: real agents, no ranks."""

import asyncio
import json
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

import cenacle
from cenacle.cluster import formation, node_info
from cenacle.cluster.agent import Agent
from cenacle.cluster.client import pair_with_head
from cenacle.cluster.download import distribution, download, source
from cenacle.cluster.download.file_server import ModelFileServer
from cenacle.cluster.formation import ClusterModel
from cenacle.cluster.head import Head
from cenacle.cluster.placement import PlacementOptions
from cenacle.engine.options import EngineOptions
from cenacle.errors import CheckpointError, ClusterError
from cenacle.model.architecture import named_parameters
from cenacle.model.byte_ranges import JOURNAL, byte_range_from_json, total_bytes
from cenacle.model.checkpoint import Checkpoint, locate_checkpoint
from cenacle.model.loader import load_rank_model
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.ranks.ranks import Epoch
from fake_hub import REPO, FakeHub, times_sent, use_fake_hub
from support import moe_gguf

HOST = "127.0.0.1"
WIDE = {"hidden_size": 256, "moe_intermediate_size": 384, "num_hidden_layers": 4}
DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
WEIGHTS = "model.safetensors"


def wait_for(condition, what, seconds=120.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < ends, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return found


class Cluster:
    """A head, its own agent, and two more, each with a folder of its own."""

    def __init__(self, folder):
        self.folder, self.agent_messages = folder, {}
        self.head = Head(folder / "head", HOST, 0, "a")
        self.identities = {"a": self.head.identity}
        for name in "bc":
            token = self.head.invite()
            self.identities[name] = pair_with_head(
                folder / name / "id", HOST, self.head.port, token, name
            )
        self._ends = {}
        for name in "abc":
            self.start_agent(name)

    def start_agent(self, name, folders=()):
        messages = self.agent_messages[name] = []
        where = (self.identities[name], HOST, self.head.port)
        place = None if name == "a" else self.folder / name / "models"
        loop = asyncio.new_event_loop()
        task = loop.create_task(Agent(*where, list(folders), messages.append, place).run())

        def run():
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        self._ends[name] = (lambda: loop.call_soon_threadsafe(task.cancel), thread)
        wait_for(lambda: self.nodes()[name]["connected"], name)

    def stop_agent(self, name):
        end, thread = self._ends.pop(name)
        with suppress(RuntimeError):
            end()
        thread.join(120)
        assert not thread.is_alive()
        wait_for(lambda: not self.nodes()[name]["connected"], f"the loss of {name}")

    def nodes(self):
        return {n["name"]: n for n in self.head.status()["nodes"]}

    def form(self, model, placement):
        """What was decided; `self.machines` decides again after a loss."""
        self.messages = []
        self.machines = formation.Cluster(self.head, 3, self.messages.append)
        folder = self.machines.locate(model)
        name = model if model == REPO else folder.name
        checkpoint = Checkpoint.open(folder)
        self.formed = self.machines.form(
            ClusterModel(name, checkpoint, PlacementOptions(placement), EngineOptions(), "mlx")
        )
        return self.formed

    def reform(self, ending=None):
        self.head.end_group(self.formed.group.group_id)
        self.formed = self.machines._reform(Epoch(1, ending or threading.Event()))
        return self.formed

    def close(self):
        for name in list(self._ends):
            self.stop_agent(name)
        self.head.close()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(source, "FIRST_RETRY_DELAY_S", 0.01)
    monkeypatch.setattr(formation, "LOST_NODE_WAIT_S", 0.3)
    monkeypatch.setattr(node_info, "_measure_read_rate", lambda _: 1e10)
    # The machine of the test is a small one; how much is free on it does not matter here.
    monkeypatch.setattr(node_info, "available_bytes", lambda: 64 << 30)
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub(DEMO)
    use_fake_hub(monkeypatch, server.url)
    yield server
    server.close()


@pytest.fixture
def model(tmp_path):
    """Under a name that this program's own folder does not have."""
    return shutil.copytree(DEMO, tmp_path / "answers")


def assert_loads(formed, source_folder=DEMO):
    """Every machine's rank loads from its folder what it would from the whole."""
    for rank, folder in enumerate(formed.folders):
        expected, got = (
            dict(
                named_parameters(
                    load_rank_model(Checkpoint.open(Path(f)), formed.plan, rank, lambda *_: None)
                )
            )
            for f in (source_folder, folder)
        )
        assert expected.keys() == got.keys()
        assert all(mx.array_equal(expected[k], got[k]) for k in expected)


def downloaded_bytes(folder):
    """Bytes that were ever recorded in a part."""
    lines = filter(None, (Path(folder) / JOURNAL).read_text().splitlines())
    entries = [json.loads(line) for line in lines]
    return total_bytes(byte_range_from_json(e["range"]) for e in entries if "range" in e)


@contextmanager
def serving(monkeypatch, how):
    """What the head serves goes through `how(answer, request)`."""
    real = ModelFileServer.serve
    with monkeypatch.context() as m:
        m.setattr(ModelFileServer, "serve", lambda self, request: how(real(self, request), request))
        yield


@pytest.mark.parametrize("placement", ["whole", "replicated"])
def test_each_node_downloads_its_own_part(cluster, hub, placement):
    formed = cluster.form(REPO, placement)
    assert_loads(formed)
    # The head reads attention and its like as all do, and gives them on.
    assert times_sent(hub, WEIGHTS).max() == (1 if placement == "whole" else 2)
    for rank, folder in enumerate(formed.folders):
        part = formed.plan.bytes_of(rank)["total"]
        assert 0.9 * part < downloaded_bytes(folder) <= 1.05 * part
    assert hub.sent <= sum(formed.plan.bytes_of(r)["total"] for r in range(3)) * 1.05
    progress = cluster.nodes()["b"]["download_progress"]
    assert progress["done"] == progress["total"] > 0
    assert any("downloaded in" in text and "b " in text for text in cluster.messages)
    # What is here already is not fetched again.
    before = hub.sent
    cluster.head.end_group(formed.group.group_id)
    assert_loads(cluster.form(REPO, placement))
    assert hub.sent == before


@pytest.mark.parametrize("placement", ["whole", "sliced"])
def test_a_gguf_model_is_spread_by_the_head(cluster, tmp_path, placement):
    moe_gguf.write_moe(tmp_path / "model", "qwen3_moe", "Q8_0", **WIDE)
    formed = cluster.form(str(tmp_path / "model" / "model.gguf"), placement)
    assert_loads(formed, formed.folders[0])
    size = (tmp_path / "model" / "model.gguf").stat().st_size
    for rank in (1, 2):
        assert downloaded_bytes(formed.folders[rank]) < 0.75 * size


@pytest.mark.parametrize("gap", [0, 1 << 16])
def test_the_hub_sends_each_byte_of_slices_once(cluster, hub, gap, monkeypatch):
    """Also where a slice is rows that a machine gets by itself (`gap` 0)."""
    with_gap = partial(required_ranges, column_gap_bytes=gap)
    monkeypatch.setattr(distribution, "required_ranges", with_gap)
    formed = cluster.form(REPO, "sliced")
    assert_loads(formed)
    assert (times_sent(hub, WEIGHTS) == 1).all()
    for rank in (1, 2):
        assert downloaded_bytes(formed.folders[rank]) <= 1.05 * formed.plan.bytes_of(rank)["total"]
    # After a loss: only what nobody of those who are left has.
    cluster.stop_agent("c")
    formed = cluster.reform()
    assert formed.plan.nodes == 2
    assert_loads(formed)
    times = times_sent(hub, WEIGHTS)
    assert times.mean() < (1.5 if gap == 0 else 1.001)


def test_head_as_the_only_source_and_damage_on_the_way(cluster, model, monkeypatch):
    wrong, asked_for = [], []

    def damage(answer, request):
        if request.file == WEIGHTS and answer is not None:
            asked_for.append(request.byte_range)
            if len(wrong) < 2:
                wrong.append(request)
                return answer[0], bytes([answer[1][0] ^ 1]) + answer[1][1:]
        return answer

    with serving(monkeypatch, damage):
        formed = cluster.form(str(model), "whole")
    assert len(wrong) == 2
    assert formed.folders[0] == str(model.resolve())
    assert_loads(formed)
    for rank in (1, 2):
        part = formed.plan.bytes_of(rank)["total"]
        assert downloaded_bytes(formed.folders[rank]) <= 1.05 * part
        taken = sum(p.stat().st_blocks * 512 for p in Path(formed.folders[rank]).iterdir())
        assert taken <= 1.05 * part + 4096 * len(asked_for)
    with pytest.raises(CheckpointError, match="only one node's part"):
        locate_checkpoint(formed.folders[1])


def test_weights_that_the_index_does_not_name_stay_on_the_head(cluster, model, caplog):
    requested = []
    names = dict.fromkeys(Checkpoint.open(model).tensors, WEIGHTS)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    stray = ("model-99999.safetensors", "consolidated.safetensors")
    for name in stray:
        shutil.copy(model / WEIGHTS, model / name)

    def record(answer, request):
        requested.append(request.file)
        return answer

    with pytest.MonkeyPatch.context() as monkeypatch, serving(monkeypatch, record):
        formed = cluster.form(str(model), "whole")
    assert_loads(formed)
    assert WEIGHTS in requested
    assert not set(stray) & set(requested)
    for folder in formed.folders[1:]:
        assert [path.name for path in Path(folder).glob("*.safetensors")] == [WEIGHTS]
    warnings = [r for r in caplog.records if "not named by the index" in r.getMessage()]
    assert len(warnings) == 1


def test_interrupted_download_is_resumed(cluster, model, monkeypatch):
    monkeypatch.setattr(download, "CHUNK_BYTES", 1 << 18)
    ranges_sent, hold = [], threading.Event()

    def slow(answer, request):
        if request.file == WEIGHTS:
            ranges_sent.append(request.byte_range)
            if len(ranges_sent) > 12 and not hold.is_set():
                return None  # "later"
        return answer

    with serving(monkeypatch, slow):
        found = []
        forming = threading.Thread(target=lambda: found.append(cluster.form(str(model), "whole")))
        forming.start()
        try:
            wait_for(lambda: len(ranges_sent) > 20, "the first pieces")
            part = wait_for(lambda: cluster.nodes()["b"]["download_progress"], "how far b is")
            assert 0 < part["done"] < part["total"]
            cluster.stop_agent("b")
            # Closed, or reset when something was on its way.
            ways = ("b has lost its agent", "b lost its connection")
            wait_for(
                lambda: any(way in t for t in cluster.messages for way in ways),
                "that it is said",
            )
            (place,) = (cluster.folder / "b" / "models").iterdir()
            before = downloaded_bytes(place)
            ranges_sent.clear()
            hold.set()
            cluster.start_agent("b")
        finally:
            hold.set()
            forming.join(300)
    assert not forming.is_alive()
    assert 0 < before < downloaded_bytes(place) <= 1.05 * found[0].plan.bytes_of(1)["total"]
    assert_loads(found[0])


def test_damage_on_the_disk_is_repaired_by_the_next_process(cluster, model):
    formed = cluster.form(str(model), "whole")
    file = Path(formed.folders[1]) / WEIGHTS
    layout = ModelLayout.read(Checkpoint.open(DEMO))
    ranges = required_ranges(slices_for(formed.plan, 1, layout))[WEIGHTS]
    with file.open("r+b") as f:
        f.seek(ranges[-1][0])
        byte = f.read(1)
        f.seek(ranges[-1][0])
        f.write(bytes([byte[0] ^ 1]))
    cluster.stop_agent("b")
    cluster.start_agent("b")
    assert_loads(cluster.reform())
    wait_for(lambda: any("were damaged and" in t for t in cluster.agent_messages["b"]), "a word")


def test_after_a_loss_missing_bytes_are_downloaded_or_waited_for(cluster, hub):
    formed = cluster.form(REPO, "whole")
    before = times_sent(hub, WEIGHTS)
    cluster.stop_agent("c")
    formed = cluster.reform()
    assert formed.plan.nodes == 2
    assert_loads(formed)
    more = times_sent(hub, WEIGHTS) - before
    lost = formed.plan.bytes_of(0)["experts"] + formed.plan.bytes_of(1)["experts"]
    assert 0 < more.sum() <= 0.5 * lost, "what c had, and what b gives to a"
    # Without a hub nobody has b's and c's experts.
    hub.close()
    cluster.start_agent("c")
    cluster.stop_agent("b")
    ending, found = threading.Event(), []

    def go_on():
        with suppress(ClusterError):
            found.append(cluster.reform(ending))

    again = threading.Thread(target=go_on)
    again.start()
    try:
        wait_for(
            lambda: any("is not complete on the remaining nodes" in t for t in cluster.messages),
            "why",
        )
        assert any("the Hub does not respond" in t or "refused" in t for t in cluster.messages)
    finally:
        ending.set()
        again.join(120)
    assert not again.is_alive()
    assert not found


def test_complete_model_is_used_and_another_model_is_rejected(cluster, model, tmp_path):
    for name in ("same", "half", "other"):
        shutil.copytree(DEMO, tmp_path / name / model.name)
    (tmp_path / "half" / model.name / WEIGHTS).unlink()
    config = tmp_path / "other" / model.name / "config.json"
    config.write_text(config.read_text().replace('"n_heads": 4', '"n_heads": 2'))
    for name, folder in (("b", "same"), ("c", "half")):
        cluster.stop_agent(name)
        cluster.start_agent(name, [tmp_path / folder])
    formed = cluster.form(str(model), "whole")
    assert formed.folders[1] == str((tmp_path / "same" / model.name).resolve())
    assert not (tmp_path / "b" / "models").exists()
    assert Path(formed.folders[2]).parent == tmp_path / "c" / "models"
    assert_loads(formed)
    cluster.stop_agent("c")
    cluster.start_agent("c", [tmp_path / "other"])
    cluster.head.end_group(formed.group.group_id)
    with pytest.raises(CheckpointError, match=r"c: .*other.* has a different model named"):
        cluster.form(str(model), "whole")
