"""A draft model changes nothing but the time: one process, against plain decoding and against a
slow proposer without a cache; which models can draft for which."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from test_speculative_decoder import VOCAB_SIZE, Chain, generate

import cenacle
from cenacle import InputError
from cenacle.collective.single import SingleRank
from cenacle.engine.options import EngineOptions
from cenacle.engine.speculative.draft_model import (
    MAX_UNREAD_TOKENS,
    DraftModelConfig,
    DraftModelProposer,
    load_draft_model,
)
from cenacle.engine.speculative.ngram import NgramProposer
from cenacle.errors import CheckpointError
from cenacle.model.checkpoint import Checkpoint, locate_checkpoint
from cenacle.model.spec_reader import read_model_spec
from cenacle.text.tokenizer import ChatTokenizer
from support.dense_llama import dense_llama
from support.moe_gguf import write_moe
from support.tiny_gguf import HEADS, HIDDEN, KV_HEADS, LAYERS, WIDTH, write_dense, write_llama

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
MIXTRAL = Path(__file__).parent.parent / "vectors" / "mixtral"


def chain(sharp=2.0, key=3):
    """Another key gives another model."""
    model = Chain(sharp)
    model.table = sharp * mx.random.normal((VOCAB_SIZE, VOCAB_SIZE), key=mx.random.key(key))
    return model


def make_proposer(model, context=None):
    return DraftModelProposer(
        DraftModelConfig("", VOCAB_SIZE, context, 0, 0), SingleRank(), model, VOCAB_SIZE
    )


@pytest.mark.parametrize(
    "sampling_options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    ],
)
def test_the_output_is_the_same_with_and_without_a_draft_model(sampling_options):
    for seed in range(2):
        plain = generate("off", seed=seed, sharp=2.0, tokens=(0, 1), **sampling_options)[0]
        # Right drafts and wrong ones: each always with one seed, and when it pays with the other.
        for small, mode in ((3, ("always", "auto")[seed]), (9, ("auto", "always")[seed])):
            got, drafts, _ = generate(
                mode,
                seed=seed,
                sharp=2.0,
                tokens=(0, 1),
                draft_model=make_proposer(chain(key=small)),
                **sampling_options,
            )
            assert [(e.token, e.finish) for e in got] == [(e.token, e.finish) for e in plain]
            for a, b in zip(got, plain, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            if mode == "always":
                assert drafts.drafted >= drafts.by_model > 0


@pytest.mark.parametrize("sampling_options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_model_that_drafts_for_itself_is_always_accepted(sampling_options):
    """Also with sampling: drafts use the same random numbers."""
    got, drafts, steps = generate(
        "always", sharp=2.0, tokens=(0, 1), draft_model=make_proposer(chain()), **sampling_options
    )
    assert len(got) == 40
    assert drafts.by_model == drafts.by_model_accepted > 0
    assert steps < 15


LIMITS = range(1, 12)


@pytest.fixture(scope="module")
def longest():
    """Without drafts; limits and stop tokens only end it sooner."""
    return [e.token for e in generate("off", sharp=2.0, limit=LIMITS[-1], tokens=(0, 1))[0]]


@pytest.mark.parametrize("limit", LIMITS)
def test_max_tokens_inside_a_draft(longest, limit):
    got = generate(
        "always", sharp=2.0, limit=limit, tokens=(0, 1), draft_model=make_proposer(chain())
    )[0]
    assert [e.token for e in got] == longest[:limit]
    assert [e.finish for e in got] == [None] * (limit - 1) + ["length"]


def test_a_stop_token_inside_a_draft(longest):
    for stop in set(longest):
        got = generate(
            "always", sharp=2.0, tokens=(0, 1), stop=(stop,), draft_model=make_proposer(chain())
        )[0]
        assert [e.token for e in got] == longest[: longest.index(stop) + 1]
        assert [e.finish for e in got] == [None] * longest.index(stop) + ["stop"]


def greedy(logprobs, position):
    return mx.argmax(logprobs, axis=-1)


def reference_proposal(model, text, count):
    """What `DraftModelProposer` must propose: the whole text again for each token."""
    text = list(text)
    for _ in range(count):
        logits = model(mx.array([text]), cache=model.make_cache())[0, -1]
        text.append(int(mx.argmax(logits)))
    return text[-count:]


def test_its_cache_holds_exactly_the_text():
    model = chain(key=5)
    small = make_proposer(model)
    text = [0, 3, 1, 4]
    small.reset(text)
    for accepted in (0, 3, 1, 4, 0, 2):
        unread = text[small.length :]
        drafted = small.propose(unread, 4, greedy, 0)
        assert drafted == reference_proposal(model, text, 4)
        before = len(text)
        text += [*drafted[:accepted], (drafted[min(accepted, 3)] + 1) % VOCAB_SIZE]
        small.truncate(before + accepted)
        assert small.length == before + min(accepted, 3)
    small.reset([*text[:6], 0 if text[6] else 1, 2])  # a text with a common prefix
    assert small.length == 6
    small.read([2, 2, 2])
    assert small.propose([1], 3, greedy, 0) == reference_proposal(model, [*text[:6], 2, 2, 2, 1], 3)


def test_a_long_prompt_is_read_in_pieces_beside_decoding(monkeypatch):
    # With six tokens every n-gram has occurred before.
    monkeypatch.setattr(NgramProposer, "has_proposal", False)
    prompt = tuple(int(i) for i in mx.random.randint(0, VOCAB_SIZE, (300,), key=mx.random.key(8)))
    plain = generate("off", sharp=2.0, tokens=prompt, temperature=1.0)[0]
    small = make_proposer(chain())
    got, drafts, _ = generate(
        "always", sharp=2.0, tokens=prompt, temperature=1.0, draft_model=small
    )
    assert [e.token for e in got] == [e.token for e in plain]
    assert drafts.by_model_accepted > 0
    assert small.length > len(prompt) > 4 * MAX_UNREAD_TOKENS


def test_texts_beyond_its_context_length_get_no_drafts():
    small = make_proposer(chain(), context=20)
    got, drafts, _ = generate("always", sharp=2.0, tokens=(0, 1), draft_model=small)
    assert [e.token for e in got] == [e.token for e in generate("off", sharp=2.0, tokens=(0, 1))[0]]
    assert 0 < drafts.by_model <= 20
    assert small.length <= 20


# Real checkpoints


def make_dense(folder, kind="llama") -> Path:
    """A small dense model of random weights with the demo's tokenizer."""
    folder.mkdir()
    config = {
        "model_type": kind,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": 384,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(7)
    family = import_module(f"mlx_lm.models.{kind}")
    model = family.Model(family.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense") / "llama")


def inspect(draft, model=DEMO, options=None):
    checkpoint = Checkpoint.open(model)
    tokenizer = ChatTokenizer(model, checkpoint.config) if model == DEMO else None
    options = options or EngineOptions()
    return DraftModelConfig.inspect(
        str(draft),
        checkpoint,
        tokenizer,
        "auto",
        options.speculative,
        plain_kv_cache=options.plain_kv_cache,
    )


@pytest.mark.parametrize("kernels", ["mlx", "auto"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_draft_model_may_be_a_gguf_file(tmp_path, monkeypatch, kind, kernels):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path / "home"))
    file, tokens = tmp_path / f"{kind}.gguf", mx.array([[5, 80, 200, 17, 9]])
    if kind == "llama":
        shape = SimpleNamespace(width=WIDTH, layers=LAYERS, hidden=HIDDEN, heads=HEADS)
        shape.kv_heads, shape.norm_eps, shape.rope_base = KV_HEADS, 1e-5, 10000.0
        expected = dense_llama(write_llama(file, "Q4_1"), shape)(tokens)
    else:
        expected = write_dense(file, kind)(tokens)
    write_moe(tmp_path, "qwen3_moe")
    served = Checkpoint.open(locate_checkpoint(str(tmp_path / "model.gguf")))
    tokenizer = ChatTokenizer(served.folder, served.config)
    draft = DraftModelConfig.inspect(
        str(file), served, tokenizer, kernels, "auto", plain_kv_cache=True
    )
    model = load_draft_model(Checkpoint.open(Path(draft.folder)), kernels)
    assert draft.weight_bytes == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    got = model(tokens, cache=make_prompt_cache(model))
    assert mx.abs(got - expected).max() < 1e-3 * mx.abs(expected).max()
    with pytest.raises(CheckpointError, match="has no experts to distribute"):
        read_model_spec(Checkpoint.open(locate_checkpoint(str(file))))


@pytest.mark.parametrize("kernels", ["mlx", "auto"])
def test_a_draft_model_computes_what_mlx_lm_computes(tmp_path, kernels):
    tokens = mx.array([[5, 80, 200, 17, 9]])
    folders = [make_dense(tmp_path / kind, kind) for kind in ("llama", "qwen2", "qwen3")]
    for folder in (*folders, DEMO):
        expected = load_model(folder)[0](tokens)
        mx.eval(expected)
        model = load_draft_model(Checkpoint.open(folder), kernels)
        assert mx.allclose(model(tokens, cache=make_prompt_cache(model)), expected, atol=1e-3)


def test_the_memory_of_a_draft_model_is_known_before_loading(dense):
    config = inspect(dense)
    model = load_model(dense)[0]
    assert config.weight_bytes == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    # Two layers, keys and values, two heads of 16, float32 or two bytes, 256 positions.
    assert config.cache_bytes in (2 * 2 * 2 * 16 * 4 * 256, 2 * 2 * 2 * 16 * 2 * 256)
    assert (config.vocab_size, config.context_length) == (384, 256)


def test_models_that_cannot_draft_are_refused(dense, tmp_path):
    assert inspect(MIXTRAL, MIXTRAL).vocab_size == 256  # without a tokenizer
    with pytest.raises(InputError, match="expected 256 token ids, it has 384"):
        inspect(dense, MIXTRAL)
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    first, second = list(tokenizer["model"]["vocab"])[40:42]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"the same tokenizer, but 2 of its \d+ tokens differ"):
        inspect(other)
    with pytest.raises(InputError, match="expected --speculative auto or always"):
        inspect(dense, options=EngineOptions(speculative="off"))
    with pytest.raises(InputError, match="that can drop its last tokens, and it cannot"):
        inspect(dense, options=EngineOptions(max_kv_size=64))
