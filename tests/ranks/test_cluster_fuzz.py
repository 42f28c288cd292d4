"""`make fuzz-cluster`, short: messages with one to three faults at every border of a cluster."""

import json
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cenacle.cluster import messages
from cenacle.message import MessageError, parse
from cenacle.ranks import messages as rank_messages

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import fuzz_messages  # noqa: E402


@pytest.mark.parametrize("module", [messages, rank_messages])
def test_damaged_messages_are_messages_or_errors(module: Any) -> None:
    dice, kinds = random.Random(1), fuzz_messages.message_types(module)
    read = 0
    for _ in range(2000):
        kind = dice.choice(kinds)
        whole = fuzz_messages.sample_message(kind, dice)
        with suppress(MessageError):
            parse(whole, kind) if kind.type else kind.from_json(whole)
            read += 1
        damaged = fuzz_messages.damage(whole, dice)
        with suppress(MessageError):
            parse(damaged, kind) if kind.type else kind.from_json(damaged)
    assert read > 1200  # most are good before they are damaged


def test_every_border_of_a_cluster() -> None:
    command = [sys.executable, str(BENCHMARKS / "fuzz_cluster.py"), "--frames", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["borders"] == 14
    assert all(frames >= 20 for frames in result["frames"].values())
