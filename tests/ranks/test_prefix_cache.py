"""Cached prefixes are not computed again, and change nothing but the time."""

import itertools
import queue
from dataclasses import replace

import pytest

import cenacle
from cenacle.model.synth import synth

SYSTEM = [(131 * i * i + 17 * i + 5) % 257 for i in range(600)]
QUESTIONS = ([5, 6, 7], [9] * 40, [200, 3])
# Plain attention, a sliding window with sinks, linear attention, latent attention in lists.
FAMILIES = ("qwen3_moe", "gpt_oss", "qwen3_next", "glm_moe_dsa")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("prefixes") / request.param
    return synth(path, family=request.param, dtype="float32").path


def load(folder, nodes=1, cache_gb=1.0, **options):
    return cenacle.load(str(folder), nodes, prefix_cache_gb=cache_gb, **options)


def submit(model, prompt, max_tokens=8, **changes):
    """Submit a request; its id, and a queue of its events."""
    events = queue.Queue()
    request = replace(model.request(prompt, max_tokens), **changes)
    model.group.submit(request, events.put)
    return request.id, events


def collect(events):
    """The output, and the number of cached prompt tokens."""
    tokens, cached = [], 0
    while True:
        event = events.get(timeout=300)
        if isinstance(event, Exception):
            raise event
        tokens.append(event.token)
        cached += event.cached_tokens
        if event.finish is not None:
            return tokens, cached


def generate(model, prompt, max_tokens=8, **changes):
    return collect(submit(model, prompt, max_tokens, **changes)[1])


def conversation(model, apart=False):
    """Two turns, other questions with the same prefix, and two of them at once.

    Args:
        apart: each request is of another client, and no prefix is another client's.
    """
    keys = ({"key": f"client {number}"} if apart else {} for number in itertools.count())
    outputs = [generate(model, SYSTEM + QUESTIONS[0], **next(keys))]
    prompt = SYSTEM + QUESTIONS[0] + outputs[0][0] + [4, 4, 4]
    outputs.append(generate(model, prompt, **next(keys)))
    outputs += [generate(model, SYSTEM + question, **next(keys)) for question in QUESTIONS]
    prompts = [SYSTEM[:520] + question for question in QUESTIONS[1:]]
    concurrent = [submit(model, prompt, 12, **next(keys))[1] for prompt in prompts]
    return outputs + [collect(events) for events in concurrent]


def test_the_tokens_are_the_same_with_and_without_on_one_node_and_two(folder):
    with load(folder) as model:
        one = conversation(model)
        uncached = conversation(model, apart=True)
    assert all(cached == 0 for _, cached in uncached)
    if folder.name == FAMILIES[0]:
        with load(folder, cache_gb=0) as model:
            assert conversation(model) == uncached
    with load(folder, 2) as model:
        two = conversation(model)
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in uncached]
    assert two == one
    cached = [count for _, count in one]
    assert cached[0] == 0
    first = len(SYSTEM + QUESTIONS[0]) + len(one[0][0])
    assert first - 1 <= cached[1] <= first, "all of the first turn, including its output"
    assert min(cached[2:5]) >= 512
    assert min(cached[5:]) >= 512


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("prefixes") / "plain"
    with load(synth(path, family="qwen3_moe", dtype="float32").path, 2) as model:
        yield model


def test_the_cache_of_a_running_or_cancelled_request_is_reused(plain):
    prompt = [(7 * i + 3) % 251 for i in range(300)]
    name, events = submit(plain, prompt, 2000)
    events.get(timeout=300)
    assert generate(plain, [*prompt, 1, 2])[1] == 299
    plain.group.cancel(name)
    assert generate(plain, [*prompt[:290], 9, 9, 9])[1] == 290


def test_requests_wait_for_one_that_computes_the_same_prefix(plain):
    """Four concurrent requests with one long prefix: it is computed once."""
    prompt = [(11 * i + 1) % 241 for i in range(1500)]
    first = submit(plain, [*prompt, 1])[1]
    others = [submit(plain, [*prompt, 2, i])[1] for i in range(3)]
    assert collect(first)[1] == 0
    assert [collect(events)[1] for events in others] == [1500] * 3
