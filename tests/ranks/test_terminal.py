"""`serve`, `top` and `chat` in real terminals, over one server: pseudo-terminals, and tmux where it
is installed, which shows what a person sees in 40 columns."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

import cenacle
from support.http import HTTP

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
DEADLINE_S = 120
COLORS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    home = str(tmp_path_factory.mktemp("home"))
    plain = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    # pytest-xdist sets COLUMNS and LINES, which count more than the size of a terminal.
    inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    return {**inherited, "CENACLE_HOME": home, "LC_ALL": "C.UTF-8", **plain}


def spawn(environment, *arguments, columns=100):
    return pexpect.spawn(
        sys.executable,
        ["-m", "cenacle", *arguments],
        env=environment,
        encoding="utf-8",
        timeout=DEADLINE_S,
        dimensions=(40, columns),
        # A program that is started in the background may have been told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def end(child):
    """What it wrote to its end, without colors, and its status."""
    child.expect(pexpect.EOF)
    child.close()
    return COLORS.sub("", child.before), child.exitstatus


@pytest.fixture(scope="module")
def served(environment):
    """The address of a server in a terminal, and what it said."""
    child = spawn(environment, "serve", "-m", "demo", "--port", "0")
    child.expect(r"watch +cenacle top --url (http://\S+)")
    url, greeting = child.match[1], COLORS.sub("", child.before)
    question = [{"role": "user", "content": "Count from 3 to 9."}]
    body = {"messages": question, "max_tokens": 60}
    HTTP.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S).raise_for_status()
    yield url, greeting
    child.send("\x03")
    text, status = end(child)
    assert (text.split(), status) == (["^C", "interrupted"], 130)


def test_a_server_greets_with_what_its_owner_needs(served):
    url, greeting = served
    assert f"serving {DEMO.name} at {url}" in greeting
    assert f"OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=none" in greeting
    assert "none needed from this machine" in greeting
    assert "1,024 tokens" in greeting


def test_top_is_live_and_q_quits(environment, served):
    child = spawn(environment, "top", "--url", served[0], "--interval", "0.2")
    for _ in range(2):  # pictures
        child.expect("hot experts")
        child.expect("q quits")
    child.send("q")
    text, status = end(child)
    assert status == 0
    assert "Traceback" not in text
    child = spawn(environment, "top", "--url", served[0])
    child.expect("q quits")
    child.send("\x03")
    text, status = end(child)
    assert (text.split()[-1], status) == ("interrupted", 130)


def test_top_in_a_pipe_is_one_picture(environment, served):
    done = subprocess.run(
        [sys.executable, "-m", "cenacle", "top", "--url", served[0]],
        capture_output=True,
        text=True,
        env=environment,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "hot experts" in done.stdout
    assert re.search(r"disk \S+ .B free of", done.stdout)


@contextmanager
def tmux(environment, *arguments):
    """A program in a terminal of 40 columns; yields what reads its screen and what types."""
    socket = f"cenacle-{os.getpid()}"
    base = ["tmux", "-L", socket, "-f", "/dev/null"]
    command = [*base, "new-session", "-d", "-x", "40", "-y", "24", "--", sys.executable, "-m"]
    subprocess.run([*command, "cenacle", *arguments], env=environment, check=True)
    subprocess.run([*base, "set", "-g", "remain-on-exit", "on"], check=True)  # to see why it ended

    def wait_for(*texts):
        ends = time.monotonic() + DEADLINE_S
        while True:
            shown = subprocess.run([*base, "capture-pane", "-p"], capture_output=True, text=True)
            if all(text in shown.stdout for text in texts):
                return shown.stdout.splitlines()
            assert time.monotonic() < ends, shown
            time.sleep(0.2)

    def type_keys(*keys):
        subprocess.run([*base, "send-keys", *keys], check=True)

    try:
        yield wait_for, type_keys
    finally:
        subprocess.run([*base, "kill-server"], capture_output=True)


@needs_tmux
def test_chat_fits_40_columns(environment, served):
    # tmux answers where the cursor is, which the line below the prompt needs.
    variables = {k: v for k, v in environment.items() if k != "PROMPT_TOOLKIT_NO_CPR"}
    with tmux(variables, "chat", "--url", served[0], "--temp", "0") as (wait_for, type_keys):
        wait_for("\n>", "\ndemo_model\n")  # before that Enter is a new line
        type_keys("What is 12 + 30?", "Enter")
        wait_for("░ 22 of 1,024 tokens (2%)\n")  # below the prompt
        type_keys("/edit", "Enter")
        wait_for("\n> What is 12 + 30?\n\n")
        type_keys("BSpace", "BSpace", "BSpace", "4?", "Enter")
        lines = wait_for("\n16\n")
        assert max(map(len, lines)) <= 40


@needs_tmux
def test_top_fits_40_columns(environment, served):
    with tmux(environment, "top", "--url", served[0]) as (wait_for, _):
        lines = wait_for("ok  demo_model  1 node, up ", "hot experts", "q quits")
        assert max(map(len, lines)) <= 40
