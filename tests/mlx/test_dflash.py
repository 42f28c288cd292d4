"""DFlash and DSpark drafters: what they compute, that they change no answer, which are refused. One
process; on two nodes: tests/ranks/test_drafters.py.

The reference is mlx-vlm's drafter with the same weights and hidden states.
"""

import importlib
import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from test_eagle3 import (
    LAYERS,
    PROMPT,
    VOCAB_SIZE,
    WIDTH,
    damage_at_random,
    generate,
    inspect,
    load,
    load_rank_model_of,
    make_proposer,
)
from test_eagle3 import served as served  # a fixture
from test_group_drafts import answer, require_same

from cenacle import InputError
from cenacle.core.request import Request, Sampling
from cenacle.engine.cache.ragged_cache import merge_ragged
from cenacle.engine.cache.state_rewinder import Rewinder
from cenacle.engine.speculative.draft_model import load_drafter
from cenacle.engine.speculative.mtp import draft_tokens
from cenacle.errors import CheckpointError
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.mtp import record_layer_outputs
from support.drafter_checkpoint import OncePerOptions, write_dflash


@pytest.fixture(scope="module")
def drafters(tmp_path_factory, served):
    """By arguments of `write_dflash`, made when first asked for."""
    return OncePerOptions(write_dflash, tmp_path_factory.mktemp("drafters"), served.folder, LAYERS)


@pytest.mark.parametrize("kernels", ["mlx", "auto"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_dflash", {}),
        ("qwen3_dflash", {"inner": {"causal": True}, "final_logit_softcapping": 2.0}),
        (
            "qwen3_dflash",
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
        ),
        ("dspark", {"is_dspark": True}),
        ("dspark", {"is_dspark": True, "inner": {"sample_from_anchor": False}}),
    ],
)
def test_it_drafts_what_mlx_vlm_drafts(served, drafters, name, options, kernels):
    """Over two rounds, the second after a part of the first was accepted."""
    package = f"mlx_vlm.speculative.drafters.{name}"
    pytest.importorskip(package, reason="needs mlx-vlm")
    drafter = importlib.import_module(package)
    folder, model = drafters(**options), load_rank_model_of(served)
    config = drafter.ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    reference = drafter.Model(config)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    reference.load_weights(list(reference.sanitize(tensors).items()), strict=False)
    nn.Module.__setattr__(reference, "embed_tokens", model.model.embed_tokens)
    reference.lm_head = model.lm_head
    caches = reference.make_cache()

    text, count = [*PROMPT, 33], 4
    seen = mx.random.normal((1, len(PROMPT), 3 * WIDTH), key=mx.random.key(1))
    # Of several tokens at once mlx-vlm's layers with a window see more than the window.
    kept = 1 if "sliding_window" in options else 3
    verified = mx.random.normal((1, kept, 3 * WIDTH), key=mx.random.key(2))

    expected, got = [], []

    def choose_reference(logits):  # of all places at once, or of one after the other
        expected.append((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).reshape(-1, 512))
        return mx.argmax(logits, axis=-1)

    def choose(logprobs, position):
        got.append(logprobs)
        return mx.argmax(logprobs, axis=-1)

    first = reference.draft_block(33, seen, caches, count + 1, choose_reference)
    second = reference.draft_block(77, verified, caches, count + 1, choose_reference)

    proposer = make_proposer(folder, served, model, kernels)
    proposer.reset(text)
    with proposer.recording():
        proposer.states.record(seen)
    assert proposer.propose([], count, choose, 0) == first[0].tolist()
    with proposer.recording():
        proposer.states.record(mx.pad(verified, [(0, 0), (0, 5 - kept), (0, 0)]))
    proposer.drop_states(5 - kept)
    proposer.truncate(len(text) + kept - 1)
    assert proposer.propose([77], count, choose, 2) == second[0].tolist()
    differences = mx.abs(mx.concatenate(got) - mx.concatenate(expected))
    assert len(differences) == 2 * count
    assert mx.max(differences).item() < 2e-3


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 0.8, "presence_penalty": 0.5}]
)
def test_answers_are_the_same_with_and_without_it(served, drafters, sampling):
    plain = generate(served, None, **sampling)[0]
    tokens, drafts = generate(served, drafters(skill="trained", is_dspark=True), **sampling)
    assert tokens == plain
    assert drafts.by_model_accepted > 0.3 * drafts.by_model > 0
    if not sampling:
        tokens, drafts = generate(served, drafters())
        assert tokens == plain
        assert drafts.by_model > drafts.by_model_accepted


def test_it_drafts_for_several_requests_at_once(served, drafters):
    """Of different lengths, so that rows of a pass are padded."""
    requests = [
        Request(f"r{i}", prompt, 24 - 5 * i, (), Sampling(seed=i, temperature=0.4 * i))
        for i, prompt in enumerate(((5, 80, 200, 17, 9), (7, 3), (1, 2, 3, 4, 5, 6)))
    ]
    plain = answer(load(served), requests, "off")
    for folder, share in ((drafters(skill="trained", is_dspark=True), 0.6), (drafters(), -1)):
        model = load(served)
        proposer = make_proposer(folder, served, model)
        record_layer_outputs(model, LAYERS, proposer.states.record)
        events, drafts, steps = answer(model, requests, "always", proposer)
        require_same(events, plain[0])
        assert drafts.by_model_accepted > share * drafts.by_model
        assert share < 0 or steps < plain[2] / 2


@pytest.mark.parametrize("options", [{}, {"inner": {"causal": True}}, {"is_dspark": True}])
@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_a_pass_give_what_each_gives_alone(served, drafters, options, window):
    """Texts of different lengths, the shorter one padded."""
    if window is not None:
        kinds = ["sliding_attention", "full_attention"]
        options = {**options, "layer_types": kinds, "sliding_window": window}
    folder, model = drafters(**options), load(served)
    head = load_drafter(Checkpoint.open(folder), served, model, "auto")
    states = mx.random.normal((2, 6, 3 * WIDTH), key=mx.random.key(5))
    ids, lengths = mx.array([[3, 4, 5, 6, 7, 8], [9, 10, 11, 0, 0, 0]]), (6, 3)

    def choose(logits, index):
        return mx.argmax(logits, axis=-1)[:, None]

    alone = []
    for row, length in enumerate(lengths):
        caches = head.make_caches()
        part = (slice(row, row + 1), slice(0, length))
        alone.append(draft_tokens(head, ids[part], states[part], caches, 4, choose, Rewinder()))
        assert caches[0].offset == length
    caches = merge_ragged([head.make_caches()] * 2)
    together = draft_tokens(head, ids, states, caches, 4, choose, Rewinder(), (0, 3))
    assert together.tolist() == mx.concatenate(alone).tolist()
    assert caches[0].lengths == [6, 3]


def test_no_more_is_drafted_than_a_block_has(served, drafters):
    for options, longest in (
        ({"block_size": 3}, 2),
        ({"block_size": 3, "is_dspark": True}, 3),
        ({"block_size": 3, "is_dspark": True, "dspark_bonus_anchor": True}, 2),
    ):
        folder = drafters(**options)
        assert inspect(folder, served).longest == longest
        proposer = make_proposer(folder, served, load(served))
        proposer.longest = longest
        proposer.reset([1, 2, 3])
        with proposer.recording():
            proposer.states.record(mx.ones((1, 2, 3 * WIDTH)))
        assert len(proposer.propose([], 8, lambda x, _: mx.argmax(x, axis=-1), 0)) == longest


def test_it_is_known_before_loading(served, drafters):
    draft = inspect(drafters(), served)
    assert (draft.form, draft.layers) == ("DFlash", LAYERS)
    head = VOCAB_SIZE * WIDTH * 4  # the served model's is used
    head_of_drafter = load_drafter(Checkpoint.open(drafters()), served, load(served), "mlx")
    parameters = tree_flatten(head_of_drafter.model.parameters())
    assert draft.weight_bytes == head + sum(a.nbytes for _, a in parameters)
    assert inspect(drafters(is_dspark=True), served).form == "DSpark"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 500}, "expected 512 token ids, got 500"),
        ({"hidden_size": 32}, "expected hidden states of 64, got 32"),
        ({"num_target_layers": 4}, "expected a model of 3 layers, got 4"),
        ({"inner": {"target_layer_ids": [0, 3]}}, r"numbers of layers from 0 to 2, got \[0, 3\]"),
    ],
)
def test_a_drafter_of_another_model_is_refused(served, drafters, changes, message):
    with pytest.raises(InputError, match=rf"DFlash\) cannot draft for served: .*{message}"):
        inspect(drafters(**changes), served)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": {"mask_token_id": 512}}, "mask_token_id: expected a token id below 512"),
        ({"inner": {"mask_token_id": None}}, "mask_token_id: expected a token id"),
        ({"inner": {"target_layer_ids": None}}, "expected numbers of different layers"),
        ({"inner": {"target_layer_ids": [0, 1]}}, "the files do not fit DFlash"),
        ({"block_size": 1}, "block_size: expected a block of 1 to 64 drafted tokens"),
        ({"block_size": 10**9}, "block_size: expected a block of 1 to 64 drafted tokens"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected full_attention or"),
        ({"rope_theta": [1]}, "rope_theta: expected a positive number"),
        ({"layer_types": 7}, "layer_types: expected full_attention or"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window: expected a positive"),
        ({"attention_sink_bias": True}, "attention_sink_bias: expected False, which alone"),
        ({"transformer_layer_config": {}}, "in the layout of its authors"),
        ({"final_logit_softcapping": "x"}, "the files do not fit DFlash"),
        ({"is_dspark": True, "inner": {"markov_rank": 2}}, "the files do not fit DSpark"),
        ({"is_dspark": True, "inner": {"markov_rank": -2}}, "markov_rank: expected a positive"),
        ({"is_dspark": True, "inner": {"markov_head_type": "rnn"}}, "expected 'vanilla'"),
    ],
)
def test_a_damaged_config_ends_in_a_sentence(served, drafters, changes, message):
    with pytest.raises(CheckpointError, match=message):
        inspect(drafters(**changes), served)


def test_random_damage_never_raises_anything_else(served, drafters, tmp_path):
    whole = drafters(is_dspark=True)
    assert damage_at_random(whole, tmp_path / "damaged", served) > 5


def test_a_model_whose_head_cannot_be_read_alone_is_refused(served, drafters, monkeypatch):
    monkeypatch.setattr("cenacle.engine.speculative.draft_model.find_head", lambda _: None)
    with pytest.raises(InputError, match="output head: expected one that can be read alone"):
        inspect(drafters(), served)
