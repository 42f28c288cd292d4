"""What was computed once is not computed again, and nobody can tell but by the time it takes."""

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


def loaded(folder, nodes=1, cache_gb=1.0, **options):
    return cenacle.load(str(folder), nodes, prefix_cache_gb=cache_gb, **options)


def begin(model, prompt, max_tokens=8, **how):
    """The events of an answer, as they come."""
    events = queue.Queue()
    request = replace(model.request(prompt, max_tokens), **how)
    model.group.submit(request, events.put)
    return request.id, events


def rest(events):
    """An answer's tokens, and how many of its prompt's were not computed."""
    tokens, cached = [], 0
    while True:
        event = events.get(timeout=60)
        if isinstance(event, Exception):
            raise event
        tokens.append(event.token)
        cached += event.cached_tokens
        if event.finish is not None:
            return tokens, cached


def ask(model, prompt, max_tokens=8):
    return rest(begin(model, prompt, max_tokens)[1])


def conversation(model):
    """Two turns, others that share the first prompt's beginning, and two at once."""
    answers = [ask(model, SYSTEM + QUESTIONS[0])]
    answers.append(ask(model, SYSTEM + QUESTIONS[0] + answers[0][0] + [4, 4, 4]))
    answers += [ask(model, SYSTEM + question) for question in QUESTIONS]
    both = [begin(model, SYSTEM[:520] + question, 12)[1] for question in QUESTIONS[1:]]
    return answers + [rest(events) for events in both]


def test_the_same_tokens_with_and_without_on_one_node_and_two(folder):
    with loaded(folder, cache_gb=0) as model:
        want = conversation(model)
    assert all(cached == 0 for _, cached in want)
    with loaded(folder) as model:
        one = conversation(model)
    with loaded(folder, 2) as model:
        two = conversation(model)
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in want]
    assert two == one
    cached = [count for _, count in one]
    assert cached[0] == 0
    first = len(SYSTEM + QUESTIONS[0]) + len(one[0][0])
    assert first - 1 <= cached[1] <= first, "all of the first turn, answer too"
    assert min(cached[2:5]) >= 512
    assert min(cached[5:]) >= 512


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("prefixes") / "plain"
    with loaded(synth(path, family="qwen3_moe", dtype="float32").path, 2) as model:
        yield model


def test_a_running_and_a_cancelled_request_can_be_shared(plain):
    prompt = [(7 * i + 3) % 251 for i in range(300)]
    name, events = begin(plain, prompt, 2000)
    events.get(timeout=60)
    assert ask(plain, [*prompt, 1, 2])[1] == 299
    plain.group.cancel(name)
    assert ask(plain, [*prompt[:290], 9, 9, 9])[1] == 290


def test_others_wait_for_who_computes_the_same(plain):
    """Four at once with one long beginning: it is computed once."""
    prompt = [(11 * i + 1) % 241 for i in range(1500)]
    first = begin(plain, [*prompt, 1])[1]
    others = [begin(plain, [*prompt, 2, i])[1] for i in range(3)]
    assert rest(first)[1] == 0
    assert [rest(events)[1] for events in others] == [1500] * 3
