"""Bodies that are wrong, to every POST endpoint: `make fuzz`.

Each is a good body with one thing made wrong, or no JSON at all, and must be refused with 4xx;
then the server must answer a good one. `--schema` also lets schemathesis make requests from the
server's own /openapi.json, good ones and bad ones, none of which may give 5xx. The last line of
stdout is JSON; exit status 1 if something is not so.

    python benchmarks/fuzz.py --bodies 10000 --schema 200
"""

# ruff: noqa: ARG001 (all ways to make a body wrong take the same)
from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from serving import run_server

AT_ONCE = 8
ASK = [{"role": "user", "content": "What is 12 + 30?"}]
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": ASK, "max_tokens": 2, "temperature": 0, "n": 1},
    "/v1/completions": {"prompt": "12 + 30", "max_tokens": 2, "temperature": 0, "top_p": 1},
    "/v1/responses": {"input": "12 + 30?", "max_output_tokens": 16, "temperature": 0},
    "/v1/messages": {"messages": ASK, "max_tokens": 2, "model": "demo_model"},
    "/v1/messages/count_tokens": {"messages": ASK, "model": "demo_model"},
}
NEEDED = {
    "/v1/chat/completions": ("messages",),
    "/v1/completions": ("prompt",),
    "/v1/responses": ("input",),
    "/v1/messages": ("messages", "max_tokens"),
    "/v1/messages/count_tokens": ("messages",),
}
# Values that no member of these has; null counts as absent.
WRONG: dict[str, tuple[Any, ...]] = {
    "messages": ("text", 7, {}, [], [7], [{}], [None], [[]], [{"role": "user"}], [{"role": 1}]),
    "prompt": (7, {}, [], [[]], [1.5], [-1], [10**9], [True], [{}], True),
    "input": (7, {}, [7], [{}], [[]], True, 1.5),
    "max_tokens": ("2", 0, -2, 1.5, True, [], {}, 1e300),
    "max_output_tokens": ("2", 0, -2, 1.5, True, [], {}),
    "temperature": ("0", -1, 3, [], {}, True, 1e400, -1e-9),
    "top_p": ("1", -1, 2, [], {}, -0.1, True),
    "n": ("1", 0, -3, 1.5, 10**6, [], {}, True),
    "model": ("other", 7, [], {}, "../../etc/passwd", "\x00", "\ud800", True),
    "stream": ("yes", 7, [], {}),
}


def body_of(rng: random.Random, path: str) -> bytes:
    """A body that is wrong in one way."""
    good = copy.deepcopy(GOOD[path])
    return rng.choice(WAYS)(rng, path, good)


def _value(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    known = [f for f in WRONG if f in good or (f in ("stream", "model") and "count" not in path)]
    name = rng.choice(known)
    good[name] = rng.choice(WRONG[name])
    return json.dumps(good).encode()


def _missing(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    del good[rng.choice(NEEDED[path])]
    return json.dumps(good).encode()


def _unknown(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    name = "".join(rng.choice("abcxyz_.\u00e9\x00 ") for _ in range(rng.randint(1, 30)))
    good["?" + name] = rng.choice((1, "x", [], {}, True, 1e9))  # ignored
    return _value(rng, path, good)


def _cut(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    whole = json.dumps(good).encode()
    return whole[: rng.randrange(len(whole))]


def _noise(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    return b"\xff" + rng.randbytes(rng.randint(0, 300))


def _flipped(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    """A byte of the text that JSON cannot have, anywhere."""
    whole = bytearray(json.dumps(good).encode())
    whole[rng.randrange(len(whole))] = rng.choice((0, 1, 0x1F, 0x80, 0xC0, 0xFE))
    return bytes(whole)


def _not_an_object(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    return rng.choice((b"[]", b"7", b'"x"', b"null", b"true", b"NaN", b"{}{}", b"", b"-", b"[{}]"))


def _deep(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    depth = rng.choice((200, 5000, 200_000))
    name = rng.choice(NEEDED[path])
    return f'{{"{name}": '.encode() + b"[" * depth + b"]" * depth + b"}"


def _huge(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    digits = rng.choice((400, 5000, 100_000))
    return f'{{"{rng.choice(NEEDED[path])}": {"9" * digits}}}'.encode()


def _nested(rng: random.Random, path: str, good: dict[str, Any]) -> bytes:
    """A message with something wrong inside."""
    wrong = rng.choice(
        (
            {"role": "nobody", "content": "x"},
            {"role": "user", "content": 7},
            {"role": "user", "content": [{"type": "nothing"}]},
            {"role": "user", "content": [{"type": "text"}]},
            {"role": "user", "content": [{"type": "text", "text": []}]},
            {"role": ["user"], "content": "x"},
        )
    )
    name = "messages" if "messages" in good else NEEDED[path][0]
    good[name] = [*ASK, wrong]
    return json.dumps(good).encode()


Way = Callable[[random.Random, str, dict[str, Any]], bytes]
WAYS: tuple[Way, ...] = (
    *(_value, _value, _value, _missing, _unknown, _cut, _noise, _flipped),
    *(_not_an_object, _nested, _nested, _huge, _deep),
)


async def fuzz(url: str, bodies: int, seed: int) -> tuple[Counter[int], list[str]]:
    """Send them.

    Returns:
        How often each status came, and the first bodies that were not refused with 4xx.
    """
    rng = random.Random(seed)
    paths = list(GOOD)
    jobs = [(path, body_of(rng, path)) for path in (rng.choice(paths) for _ in range(bodies))]
    statuses: Counter[int] = Counter()
    wrong: list[str] = []

    async with httpx.AsyncClient(base_url=url, timeout=60) as http:

        async def worker() -> None:
            while jobs:
                path, body = jobs.pop()
                try:
                    answer = await http.post(path, content=body)
                    status, text = answer.status_code, answer.text[:200]
                    fine = 400 <= status < 500 and "error" in answer.json()
                except (httpx.HTTPError, ValueError) as error:
                    status, text, fine = 0, f"{type(error).__name__}: {error}", False
                statuses[status] += 1
                if not fine:
                    wrong.append(f"{path} {body[:300]!r} gave {status} {text}")

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
        for path, good in GOOD.items():
            answer = await http.post(path, json=good)
            if answer.status_code != 200:
                wrong.append(f"{path}: a good body gave {answer.status_code} {answer.text[:200]}")
    return statuses, wrong


def schema(url: str, examples: int, seed: int) -> tuple[bool, str]:
    """Let schemathesis ask what /openapi.json describes: whether nothing was 5xx; what it said."""
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--phases"]
    command += ["examples,coverage,fuzzing", "--no-color", "--request-timeout", "60"]
    # One worker: in Python 3.11 threads that parse code at once fail with a SystemError.
    command += ["--continue-on-failure", "--suppress-health-check", "all", "--workers", "1"]
    with tempfile.TemporaryDirectory() as folder:  # it leaves its notes where it runs
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def main() -> int:
    """The command."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--bodies", type=int, default=10_000)
    parse.add_argument("--schema", type=int, default=0, help="examples per operation; 0: none")
    parse.add_argument("--nodes", type=int, default=1)
    parse.add_argument("--seed", type=int, default=0)
    given = parse.parse_args()
    with run_server(given.nodes) as server:
        statuses, wrong = asyncio.run(fuzz(server.url, given.bodies, given.seed))
        fine, said = True, ""
        if given.schema:
            fine, said = schema(server.url, given.schema, given.seed)
        alive = httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        log = server.log.read_text()
    checks = {
        "all_4xx": not wrong,
        "schema_no_5xx": fine,
        "alive": alive,
        "nothing_logged": "Traceback" not in log and "error" not in log,
    }
    for line in wrong[:20]:
        print(line)
    if not fine:
        print(said)
    if not checks["nothing_logged"]:
        print(log[-3000:])
    counted = {str(k): v for k, v in sorted(statuses.items())}
    print(json.dumps({"bodies": given.bodies, "statuses": counted, "checks": checks}))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
