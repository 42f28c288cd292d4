"""A draft model changes nothing but the time: one process, against plain decoding and against a
slow drafter without any cache; which models may draft for which."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from test_speculation import WORDS, Chain, answer

import cenacle
from cenacle import InputError
from cenacle.collective.single import SingleRank as OneRank
from cenacle.engine.options import EngineOptions
from cenacle.engine.speculative import draft_model
from cenacle.engine.speculative.draft_model import NEAR, DraftModelConfig, DraftModelProposer
from cenacle.engine.speculative.ngram import NgramProposer
from cenacle.model.checkpoint import Checkpoint
from cenacle.text.tokenizer import ChatTokenizer

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
MIXTRAL = Path(__file__).parent.parent / "vectors" / "mixtral"


def chain(sharp=2.0, key=3):
    """Another key: a model that thinks otherwise."""
    model = Chain(sharp)
    model.table = sharp * mx.random.normal((WORDS, WORDS), key=mx.random.key(key))
    return model


def drafter(model, context=None):
    return DraftModelProposer(DraftModelConfig("", WORDS, context, 0, 0), OneRank(), model, WORDS)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    ],
)
@pytest.mark.parametrize("small", [3, 9])
def test_the_same_answer_with_a_draft_model_and_without(how, small):
    for seed in range(3):
        plain = answer("off", seed=seed, sharp=2.0, tokens=(0, 1), **how)[0]
        for way in ("always", "auto"):
            got, drafts, _ = answer(
                way, seed=seed, sharp=2.0, tokens=(0, 1), drafter=drafter(chain(key=small)), **how
            )
            assert [(e.token, e.finish) for e in got] == [(e.token, e.finish) for e in plain]
            for a, b in zip(got, plain, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            if way == "always":
                assert drafts.drafted >= drafts.by_model > 0


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_the_model_itself_is_always_right(how):
    """Also where it draws: drafts are drawn with the same random numbers."""
    got, drafts, steps = answer("always", sharp=2.0, tokens=(0, 1), drafter=drafter(chain()), **how)
    assert len(got) == 40
    assert drafts.by_model == drafts.by_model_accepted > 0
    assert steps < 15


@pytest.mark.parametrize("limit", range(1, 12))
def test_max_tokens_and_stop_tokens_inside_a_draft(limit):
    plain = answer("off", sharp=2.0, limit=limit, tokens=(0, 1))[0]
    got = answer("always", sharp=2.0, limit=limit, tokens=(0, 1), drafter=drafter(chain()))[0]
    assert [(e.token, e.finish) for e in got] == [(e.token, e.finish) for e in plain]
    stop = (plain[-1].token,)
    plain = answer("off", sharp=2.0, tokens=(0, 1), stop=stop)[0]
    got = answer("always", sharp=2.0, tokens=(0, 1), stop=stop, drafter=drafter(chain()))[0]
    assert [(e.token, e.finish) for e in got] == [(e.token, e.finish) for e in plain]


def greedy(logprobs, position):
    return mx.argmax(logprobs, axis=-1)


def slow(model, text, count):
    """What `Drafter` must draft: the whole text again for each token."""
    text = list(text)
    for _ in range(count):
        logits = model(mx.array([text]), cache=model.make_cache())[0, -1]
        text.append(int(mx.argmax(logits)))
    return text[-count:]


def test_its_cache_is_the_text_and_nothing_else():
    model = chain(key=5)
    small = drafter(model)
    text = [0, 3, 1, 4]
    small.begin(text)
    for accepted in (0, 3, 1, 4, 0, 2):
        fresh = text[small.length :]
        drafted = small.draft(fresh, 4, greedy, 0)
        assert drafted == slow(model, text, 4)
        before = len(text)
        text += [*drafted[:accepted], (drafted[min(accepted, 3)] + 1) % WORDS]
        small.forget(before + accepted)
        assert small.length == before + min(accepted, 3)
    small.begin([*text[:6], 0 if text[6] else 1, 2])  # a text that begins alike
    assert small.length == 6
    small.read([2, 2, 2])
    assert small.draft([1], 3, greedy, 0) == slow(model, [*text[:6], 2, 2, 2, 1], 3)


def test_a_long_prompt_is_read_in_pieces_beside_the_answer(monkeypatch):
    monkeypatch.setattr(
        NgramProposer, "hopeful", False
    )  # with six words everything was said before
    prompt = tuple(int(i) for i in mx.random.randint(0, WORDS, (300,), key=mx.random.key(8)))
    plain = answer("off", sharp=2.0, tokens=prompt, temperature=1.0)[0]
    small = drafter(chain())
    got, drafts, _ = answer("always", sharp=2.0, tokens=prompt, temperature=1.0, drafter=small)
    assert [e.token for e in got] == [e.token for e in plain]
    assert drafts.by_model_accepted > 0
    assert small.length > len(prompt) > 4 * NEAR


def test_texts_beyond_its_context_are_not_drafted_for():
    small = drafter(chain(), context=20)
    got, drafts, _ = answer("always", sharp=2.0, tokens=(0, 1), drafter=small)
    assert [e.token for e in got] == [e.token for e in answer("off", sharp=2.0, tokens=(0, 1))[0]]
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


def check(draft, model=DEMO, options=None):
    checkpoint = Checkpoint.open(model)
    text = ChatTokenizer(model, checkpoint.config) if model == DEMO else None
    options = options or EngineOptions()
    return DraftModelConfig.check(
        str(draft),
        checkpoint,
        text,
        "auto",
        options.speculative,
        plain_kv_cache=options.plain_kv_cache,
    )


@pytest.mark.parametrize("kernels", ["mlx", "auto"])
def test_any_model_is_loaded_whole_and_computes_as_mlx_lm_does(tmp_path, kernels):
    tokens = mx.array([[5, 80, 200, 17, 9]])
    folders = [make_dense(tmp_path / kind, kind) for kind in ("llama", "qwen2", "qwen3")]
    for folder in (*folders, DEMO):
        want = load_model(folder)[0](tokens)
        mx.eval(want)
        model = draft_model.load(Checkpoint.open(folder), kernels)
        assert mx.allclose(model(tokens, cache=make_prompt_cache(model)), want, atol=1e-3)


def test_what_a_draft_model_takes_is_known_before(dense):
    what = check(dense)
    model = load_model(dense)[0]
    assert what.weights == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    # Two layers, keys and values, two heads of 16, float32 or two bytes, 256 positions.
    assert what.cache in (2 * 2 * 2 * 16 * 4 * 256, 2 * 2 * 2 * 16 * 2 * 256)
    assert (what.vocabulary, what.context) == (384, 256)


def test_models_that_cannot_draft_are_refused(dense, tmp_path):
    assert check(MIXTRAL, MIXTRAL).vocabulary == 256  # without a tokenizer: as many ids
    with pytest.raises(InputError, match="expected 256 token ids, it has 384"):
        check(dense, MIXTRAL)
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    words = json.loads((other / "tokenizer.json").read_text())
    first, second = list(words["model"]["vocab"])[40:42]
    vocabulary = words["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match=r"the same tokenizer, but 2 of its \d+ tokens are others"):
        check(other)
    with pytest.raises(InputError, match="expected --speculative auto or always"):
        check(dense, options=EngineOptions(speculative="off"))
    with pytest.raises(InputError, match="must be able to forget tokens"):
        check(dense, options=EngineOptions(max_kv_size=64))
