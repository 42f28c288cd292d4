"""The pictures of `cenacle top`, from recorded states of a server."""

import io
import json
from copy import deepcopy

import pytest
from rich.console import Console

from cenacle.cli.top import WatchedServer, draw_sparks, find_hot_experts, render_view
from cenacle.errors import ClusterError, InputError

MS = {"trunk": 4.0, "experts": 3.0, "all_reduce": 2.0, "waiting": 0.5, "rest": 0.5, "total": 10.0}
RANK = {"device": "cpu", "weights_bytes": 4_000_000, "silent_s": 0.1, "pid": 7}
DISK = {"total_bytes": 512_000_000_000, "free_bytes": 90_000_000_000}
LINK = {"latency_s": 0.00012, "bytes_per_s": 1.1e9, "sent_bytes": 3_000_000}
MEMORY = {
    "resident_bytes": 8_000_000_000,
    "total_bytes": 32_000_000_000,
    "available_bytes": 8_000_000_000,
    "cache_bytes": 7_900_000_000,
    "rest_bytes": 96_000_000,
    "limit_bytes": 8_054_000_000,
}
VIEW = {
    "model": "qwen\x1b[31m",
    "status": "ok",
    "recoveries": 0,
    "uptime_s": 93784,
    "nodes": 2,
    "plan": {"placement": "sliced", "trunk": "replicated", "backend": "mesh"},
    "ranks": [
        {"rank": 0, **RANK, "memory": MEMORY, "disk": DISK, "link": LINK},
        {"rank": 1, **RANK, "memory": None, "disk": None, "link": {**LINK, "latency_s": None}},
    ],
    "running": 3,
    "waiting": 1,
    "totals": {
        "requests": 12,
        "prompt_tokens": 3456,
        "cached_tokens": 864,
        "generated_tokens": 789,
    },
    "drafts": {"drafted": 100, "accepted": 61},
    "step_timings": {"steps": 5, "mean_ms": MS},
    "prediction": {"step_timings_ms": {name: ms * 0.8 for name, ms in MS.items()}},
    "history": {"tokens_per_s": [0, 10, 40, 20], "sent_bytes_per_s": [0, 9000, 4500]},
    "placement": {"id": "p", "layers": [[1, 0], [2, 0]]},
    "timeline": {"version": "v", "tokens_per_s": [0, 30] * 200, "faults": []},
    "routing": {"steps": 5, "counts": [[1, 1, 6, 0], [2, 2, 2, 2]]},
}


class Server:
    """Answers with `view`, or fails with it; leaves out what the client has."""

    def __init__(self):
        self.view, self.requests = deepcopy(VIEW), []

    def get(self, path, parameters):
        assert path == "/cluster"
        self.requests.append(parameters)
        if isinstance(self.view, Exception):
            raise self.view
        view = json.loads(json.dumps(self.view))
        if parameters["placement"] == "p":
            del view["placement"]
        if parameters["steps"] == "5":
            del view["routing"]
        if parameters["timeline"] == view["timeline"]["version"]:
            del view["timeline"]
        return view


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def watched(server):
    watched = WatchedServer(server.get, lambda: 5000.0)
    watched.update()
    return watched


def draw(watched, width, height=None):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render_view(watched, width, height))
    return console.file.getvalue().splitlines()


def test_a_picture_has_what_the_server_does(watched):
    text = "\n".join(draw(watched, 100))
    for expected in (
        "ok  qwen\\x1b[31m  2 nodes, up 1 d 2:03:04",
        "sliced experts, replicated trunk, mesh",
        "20     ▁▃█▅ most 40",
        "6.7 h  ",
        "mean 15.0",
        "3 running, 1 waiting",
        "12 requests, 3,456 (25% cached) + 789 tokens",
        "61% of 100 accepted",
        "total          10.00       8.00  +25%",
        "75% of 32.0 GB, 8.00 GB here",
        "weights 4.00 MB, caches 7.90 GB, rest 96.0 MB",
        "     disk 90.0 GB free of 512.0 GB, sent 3.00 MB, link 0.12 ms, 1.10 GB/s",
        "4.50 KB ▁█▅ most 9.00 KB",
        "1  memory unknown",
        "     sent 3.00 MB\n",
        "layer 1   expert 2",
        " 3.0",
    ):
        assert expected in text, text


def test_of_disk_and_link_there_is_what_fits(watched):
    assert "     disk 90.0 GB free of 512.0 GB" in draw(watched, 40)
    watched.view["nodes"], watched.view["ranks"] = 1, watched.view["ranks"][:1]
    watched.view["ranks"][0] |= {"link": None}
    assert "sent" not in "\n".join(draw(watched, 100))


def test_what_new_ranks_wait_for_is_shown_whole(watched):
    detail = "the model does not fit on the remaining nodes: " + "waiting for bob " * 6
    watched.view |= {"status": "recovering", "reason": "rank 1 was lost", "detail": detail}
    lines = draw(watched, 60)
    at = next(i for i, line in enumerate(lines) if line.startswith("now "))
    assert " ".join(" ".join(lines[at : at + 4]).split()).startswith("now " + detail.strip())


def test_memory_above_what_is_expected_is_said(watched):
    assert "above" not in "\n".join(draw(watched, 100))
    watched.view["ranks"][0]["memory"]["limit_bytes"] = 7_999_999_999
    assert "rest 96.0 MB, above 8.00 GB" in "\n".join(draw(watched, 100))


@pytest.mark.parametrize(("width", "height"), [(40, 12), (40, None), (60, 30), (20, 5), (200, 50)])
def test_a_picture_fits_the_terminal(watched, width, height):
    watched.view["status"], watched.view["reason"] = "recovering", "rank 1 " + "x" * 300
    for number in range(30):
        watched._note(f"fault {number} " + "y" * 300)
    lines = draw(watched, width, height)
    assert max(map(len, lines)) <= width
    if height is not None:
        assert len(lines) <= height
        assert height < 20 or "fault 29" in "\n".join(lines), "the newest are kept"


def test_what_is_known_is_not_asked_for_again(server, watched):
    watched.update()
    assert server.requests == [
        {"placement": "", "steps": "", "timeline": ""},
        {"placement": "p", "steps": "5", "timeline": "v"},
    ]
    assert watched.view["placement"] == VIEW["placement"]
    assert watched.view["timeline"] == VIEW["timeline"]
    assert watched.view["routing"] == VIEW["routing"]


def test_the_timeline_has_faults_silence_and_recoveries(server, watched):
    killed = {"began_at": 4000.0, "ended_at": 4008.5, "reason": "rank 1 was killed"}
    lost = {"began_at": 6000.0, "ended_at": None, "reason": "rank 0 was lost"}
    server.view = ClusterError("nobody there")
    watched.update()
    watched.update()
    assert draw(watched, 80)[0].startswith("no answer")
    faults = [{"is_final": False, **fault} for fault in (killed, lost)]
    timeline = {"version": "w", "tokens_per_s": [], "faults": faults}
    server.view = {**deepcopy(VIEW), "nodes": 1, "timeline": timeline}
    watched.update()
    assert [text for _, text in watched.list_events()] == [
        "rank 1 was killed (lasted 8.5 s)",
        "the server does not answer: nobody there",
        "the server answers again",
        "nodes: 1, before 2",
        "rank 0 was lost (it lasts)",
    ]


def test_a_wrong_key_or_another_program_ends_it(server, watched):
    server.view = InputError("a key is needed")
    with pytest.raises(InputError):
        watched.update()
    for wrong in ([], {}, "x"):
        server.view = wrong
        with pytest.raises(ClusterError):
            WatchedServer(lambda *_, wrong=wrong: wrong).update()
    del watched.view["history"]
    with pytest.raises(ClusterError, match=r"unexpected .cluster response"):
        draw(watched, 80)


def test_without_a_loaded_model_the_models_are_listed(server, watched):
    server.view = {"status": "idle", "model": None, "models": {"a": "unloaded", "b\x1b": "loading"}}
    watched = WatchedServer(lambda *_: server.view, model="b")
    watched.update()
    watched.update()
    assert draw(watched, 40) == [
        "idle: no model is loaded",
        "  unloaded   a",
        "  loading    b\\x1b",
    ]


def test_hot_experts_and_sparks():
    assert find_hot_experts([[0, 0], [1, 3], [5, 5]], 2) == [(1, 1, 1.5), (2, 0, 1.0)]
    assert find_hot_experts([]) == []
    assert draw_sparks([], 5) == ""
    assert draw_sparks([0, 0], 5) == "▁▁"
    assert draw_sparks([9, 1, 2, 4], 3) == "▃▅█"
    assert draw_sparks([1], 0) == ""
