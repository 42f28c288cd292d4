"""The commands as a user runs them: exit codes, what is on stdout and stderr.

Those that load a model, serve or are ended are processes; the others run here.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from mlx_lm import load as mlx_lm_load
from mlx_lm import stream_generate

from cenacle import native, net
from cenacle.demo.run import DEMO_MODEL_DIR
from cenacle.model.synth import synth
from support.http import HTTP
from support.polling import wait_until
from support.products import in_turn
from support.program import run_here

COMMAND = [sys.executable, "-m", "cenacle"]
PROMPT = "Hello available"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return synth(tmp_path_factory.mktemp("cli") / "tiny", family="qwen3_moe").path


def run(*arguments, timeout=300, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **options
    )


@pytest.fixture(scope="module")
def expected(folder):
    """mlx-lm's tokens and text after PROMPT."""
    model, tokenizer = mlx_lm_load(str(folder))
    answer = list(stream_generate(model, tokenizer, PROMPT, max_tokens=24))
    # The space that begins the answer is kept; mlx-lm's own detokenizer drops it.
    return [r.token for r in answer], " " + "".join(r.text for r in answer)


def last_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def processes_of(pid):
    """Ids of the processes that were started by `pid`, or by one of these."""
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_generate_gives_mlx_lms_tokens_on_any_number_of_nodes(folder, expected):
    for nodes in (1, 2):
        got = last_json(
            run(
                "generate", "--model", folder, "--nodes", nodes, "--prompt", PROMPT,
                "--max-tokens", 24, "--temp", 0, "--json",
            )
        )  # fmt: skip
        assert (got["tokens"], got["text"]) == expected
        assert got["nodes"] == nodes
        assert got["tok_per_s"] > 0
        for rank in got["ranks"]:  # caches of so few tokens are nothing
            assert rank["peak_rss_bytes"] <= rank["weights_bytes"] + 150e6
        terms = got["step_timings_ms"]
        parts = sum(terms[k] for k in ("trunk", "experts", "all_reduce", "waiting", "rest"))
        assert parts == pytest.approx(terms["total"]) != 0


def test_inspect_predicts_the_memory_of_ranks(tmp_path_factory):
    big = synth(tmp_path_factory.mktemp("big") / "m", family="mixtral", config=None).path
    plan = last_json(
        run_here("inspect", "--model", big, "--nodes", 3, "--node-weights", "2,1,1", "--json")
    )
    assert sum(r["experts"] for r in plan["ranks"]) == plan["spec"]["expert_bytes"]
    done = run(
        "generate",
        "-m",
        big,
        "-n",
        3,
        "--node-weights",
        "2,1,1",
        "-p",
        "x",
        "--max-tokens",
        1,
        "--json",
    )
    for rank, planned in zip(last_json(done)["ranks"], plan["bytes_per_rank"], strict=True):
        assert rank["weights_bytes"] == planned
        assert planned < rank["peak_rss_bytes"] < 1.1 * planned + 300e6


def test_a_saved_plan_is_used(folder, tmp_path):
    saved = tmp_path / "plan.json"
    planned = run_here("inspect", "-m", folder, "-n", 2, "--node-weights", "3,1", "--save", saved)
    assert planned.returncode == 0, planned.stderr
    done = run(
        *("generate", "-m", folder, "--plan", saved, "--draft-model", folder),
        *("-p", "x", "--max-tokens", 1, "--json"),
    )
    weights = [r["weights_bytes"] for r in last_json(done)["ranks"]]
    assert len(weights) == 2
    assert weights[0] > weights[1]


LAYOUTS = ("-n 2 --placement sliced --trunk sharded", "-n 3 --placement replicated")


@pytest.mark.parametrize("kernels", ["mlx", "native"])
def test_every_placement_gives_mlx_lms_text(folder, expected, kernels):
    """On one node: the test above, with the kernels that are chosen there."""
    if kernels == "native" and not native.is_available():
        pytest.skip(native.unavailable_reason())
    for layout in in_turn(LAYOUTS, kernels == "native"):
        done = run(
            *("generate", "-m", folder, "-p", PROMPT, "--max-tokens", 24, "--json"),
            *("--kernels", kernels, *layout.split()),
        )
        assert last_json(done)["text"] == expected[1]


def test_the_placement_is_explained(folder):
    got = last_json(run_here("inspect", "-m", folder, "-n", 2, "--json"))
    assert got["reason"].startswith(f"experts {got['placement']}, trunk {got['trunk']}: ")
    assert got["all_reduces"] >= 2
    layout = ("--placement", "whole", "--trunk", "replicated")
    chosen = run_here("inspect", "-m", folder, "-n", 2, *layout)
    assert "experts whole, trunk replicated, 2 all-reduces per token" in chosen.stdout
    assert chosen.stderr == ""


def test_demo_answers(folder):
    done = run("demo", "--nodes", 2, "--questions", 7, "--json")
    got = last_json(done)
    assert got["correct"] >= 6
    assert "Time per token (milliseconds" in done.stdout
    assert "node 1" in done.stdout


def test_chat_keeps_its_messages_until_new(folder):
    done = run(
        "chat",
        "-m",
        "demo",
        "--temp",
        "0",
        input="What is 2 + 3?\n/new\nMake dog uppercase.\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["5", "DOG"]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_template_that_needs_too_much_memory_is_ended(tmp_path, command):
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_DIR, folder)
    (folder / "chat_template.jinja").write_text(
        "{% if 'grow' in messages[-1].content %}{{ 'a' * 3000000000 }}{% endif %}"
        "{{ messages[-1].content }}"
    )
    prompt = {"generate": ("-p", "grow"), "chat": ()}[command]
    done = run(command, "-m", folder, *prompt, input="grow\n")
    assert "messages: the model's chat template" in done.stderr, done.stderr
    # In this process the text of three gigabytes would fit.
    assert "MemoryError" in done.stderr


def test_families_and_help_list_everything():
    listed = last_json(run_here("families", "--json"))
    assert {"dbrx", "mixtral", "gpt_oss"} <= {row["name"] for row in listed}
    assert all(row["refused"] for row in listed if row["name"] == "muse_spark")
    columns = {"zoo", "formats", "images", "drafts", "attention_sharding", "batching"}
    assert all(columns <= set(row) for row in listed if not row["refused"])
    table = run_here("families").stdout
    assert all(re.search(rf"^ {row['name']} +{row['zoo']} ", table, re.M) for row in listed)
    text = run_here("--help").stdout
    for command in ("generate", "chat", "serve", "inspect", "families", "synth", "demo"):
        assert re.search(rf"^│ {command} ", text, re.M), command


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["inspect", "-m", "no/such/folder"], 3, "no such folder"),
        (["inspect", "-m", "FOLDER", "-n", "9", "--placement", "whole"], 4, "at most 6|at most 8"),
        (["inspect", "-m", "FOLDER", "-n", "99", "--placement", "sliced"], 4, "--placement whole"),
        (
            ["inspect", "-m", "FOLDER", "-n", "2", "--node-memory-gb", "1,1"],
            4,
            "expected placement replicated, got auto",
        ),
        (
            ["inspect", "-m", "FOLDER", "--placement", "replicated", "--node-memory-gb", "0"],
            *(4, "allow more memory"),
        ),
        (
            ["inspect", "-m", "FOLDER", "-n", "2", "--node-memory-gb", "nan,1"],
            2,
            "--node-memory-gb",
        ),
        (
            ["generate", "-m", "FOLDER", "-p", "x", "--temp", "3"],
            2,
            "--temp: expected at most 2, got .3.",
        ),
        (
            ["generate", "-m", "FOLDER", "-p", "x", "--max-tokens", "-1"],
            2,
            "--max-tokens: expected at least 1, got .-1.",
        ),
        (["generate", "-m", "FOLDER", "-p", "x", "--node-weights", "1,a"], 2, "--node-weights"),
        (
            ["generate", "-m", "FOLDER", "-p", "x", "-n", "2", "--node-weights", "1"],
            4,
            "--node-weights",
        ),
        (["generate", "-m", "FOLDER", "-p", "LONG"], 2, "context"),
        (["synth", "--family", "dbxr", "--out", "OUT"], 2, "dbrx"),
        (["generate", "-m", "FOLDER", "--unknown"], 2, "no such option"),
    ],
)
def test_bad_input_is_one_line_and_a_status(folder, tmp_path, arguments, status, message):
    words = {"FOLDER": folder, "LONG": "x" * 100_000, "OUT": tmp_path / "out"}
    done = run_here(*[words.get(a, a) for a in arguments])
    assert done.returncode == status, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_found_before_loading(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "-m", folder, "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "in use" in done.stderr


def check_names(url):
    """The names of --served-model-name are listed, and every name is answered as it was asked."""
    models = HTTP.get(f"{url}/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["gpt-4o", "house/moe"]
    for sent, name in (
        ("gpt-4o", "gpt-4o"),
        ("house/moe",) * 2,
        ("claude-x",) * 2,
        (None, "gpt-4o"),
    ):
        body = {"model": sent, "prompt": "a", "max_tokens": 1}
        answer = HTTP.post(f"{url}/v1/completions", json=body, timeout=300)
        assert answer.json()["model"] == name, answer.text
        body = {"model": name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        answer = HTTP.post(f"{url}/v1/messages", json=body, timeout=300)
        assert answer.json()["model"] == name, answer.text
        assert HTTP.get(f"{url}/v1/models/{name}").json()["id"] == name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_the_server_leaves_no_process(folder, number):
    names = [f"--served-model-name={name}" for name in ("gpt-4o", "*", "house/moe")]
    server = subprocess.Popen(
        [*COMMAND, "serve", "-m", str(folder), "-n", "2", "--port", "0", *names],
        stderr=subprocess.PIPE,
        text=True,
        # The tests may run where SIGINT is ignored, as behind `&` in a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for line in server.stderr:
            if "serving" in line:
                break
        started = processes_of(server.pid)
        assert len(started) == 4  # two ranks, and the processes that serve and tokenize
        check_names(re.search(r"http://\S+", line)[0])
        server.send_signal(number)
        status = server.wait(timeout=120)
        assert status == {signal.SIGKILL: -number, signal.SIGINT: 130, signal.SIGTERM: 0}[number]
        assert wait_until(lambda: not any(map(alive, started)), 120)
        log = server.stderr.read()
        assert log.count("interrupted") == (number == signal.SIGINT)
        assert "starting it again" not in log
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_up_refuses_requests_while_nodes_are_missing_and_ends_by_ctrl_c(tmp_path):
    listen, port = net.free_ports(2)
    addresses = ("--listen", f"127.0.0.1:{listen}", "--port", str(port), "--no-mdns")
    log, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*COMMAND, "up", "demo", "-n", "2", "--name", "one", *addresses],
            stderr=output,
            env={**os.environ, "CENACLE_HOME": str(tmp_path)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            missing = "1 of 2 nodes are available (one)"
            assert wait_until(lambda: missing in log.read_text(), 120), log.read_text()
            body = {"messages": [{"role": "user", "content": "x"}]}
            answer = HTTP.post(f"{url}/v1/chat/completions", json=body, timeout=120)
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == f"no model is loaded yet: {missing}"
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 130
        finally:
            process.kill()
            process.wait()
    lines = log.read_text().splitlines()
    assert lines[-1] == "interrupted"
    assert not any("Traceback" in line for line in lines), lines


@pytest.mark.parametrize("available", [True, False])
def test_the_device_is_reported(available):
    if available and not native.is_available():
        pytest.skip(native.unavailable_reason())
    env = {**os.environ, **({} if available else {"CENACLE_NATIVE": "0"})}
    done = run("generate", "-m", "demo", "-p", "What is 2 + 2?", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4\n"
    assert ("plain MLX, because" in done.stderr) == (not available)


def test_missing_native_kernels_are_refused():
    env = {**os.environ, "CENACLE_NATIVE": "0"}
    done = run("generate", "-m", DEMO_MODEL_DIR, "-p", "Hello", "--kernels", "native", env=env)
    assert done.returncode == 2
    assert "CENACLE_NATIVE" in done.stderr
    assert "Traceback" not in done.stderr
