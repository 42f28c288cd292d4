"""`cenacle chat` over a real pseudo-terminal: a model here, a server elsewhere."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pexpect
import pytest

import cenacle
from cenacle.cli.chat import ChatSession, stable_prefix_length
from cenacle.cli.chat_sources import ChatSettings, RemoteChat
from cenacle.core.chat import OutputPart
from cenacle.errors import ClusterError, InputError

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
CHAT = [sys.executable, "-m", "cenacle", "chat"]
# Two nodes behind a slow link, so that an answer can be stopped; and a key.
PROGRAM = f"""
import cenacle
from cenacle.net import bind
from cenacle.server.http_server import ServerOptions, serve
from cenacle.server.auth import KeyStore
from cenacle.server.middleware import AccessPolicy

sock = bind(port=0)
keys = KeyStore()
print(keys.add("tester"), flush=True)
with cenacle.load({str(DEMO)!r}, nodes=2, latency_s=0.03) as model:
    policy = AccessPolicy.for_socket(sock, keys, require_key=True)
    serve(model, sock, lambda url: print(url, flush=True), ServerOptions(policy=policy))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Folders of its own, and a plain terminal."""
    home = tmp_path_factory.mktemp("home")
    own = {"CENACLE_HOME": str(home)}
    plain = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    return {**os.environ, **own, **plain}


@pytest.fixture(scope="module")
def server(environment):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        key = process.stdout.readline().strip()
        url = process.stdout.readline().strip()
        assert url.startswith("http://")
        yield url, key
        process.terminate()


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, arguments, environment):
        self.child = pexpect.spawn(
            arguments[0], arguments[1:], env=environment, encoding="utf-8", timeout=120,
            dimensions=(30, 100),
            # A program that is started in the background may have been told to ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def see(self, text):
        self.child.expect(text)

    def type(self, keys):
        self.child.send(keys)

    def ask(self, question):
        """Ask a question; the lines that are shown before the statistics."""
        self.type(question + "\r")
        self.see(r"first token after")
        shown = self.child.before
        self.ready()
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
        return [line.strip() for line in re.split(r"[\r\n]+", plain)]

    def ready(self):
        """Wait for the line of input: it asks for pasted text in brackets."""
        self.see(r"\x1b\[\?2004h")

    def leave(self):
        self.type("\x04")
        self.see(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


def test_a_local_model(environment, tmp_path):
    terminal = Terminal([*CHAT, "-m", str(DEMO), "-n", "2", "--temp", "0"], environment)
    terminal.see("/help")
    terminal.ready()
    assert "42" in terminal.ask("What is 12 + 30?")
    assert "42" in terminal.ask("/regenerate")
    terminal.type("/save " + str(tmp_path / "talk.json") + "\r")
    terminal.see("saved as")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["content"] for m in saved["messages"]] == ["What is 12 + 30?", "42"]
    assert (tmp_path / "talk.json").stat().st_mode & 0o077 == 0
    terminal.type("/nonsense\r")
    terminal.see("unknown command")
    terminal.type("\x1b[A" * 4 + "\r")  # the fourth line before: the question
    terminal.see("first token after")
    # Two lines, by Ctrl-J and by a backslash, and a line that is thrown away.
    terminal.type("/system one\x0atwo\\\rthree\r")
    terminal.see("system prompt: one")
    terminal.see("two")
    terminal.see("three")
    terminal.ready()  # before that, the terminal itself would make Ctrl-C a signal
    terminal.type("not this\x03")
    terminal.ready()
    terminal.type("/new\r")
    terminal.ready()
    assert "12" in terminal.ask("What is 7 + 5?")
    assert terminal.leave() == 0
    kept = Path(environment["CENACLE_HOME"]) / "chat_history"
    assert "What is 12 + 30?" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0


def test_a_remote_server_and_a_stopped_answer(environment, server):
    url, key = server
    with_key = {**environment, "CENACLE_API_KEY": key}
    terminal = Terminal([*CHAT, "--url", f"{url}/v1", "--temp", "0"], with_key)
    terminal.see("demo_model")
    terminal.ready()
    assert "42" in terminal.ask("What is 12 + 30?")
    terminal.type("/temp 2\r")
    terminal.see("temperature: 2")
    terminal.type("/seed 1\r")
    terminal.see("seed: 1")
    terminal.type("/temp 0\r")
    terminal.see("temperature: 0")
    terminal.type("Count from 3 to 9.\r")
    terminal.see(r"\x1b\[\?2004l")
    terminal.see("3, ?4")  # it has begun, and takes seconds
    terminal.type("\x03")
    terminal.see("stopped")
    terminal.ready()
    assert "12" in terminal.ask("What is 7 + 5?")
    assert terminal.leave() == 0


class _OtherServer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_a_server_of_another_kind_is_named_with_what_to_do():
    with HTTPServer(("127.0.0.1", 0), _OtherServer) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            with pytest.raises(InputError, match=r"got status 404 .* check the address"):
                RemoteChat(f"http://127.0.0.1:{other.server_port}")
        finally:
            other.shutdown()
            thread.join()


def test_wrong_keys_and_addresses_are_refused(environment, server):
    url, key = server
    for arguments, kind, message in (
        ((url,), InputError, "CENACLE_API_KEY"),
        ((url, "wrong"), InputError, "not valid"),
        (("http://127.0.0.1:9",), ClusterError, "does not answer"),
        (("nonsense",), InputError, "expected http://"),
        (("http://127.0.0.1:x",), InputError, "cannot be used"),
        ((url, key, None, Path("/nowhere")), InputError, "cannot be used"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            RemoteChat(*arguments)
    with closing(RemoteChat(url, key, "other")) as remote:
        with pytest.raises(InputError, match="other"):
            list(remote.answer([{"role": "user", "content": "Hello"}], ChatSettings()))
    ran = subprocess.run(
        [*CHAT, "--url", url], capture_output=True, text=True, timeout=120, env=environment
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")


def test_pipes_get_only_the_answers(environment, server):
    url, key = server
    ran = subprocess.run(
        [*CHAT, "--url", url, "--key", key, "--temp", "0"],
        input="What is 12 + 30?\n/temp 9\n\n/new\nWhat is 7 + 5?\n/exit\nWhat is 1 + 1?\n",
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.splitlines()) == (0, ["42", "12"])
    assert "/temp: expected a number from 0 to 2" in ran.stderr
    assert "tokens" not in ran.stderr, "there is no status without a terminal"


class Echo:
    """Answers with the messages that it gets."""

    name, context_used, context_length = "echo", 0, None

    def list_models(self):
        return ["echo", "other"]

    def answer(self, messages, settings):
        yield OutputPart("text", json.dumps(messages))


def test_the_status_is_what_fits_on_a_line():
    session = ChatSession(Echo(), ChatSettings())
    assert [session.describe_status(width) for width in (80, 3)] == ["echo", ""]
    session.tokens_per_s = 12.34
    session.source.context_used, session.source.context_length = 512, 1024
    wide = "████░░░░ 512 of 1,024 tokens (50%) · 12.3 tokens/s"
    assert session.describe_status(80) == f"{wide} · echo"
    assert session.describe_status(len(wide) + 3) == wide
    assert session.describe_status(49) == "512 of 1,024 tokens (50%) · 12.3 tokens/s · echo"
    assert session.describe_status(39) == "50% of 1,024 · 12.3 tokens/s · echo"
    assert session.describe_status(30) == "50% of 1,024 · 12.3 tokens/s"
    assert session.describe_status(20) == "12.3 tokens/s · echo"
    session.source.context_length = None
    assert session.describe_status(40) == "512 · 12.3 tokens/s · echo"


def test_a_conversation_is_loaded_as_it_was_saved(tmp_path, capsys):
    session = ChatSession(Echo(), ChatSettings(), "be short")
    session._handle_line("hello [red]", session._show_plain)
    assert json.loads(capsys.readouterr().out) == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hello [red]"},
    ]
    for name in ("talk.json", "talk.md"):
        session._handle_line(f"/save {tmp_path / name}", session._show_plain)
    assert "**You**\n\nhello [red]" in (tmp_path / "talk.md").read_text()
    other = ChatSession(Echo(), ChatSettings())
    other._handle_line(f"/load {tmp_path / 'talk.json'}", other._show_plain)
    assert (other.messages, other.system) == (session.messages, "be short")
    for wrong in ("[]", "{}", '{"messages": [{"role": "tool", "content": "x"}]}', "\x00", '"a"'):
        (tmp_path / "wrong.json").write_text(wrong)
        other._handle_line(f"/load {tmp_path / 'wrong.json'}", other._show_plain)
        assert "was not written by /save" in capsys.readouterr().err.replace("\n", " ")
    assert other.messages == session.messages
    other._handle_line("//slash", other._show_plain)
    assert other.messages[-2]["content"] == "/slash"


def test_questions_are_edited_and_branches_kept(tmp_path, capsys):
    session = ChatSession(Echo(), ChatSettings())

    def handle(line):
        session._handle_line(line, session._show_plain)
        return capsys.readouterr().err

    assert "no question yet" in handle("/edit x")
    assert "nothing was edited" in handle("/back")
    handle("one")
    handle("two")
    first = list(session.messages)
    handle("/edit three")
    assert [m["content"] for m in session.messages if m["role"] == "user"] == ["one", "three"]
    handle("/back")
    assert session.messages == first
    handle("/back")
    assert session.messages[2]["content"] == "three"
    handle("/edit")
    assert (session.draft, len(session.messages)) == ("three", 2)
    handle("/back")
    assert session.messages[2]["content"] == "three"
    (tmp_path / "a.py").write_text("x = '```'\n")
    (tmp_path / "b.bin").write_bytes(b"\xff")
    assert "1 with the next question" in handle(f"/file {tmp_path / 'a.py'}")
    assert "expected UTF-8 text" in handle(f"/file {tmp_path / 'b.bin'}")
    assert "cannot read" in handle("/file /nowhere")
    handle("what is it?")
    assert session.messages[-2]["content"] == "a.py\n````\nx = '```'\n````\n\nwhat is it?"
    assert session.files == []
    assert handle("/model") == "* echo\n  other\n"
    assert "nearest: other" in handle("/model ohter")
    assert handle("/model other").endswith("* other\n")
    assert session.source.name == "other"


def test_a_stable_prefix_never_changes():
    text = "# A\n\ntext\n\n- a\n\n- b\n\n  c\n\n```\nx\n\ny\n```\n\n"
    text += "1. p\n\n2. q\n\nlast\n\n> r\n\n> s\n"
    lengths = [stable_prefix_length(text[:n]) for n in range(len(text) + 1)]
    assert lengths == sorted(lengths), "what was printed stays printed"
    assert {text[: c] for c in lengths} == {
        "", text[: text.index("text")], text[: text.index("```")], text[: text.index("last")],
    }  # fmt: skip
