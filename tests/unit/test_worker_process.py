"""Processes for work from strangers: every wait for one of them ends."""

import sys
import textwrap
import time
from pathlib import Path

import pytest

from cenacle import worker_process
from cenacle.text import text_process
from cenacle.text.text_process import TextProcess
from cenacle.worker_process import WorkerFailed, WorkerProcess, work_again_if_killed


@pytest.fixture
def stub_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes workers that run the code of a module."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = []

    def make(code: str) -> WorkerProcess:
        name = f"stub_worker_{len(made)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        made.append(WorkerProcess(name))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


@pytest.mark.parametrize("characters", [1, 1_000_000])
@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(600)",
        "import sys, time; sys.stdin.buffer.read(4); time.sleep(600)",
        "import sys, time; sys.stdout.buffer.write(bytes(2)); sys.stdout.flush(); time.sleep(600)",
    ],
)
def test_a_worker_that_stands_still_has_a_deadline(stub_worker, monkeypatch, code, characters):
    monkeypatch.setattr(worker_process, "DEADLINE_S", 1)
    worker = stub_worker(code)
    began = time.monotonic()
    with pytest.raises(WorkerFailed):
        worker.ask({"text": "a" * characters})
    assert time.monotonic() - began < 60
    assert not worker.has_answered


def test_a_worker_that_ends_is_started_again(stub_worker):
    worker = stub_worker(
        """
        import os
        from cenacle.worker_process import serve
        def answer(message):
            if message["end"]:
                os._exit(3)
            return {"length": len(message["text"])}
        serve(answer)
        """
    )
    for end in (False, True, False):
        message = {"end": end, "text": "é" * 3_000_000}
        if end:
            with pytest.raises(WorkerFailed):
                worker.ask(message)
        else:
            assert worker.ask(message) == {"length": 3_000_000}


@pytest.mark.parametrize("when", ["idle", "at work", "always"])
def test_work_is_done_again_when_another_program_kills_the_process(stub_worker, tmp_path, when):
    worker = stub_worker(
        f"""
        import os, pathlib, signal
        from cenacle.worker_process import serve
        mark = pathlib.Path({str(tmp_path / "mark")!r})
        def answer(message):
            if message["when"] == "always" or message["when"] == "at work" and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return {{"pid": os.getpid()}}
        serve(answer)
        """
    )
    first = worker.ask({"when": "idle"})["pid"]
    if when == "idle":
        process = worker.start()
        process.kill()
        # Not waited for: the pipe is found closed while the message is written or read.
    if when == "always":
        with pytest.raises(worker_process.WorkerKilled):
            work_again_if_killed(lambda: worker.ask({"when": when}))
    else:
        assert work_again_if_killed(lambda: worker.ask({"when": when}))["pid"] != first


def test_work_beyond_a_limit_is_not_done_again(stub_worker, tmp_path):
    worker = stub_worker(
        f"""
        import pathlib
        from cenacle.worker_process import limit_work, serve
        def answer(message):
            with pathlib.Path({str(tmp_path / "times")!r}).open("a") as file:
                file.write("x")
            limit_work(0.01, 1 << 30)
            while True:
                pass
        serve(answer)
        """
    )
    with pytest.raises(WorkerFailed):
        work_again_if_killed(lambda: worker.ask({}))
    assert (tmp_path / "times").read_text() == "x"


def test_a_worker_that_keeps_much_memory_is_replaced(stub_worker):
    worker = stub_worker(
        """
        import os
        from cenacle.worker_process import serve
        kept = []
        def answer(message):
            kept.append(b"x" * message["bytes"])
            return {"pid": os.getpid()}
        serve(answer)
        """
    )
    small, large = {"bytes": 1}, {"bytes": worker_process.MAX_KEPT_BYTES // 2}
    pids = [worker.ask(message)["pid"] for message in (small, large, large, small, large)]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4]


def test_no_text_pays_for_a_slow_import(tmp_path, monkeypatch):
    """A cold import of transformers needs seconds of processor time."""
    package = tmp_path / "transformers"
    package.mkdir()
    real = next(p for p in sys.path if (Path(p) / "transformers").is_dir())
    (package / "__init__.py").write_text(
        f"import sys, time\n"
        f"while time.process_time() < 4: pass\n"
        f"sys.path.remove({str(tmp_path)!r}); sys.path.insert(0, {real!r})\n"
        f"del sys.modules['transformers']\n"
        f"import transformers\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(text_process, "CPU_S", 1)
    process = TextProcess(None)
    try:
        arguments = {"conversations": [[{"role": "user", "content": "Why?"}]]}
        template = "{{ messages[0].content }}"
        assert process.render({**arguments, "chat_template": template}) == "Why?"
    finally:
        process.close()
