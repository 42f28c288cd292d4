"""How a process ended: told by what it really did."""

import signal
import subprocess
import sys

import pytest

from cenacle.ranks import exit_reason


@pytest.mark.parametrize(
    ("program", "description"),
    [
        ("raise SystemExit(3)", "exited 3"),
        ("import os; os.kill(os.getpid(), 6)", "was killed by SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    ],
)
def test_words_for_an_exit_status(program, description):
    status = subprocess.run([sys.executable, "-c", program], check=False).returncode
    assert (
        exit_reason.describe_exit(status)
        == exit_reason.describe_exit(status, 10**9 if status != -9 else None)
        == description
    )


def test_a_kill_for_lack_of_memory_is_told_from_others(tmp_path, monkeypatch):
    page = tmp_path / "vmstat"
    monkeypatch.setattr(exit_reason, "VMSTAT", page)
    assert exit_reason.oom_kill_count() is None, "not Linux"
    page.write_text("nr_free_pages 5\noom_kill 9\nnr_x 1\n")
    before = exit_reason.oom_kill_count()
    assert before == 9
    assert exit_reason.describe_exit(-signal.SIGKILL, before) == "was killed by SIGKILL"
    page.write_text("nr_free_pages 5\noom_kill 10\nnr_x 1\n")
    assert "ran out of memory" in exit_reason.describe_exit(-signal.SIGKILL, before)
    assert exit_reason.describe_exit(-signal.SIGTERM, before) == "was killed by SIGTERM"
    page.write_text("nothing of that\n")
    assert exit_reason.describe_exit(-signal.SIGKILL, before) == "was killed by SIGKILL"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[malloc] Unable to allocate 80000000000 bytes."),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_errors_that_mean_that_memory_is_short(error):
    assert exit_reason.describe_error(error).startswith("ran out of memory (")
    assert type(error).__name__ in exit_reason.describe_error(error)


def test_other_errors_are_what_they_are():
    assert exit_reason.describe_error(ValueError("no")) == "ValueError: no"
    assert exit_reason.describe_error(KeyError()) == "KeyError"
