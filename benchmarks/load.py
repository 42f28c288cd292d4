"""Several people at once: `make load`.

Clients, each with a key of its own, ask for one answer after the other: short and long prompts,
streamed or whole, two at once, and some leave in the middle. One client alone is measured first.
What must be so is checked: no error but 429 with Retry-After, memory and files flat, fair shares,
and more tokens a second in all than for one. The last line of stdout is JSON; exit status 1 if
something is not so.

    python benchmarks/load.py --seconds 120 --clients 16 --nodes 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cenacle.demo.tasks import held_out
from serving import DEMO, ResourceUsage, RunningServer, run_server

FAIR = 0.5  # the slowest key's tokens over the fastest's
FASTER = 2.5  # tokens a second of all over those of one alone
GROWN_BYTES = 40e6  # of all processes, from the first third to the end
GROWN_FILES = 4
WARM_S = 3.0
END = json.loads((DEMO / "config.json").read_text())["eos_token_id"]

# Kept prompts fill what they may have within seconds: after that memory has no reason to grow.
FULL = ("--prefix-cache-gb", "0.05", "--prefix-cache-disk-gb", "0")


@dataclass
class Seen:
    """What clients got: outcomes of requests, and errors by what they were."""

    done: int = 0
    left: int = 0
    busy: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)


def job(rng: random.Random, questions: list[str]) -> tuple[dict[str, Any], bool]:
    """A body, and whether the client will leave in the middle of its answer."""
    kind = rng.choices(("short", "long", "whole", "leave", "two"), (50, 20, 15, 10, 5))[0]
    many = rng.randint(10, 14) if kind == "long" else 1
    text = " ".join(rng.choice(questions) for _ in range(many))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": rng.randint(32, 96),
        "temperature": rng.choice((0, 0.7)),
        "logit_bias": {str(END): -100},  # as long as was asked for
        "stream": kind != "whole",
        "n": 2 if kind == "two" else 1,
    }
    return body, kind == "leave"


async def client(
    http: httpx.AsyncClient, key: str, seed: int, ends: float, seen: Seen, questions: list[str]
) -> None:
    """One person, until the time is over."""
    rng = random.Random(seed)
    headers = {"authorization": f"Bearer {key}"}
    while time.monotonic() < ends:
        body, leaves = job(rng, questions)
        try:
            wait_s = await ask(http, headers, body, leaves, seen)
        except (httpx.HTTPError, ValueError) as error:
            seen.errors[f"{type(error).__name__}: {error}"[:200]] += 1
            wait_s = 0.1
        if wait_s:
            await asyncio.sleep(min(wait_s, max(0.0, ends - time.monotonic())))


async def ask(
    http: httpx.AsyncClient,
    headers: dict[str, str],
    body: dict[str, Any],
    leaves: bool,
    seen: Seen,
) -> float:
    """One request.

    Returns:
        Seconds to wait before the next.
    """
    began = time.monotonic()
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        if answer.status_code == 429 and "retry-after" in answer.headers:
            seen.busy += 1
            return float(answer.headers["retry-after"])
        if answer.status_code != 200:
            text = (await answer.aread()).decode()
            raise ValueError(f"{answer.status_code} {text}")
        # Pieces are not parsed: the client has the same cores as the server.
        pieces, last = 0, b""
        async for piece in answer.aiter_raw():
            if not pieces and body["stream"]:
                seen.first_s.append(time.monotonic() - began)
            pieces, last = pieces + 1, (last + piece)[-200:]
            if leaves and pieces > 5:
                seen.left += 1
                return 0
    if body["stream"] and not last.endswith(b"data: [DONE]\n\n"):
        raise ValueError(f"a stream ended with {last[-80:]!r}")
    seen.done += 1
    return 0


async def run(
    server: RunningServer, keys: dict[str, str], seconds: float, seed: int
) -> tuple[Seen, dict[str, float], list[ResourceUsage], float]:
    """All clients at once.

    Returns:
        What they got, tokens by key, what the server held at a third of the time and at its end,
        the seconds that it took.
    """
    questions = [task.question for task in held_out("add", 40)]
    seen, held = Seen(), []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        key = next(iter(server.keys.values()))
        before, began = await generated(http, key), time.monotonic()
        people = asyncio.gather(
            *(
                client(http, k, seed + n, began + seconds, seen, questions)
                for n, k in enumerate(keys.values())
            )
        )
        await asyncio.sleep(seconds / 3)
        held.append(server.resource_usage())
        await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
        after, took = await generated(http, key), time.monotonic() - began
        held.append(server.resource_usage())
        await people
    return seen, {n: after.get(n, 0) - before.get(n, 0) for n in keys}, held, took


async def generated(http: httpx.AsyncClient, key: str) -> dict[str, float]:
    """Tokens by key, as the server counts them."""
    page = (await http.get("/metrics", headers={"x-api-key": key})).text
    return {
        sample.labels["key"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "cenacle_generation_tokens_total"
    }


def main() -> int:
    """The command."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--seconds", type=float, default=120)
    parse.add_argument("--alone", type=float, default=20, help="seconds of one client alone")
    parse.add_argument("--clients", type=int, default=16)
    parse.add_argument("--nodes", type=int, default=1)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--report-only", action="store_true", help="no figure sets the exit status")
    given = parse.parse_args()
    names = tuple(f"person-{n:02}" for n in range(given.clients))
    with run_server(given.nodes, names, "--require-key", *FULL) as server:
        one = {names[0]: server.keys[names[0]]}
        asyncio.run(run(server, one, min(WARM_S, given.alone), 1000))
        _, alone, _, alone_s = asyncio.run(run(server, one, given.alone, 2000))
        idle = server.resource_usage()
        seen, tokens, held, took = asyncio.run(run(server, server.keys, given.seconds, given.seed))
        time.sleep(1)
        after = server.resource_usage()
        log = server.log.read_text()
    grown = held[1].server_bytes + held[1].ranks_bytes - held[0].server_bytes - held[0].ranks_bytes
    rate, rate_alone = sum(tokens.values()) / took, sum(alone.values()) / alone_s
    first = sorted(seen.first_s)
    checks = {
        "no_errors": not seen.errors,
        "memory_flat": grown < GROWN_BYTES,
        "files_flat": after.files - idle.files <= GROWN_FILES,
        "fair": min(tokens.values()) >= FAIR * max(tokens.values()),
        "faster": rate >= FASTER * rate_alone,
        "nothing_logged": "Traceback" not in log and "error" not in log,
    }
    result = {
        "nodes": given.nodes,
        "clients": given.clients,
        "seconds": round(took, 1),
        "requests": seen.done,
        "left": seen.left,
        "busy_429": seen.busy,
        "errors": dict(seen.errors),
        "tok_per_s": round(rate, 1),
        "tok_per_s_alone": round(rate_alone, 1),
        "ratio": round(rate / rate_alone, 2) if rate_alone else None,
        "slowest_over_fastest": round(min(tokens.values()) / max(1, *tokens.values()), 2),
        "first_s_median": round(first[len(first) // 2], 3) if first else None,
        "held": {"idle": asdict(idle), "third": asdict(held[0]), "end": asdict(held[1])},
        "files_after": after.files,
        "grown_bytes": grown,
        "checks": checks,
    }
    print(json.dumps(result))
    return 0 if given.report_only or all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
