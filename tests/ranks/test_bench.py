"""`cenacle bench` and its ablation as a user runs them, on tiny models.

What comes out is tested, not how fast: times are only checked to add up, and what is measured is
small (`small_measurements.py`).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cenacle import native
from cenacle.bench import hardware_limits
from cenacle.bench.emulation import EmulationConfig
from cenacle.calibration.rank_worker import find_job, split_cores
from cenacle.errors import InputError
from cenacle.load_options import LoadOptions
from cenacle.model.synth import synth
from support.program import run_here

COMMAND = [sys.executable, str(Path(__file__).parent / "small_measurements.py"), "bench"]
PHASES = ["trunk", "experts", "all_reduce", "waiting", "rest"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synth(
        tmp_path_factory.mktemp("bench") / "tiny", family="dbrx", quantize=8, group_size=32
    ).path


def run(*arguments):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def last_json(ran):
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def script(path, body):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}\n")
    path.chmod(0o755)
    return path


# 6 tokens of one request in 1 s, of three in 1.5 s.
BATCHED = """
for requests, seconds in ((1, 1.0), (3, 1.5)):
    print(f"| 8 | 6 | {requests} | 42 | 0.1 | 80 | 0.9 | 6.6 | {seconds} | 14 |")
"""


def test_bench_gives_one_object_with_everything(folder, tmp_path):
    # Decoding is fastest with flash attention and a 16-bit cache, a prompt without either.
    good = """
import json, sys
flash = sys.argv[sys.argv.index("-fa") + 1] == "1"
decode, prefill = (50 if flash else 30) - 10 * ("q8_0" in sys.argv), 60 - 10 * flash
speed = decode if "-gp" in sys.argv else prefill
print(json.dumps([{"avg_ts": speed}]))
"""
    script(tmp_path / "good" / "llama-bench", good)
    script(tmp_path / "bad" / "llama-bench", "raise SystemExit('out of luck')")
    slow = "import sys, time; time.sleep(60 * int(sys.argv[sys.argv.index('-fa') + 1]))"
    script(tmp_path / "slow" / "llama-bench", slow)
    script(tmp_path / "good" / "llama-batched-bench", BATCHED)
    arguments = [
        "--nodes",
        1,
        "--contexts",
        "8,20",
        "--concurrency",
        "1,3",
        "--tokens",
        6,
        "--repeat",
        2,
    ]
    arguments += [
        "--prompt-tokens",
        16,
        "--peer-timeout-s",
        10,
        "--cache-dir",
        tmp_path / "cache",
        "--json",
    ]
    for name, peer in (("good", "ik_llama.cpp"), ("bad", "llama.cpp"), ("slow", "llama.cpp")):
        arguments += ["--peer", f"{peer}={tmp_path / name}"]
    result = last_json(run("-m", folder, *arguments))
    assert [d["context"] for d in result["decode"]] == [8, 20]
    assert [p["tokens"] for p in result["prefill"]] == [16, 20]
    assert [s["requests"] for s in result["concurrency"]] == [1, 3]
    assert result["concurrency"][0]["ratio"] == 1
    for row in (*result["decode"], *result["prefill"], *result["concurrency"]):
        assert min(row["all"]) <= row["tok_per_s"] <= max(row["all"])
    assert [len(d["all"]) for d in result["decode"]] == [2, 2]
    assert_adds_up(result["step_timings_ms"])
    good, *_, bad, _, slow, _, best = result["peers"]
    threads = result["conditions"]["threads"]
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    assert best["name"] == f"ik_llama.cpp, {count}, best in each cell"
    assert (best["decode_tok_per_s"], best["prefill_tok_per_s"]) == (50, 60)
    assert best["concurrency"] == good["concurrency"]
    ours = [row["tok_per_s"] for row in result["concurrency"]]
    assert [row["tok_per_s"] for row in good["concurrency"]] == [6.0, 12.0]
    assert [row["ratio"] for row in good["concurrency"]] == [ours[0] / 6, ours[1] / 12]
    assert good["decode_all"] == [50.0, 50.0]
    assert good["decode_ratio"] == pytest.approx(result["decode"][0]["tok_per_s"] / 50)
    assert good["prefill_ratio"] == pytest.approx(result["prefill"][0]["tok_per_s"] / 50)
    assert "status 1: out of luck" in bad["failed"]
    assert "not done within 10 s" in slow["failed"]
    assert result["hardware_limits"]["read_gb_s"]["1"] > 0
    assert result["hardware_limits"]["all_reduce_us"] == []
    token = result["hardware_limits"]["token"]
    assert token["percent"] == pytest.approx(100 * token["read_ms"] / token["token_ms"])
    assert (token["kernels_ms"] is not None) == native.is_available()


def test_bench_on_two_ranks_says_what_each_did(folder, tmp_path):
    arguments = ["-n", 2, "--contexts", "8", "--concurrency", "2", "--tokens", 4, "--repeat", 1]
    arguments += ["--speculative", "off", "--comm-dtype", "f32"]
    result = last_json(run("-m", folder, *arguments, "--prompt-tokens", 8, "--json"))
    assert result["conditions"]["options"]["speculative"] == "off"
    assert [r["rank"] for r in result["ranks"]] == [0, 1]
    for rank in result["ranks"]:
        assert_adds_up(rank["step_timings_ms"])
        assert rank["token_bytes"] > 0
        assert rank["read_gb_s"] > 0
    mean = {t: sum(r["step_timings_ms"][t] for r in result["ranks"]) / 2 for t in PHASES}
    assert {t: result["step_timings_ms"][t] for t in PHASES} == pytest.approx(mean)
    assert [e["bytes"] for e in result["hardware_limits"]["all_reduce_us"]][:2] == [4, 4096]
    assert result["concurrency"][0]["ratio"] is None  # nothing was measured with one


def assert_adds_up(terms):
    assert all(terms[t] >= -1e-6 for t in PHASES)
    assert sum(terms[t] for t in PHASES) == pytest.approx(terms["total"])


def test_ablation_has_every_row_at_every_latency(folder, tmp_path):
    arguments = ["-m", folder, "--latencies-ms", "0.3,0", "--tokens", 3, "--repeat", 1]
    result = last_json(run("ablation", *arguments, "--out", tmp_path / "out", "--json"))
    names = ["naive", "P-LB", "P-LR", "P-LR-D", "ours, whole", "ours, replicated", "ours, sliced"]
    names.append("ours, sliced, trunk sharded")
    assert [(r["latency_ms"], r["row"]) for r in result["rows"]] == [
        (ms, name) for ms in (0.3, 0.0) for name in names
    ]
    layers = result["layers"]
    for row in result["rows"]:
        assert_adds_up(row["step_timings_ms"])
        all_reduces = 2 * layers if row["row"] in names[:3] else layers
        if row["row"] == names[-1]:  # attention of each layer, and the head
            all_reduces = 2 * layers + 1
        assert row["all_reduces"] == all_reduces
        # An all-reduce takes at least its link's latency, on every row.
        assert row["step_timings_ms"]["all_reduce"] >= all_reduces * row["latency_ms"]
    assert result["logits_differ"] <= 2e-3
    pairs = {(c["latency_ms"], c["row"], c["over"]): c for c in result["compared"]}
    assert pairs[0.3, "naive", "naive"]["token"] == 1
    by = {(r["latency_ms"], r["row"]): r["token_ms"] for r in result["rows"]}
    assert pairs[0.0, "ours, whole", "P-LR-D"]["token"] == pytest.approx(
        by[0.0, "P-LR-D"] / by[0.0, "ours, whole"]
    )
    assert [
        (tmp_path / "out" / f"ablation.{kind}").stat().st_size > 1000 for kind in ("png", "svg")
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "expected either --model or --synth"),
        (["--synth", "nonsense"], 2, "unknown 'nonsense'"),
        (["-m", "FOLDER", "--peer", "vllm=/x"], 2, "expected llama.cpp=PATH"),
        (["-m", "FOLDER", "--peer", "dllama=/nowhere"], 2, "expected the program dllama at"),
        (["-m", "FOLDER", "--contexts", "0"], 2, "expected positive integers"),
        (
            ["-m", "FOLDER", "--contexts", "100000"],
            2,
            "--contexts and --prompt-tokens: expected at most",
        ),
        (["-m", "/nowhere"], 3, "no such folder"),
        (["ablation", "-m", "FOLDER", "-n", "1"], 2, "expected at least 2 nodes"),
        (["ablation", "-m", "FOLDER", "--latencies-ms", "slow"], 2, "expected numbers"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(folder, tmp_path, arguments, status, message):
    words = [folder if a == "FOLDER" else a for a in arguments]
    ran = run_here("bench", *words, "--cache-dir", tmp_path)
    assert ran.returncode == status, ran.stderr
    assert message in " ".join(ran.stderr.split())
    assert "Traceback" not in ran.stderr


def test_a_job_is_found_by_its_dotted_name():
    assert find_job(f"{hardware_limits.__name__}.measure_read") is hardware_limits.measure_read


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "cenacle",
        "cenacle.bench.nothing.measure_read",
        "cenacle.bench.hardware_limits.nothing",
        "cenacle.bench.hardware_limits.READ_BYTES",
        "cenacle.bench.hardware_limits.RankPool",  # of another module
        "cenacle.bench.hardware_limits.statistics.median",
    ],
)
def test_a_job_is_a_function_of_this_package(name):
    with pytest.raises(InputError, match=f"a function in cenacle, got '{name}'"):
        find_job(name)


def test_each_node_has_its_cores_where_there_are_enough():
    cores, threads = split_cores(1, 1)
    assert [len(c) for c in cores] == [1]
    assert threads == 1
    assert split_cores(64, 64) == (None, 64)
    with pytest.raises(InputError, match="--threads"):
        split_cores(1, 0)


def test_emulated_machines_beside_what_the_performance_model_predicts(folder):
    groups = ["1x(bandwidth=4MB/s)", "1x(bandwidth=4MB/s)+1x(bandwidth=8MB/s),link=1ms,slow=1.5"]
    arguments = [
        "-m",
        folder,
        "--contexts",
        "4",
        "--concurrency",
        "2",
        "--tokens",
        4,
        "--repeat",
        1,
    ]
    result = last_json(run(*arguments, *(f"--emulate={group}" for group in groups), "--json"))
    alone, pair = result["rows"]
    assert [row["machines"] for row in result["rows"]] == groups
    assert (alone["ratio"], alone["predicted_ratio"]) == (1, 1)
    assert [rank["passes"] > 0 for rank in pair["ranks"]] == [True, True]
    # Shares by speed: the fast one reads more.
    assert pair["ranks"][0]["read_bytes"] < pair["ranks"][1]["read_bytes"]
    for row in result["rows"]:
        parts = [rank["pass_ms"] for rank in row["ranks"]]
        for ms in parts:
            assert sum(ms.values()) == pytest.approx(2 * ms["total"], rel=1e-2)
        assert row["tok_per_s"] > 0
        assert 0 <= row["late_percent"] <= 100


def test_emulated_machines_bring_their_own_nodes_and_links():
    for arguments in ({"nodes": 2}, {"latency_s": 0.1}):
        with pytest.raises(InputError, match="--emulate cannot be combined with"):
            EmulationConfig(LoadOptions("model", **arguments), ())
