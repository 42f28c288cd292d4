"""EAGLE-3 drafters: what they compute, that they change no answer, which are
refused. One process; on two nodes: tests/ranks/test_drafters.py.

The reference is mlx-vlm's drafter with the same weights and hidden states.
"""

import json
import random
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from test_group_drafts import answer, require_same
from typer.testing import CliRunner

from cenacle import InputError
from cenacle.cli.main import make_app
from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling
from cenacle.engine.speculative.draft_model import DraftModelConfig, load_drafter
from cenacle.engine.speculative.mtp import HiddenStates, MtpProposer
from cenacle.errors import CenacleError, CheckpointError
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.drafter_config import find_form
from cenacle.model.expert_parallel import parallelize
from cenacle.model.loader import load_rank_model
from cenacle.model.mtp import record_layer_outputs
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.step_timer import StepTimer
from support.drafter_checkpoint import OncePerOptions, write_eagle3, write_served
from support.drafts import generate_alone

LAYERS, WIDTH, VOCAB_SIZE = (0, 1, 2), 64, 512
PROMPT = (5, 80, 200, 17, 9)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Checkpoint.open(write_served(tmp_path_factory.mktemp("drafters") / "served"))


@pytest.fixture(scope="module")
def drafters(tmp_path_factory, served):
    """By arguments of `write_eagle3`, made when first asked for."""
    return OncePerOptions(write_eagle3, tmp_path_factory.mktemp("drafters"), served.folder, LAYERS)


def inspect(folder, served, **options):
    keywords = {"speculative": "auto", "plain_kv_cache": True} | options
    return DraftModelConfig.inspect(str(folder), served, None, "auto", **keywords)


def load(served):
    spec = read_model_spec(served)
    plan = Plan.whole(spec, 1)
    model = load_rank_model(served, plan, 0, lambda *_: None)
    parallelize(model, spec.family, plan, SingleRank(), StepTimer(), "auto")
    return model


def make_proposer(folder, served, model, kernels="auto"):
    states = HiddenStates()
    head = load_drafter(Checkpoint.open(folder), served, model, kernels)
    return MtpProposer(SingleRank(), head, states, VOCAB_SIZE)


@pytest.mark.parametrize("kernels", ["mlx", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "speculators", "known": 3},
        {"layout": "speculators", "known": 3, "norm_before_residual": True},
        {"layout": "speculators"},
        {"layout": "sglang", "known": 2, "own_embedding": True},
    ],
)
def test_it_drafts_what_mlx_vlm_drafts(served, drafters, options, kernels):
    """Over two rounds, the second after a part of the first was accepted."""
    eagle3 = pytest.importorskip("mlx_vlm.speculative.drafters.eagle3", reason="needs mlx-vlm")
    folder = drafters(**options)
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("transformer_layer_config", dict(config))
    config["model_type"] = "eagle3"
    reference = eagle3.Model(eagle3.ModelConfig.from_dict(config))
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    tensors = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
    reference.load_weights(list(reference.sanitize(tensors).items()))
    reference._cache = reference.make_cache()

    text, count = [*PROMPT, 33], 4
    seen = mx.random.normal((1, len(PROMPT), 3 * WIDTH), key=mx.random.key(1))
    reference.prefill_from_target_hidden(mx.array([PROMPT]), seen, 33, None, greedy=True)
    first = reference.draft_block(33, seen, None, count + 1, None, greedy=True)
    verified = mx.random.normal((1, count + 1, 3 * WIDTH), key=mx.random.key(2))
    reference.accept_verified_tokens(verified, first, 2, [0, 0, 77], None, greedy=True)
    logits = reference._logits(reference._seed_hidden)[0, -1]
    second = reference.draft_block(77, verified, None, count + 1, None, greedy=True)

    proposer = make_proposer(folder, served, load_rank_model_of(served), kernels)
    expected = []

    def sample(logprobs, position):
        expected.append(logprobs)
        return mx.argmax(logprobs, axis=-1)

    proposer.reset(text)
    with proposer.recording():
        proposer.states.record(seen)
    drafted = proposer.propose([], count, sample, 0)
    assert drafted == first[0].tolist()
    with proposer.recording():
        proposer.states.record(verified)
    proposer.drop_states(count + 1 - 3)
    proposer.truncate(len(text) + 2)
    expected.clear()
    assert proposer.propose([77], count, sample, 2) == second[0].tolist()
    known = mx.arange(0, VOCAB_SIZE, options.get("known", 1))
    logprobs = logits - mx.logsumexp(logits)
    assert mx.allclose(expected[0][0, known], logprobs, atol=1e-3)
    assert len(set(drafted)) > 1


def load_rank_model_of(served):
    """The served model, whose embedding is read."""
    return load_rank_model(served, Plan.whole(read_model_spec(served), 1), 0, lambda *_: None)


def test_what_is_recorded_is_what_its_layers_give(served):
    model, passes = load_rank_model_of(served), []
    states = model.model.embed_tokens(mx.array([PROMPT]))
    expected = []
    for layer in model.layers:
        mask = mx.tril(mx.ones((len(PROMPT), len(PROMPT)), dtype=mx.bool_))
        states = layer(states, mask, None)
        expected.append(states)
    record_layer_outputs(model, (0, 2), passes.append)
    for _ in range(2):
        model(mx.array([PROMPT]), cache=make_prompt_cache(model))
    assert len(passes) == 2
    wanted = mx.concatenate([expected[0], expected[2]], axis=-1)
    assert mx.allclose(passes[1], wanted, atol=1e-4)


def generate(served, drafter, limit=25, **sampling):
    """Tokens of a request that runs alone, and the drafts.

    Args:
        drafter: a folder; None: no drafts.
    """
    model, proposer = load(served), None
    if drafter is not None:
        proposer = make_proposer(drafter, served, model)
        layers = inspect(drafter, served).layers
        record_layer_outputs(model, layers, proposer.states.record)
    return generate_alone(model, proposer, PROMPT, limit, **sampling)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 0.8, "presence_penalty": 0.5}]
)
def test_answers_are_the_same_with_and_without_it(served, drafters, sampling):
    plain = generate(served, None, **sampling)[0]
    for layout, known, share in (("sglang", None, 0.3), ("speculators", 2, 0.0)):
        trained = drafters(skill="trained", layout=layout, known=known)
        tokens, drafts = generate(served, trained, **sampling)
        assert tokens == plain
        assert drafts.by_model_accepted > share * drafts.by_model  # a half is not known
    tokens, drafts = generate(served, drafters(known=2), **sampling)
    assert tokens == plain
    assert drafts.by_model > drafts.by_model_accepted


def test_weights_that_are_no_numbers_change_no_answer(served, drafters, tmp_path):
    file = shutil.copytree(drafters(), tmp_path / "nan") / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    tensors["fc.weight"] = mx.full(tensors["fc.weight"].shape, mx.nan)
    mx.save_safetensors(str(file), tensors)
    for sampling in ({}, {"temperature": 1.0}):
        tokens = generate(served, file.parent, 15, **sampling)[0]
        assert tokens == generate(served, None, 15, **sampling)[0]


def test_it_is_known_before_loading(served, drafters):
    folder = drafters(known=2)
    draft = inspect(folder, served)
    assert (draft.form, draft.layers, draft.mtp) == ("EAGLE-3", LAYERS, False)
    head = load_drafter(Checkpoint.open(folder), served, load_rank_model_of(served), "mlx")
    parameters = tree_flatten(head.model.parameters())
    assert draft.weight_bytes == sum(a.nbytes for _, a in parameters)
    assert draft.cache_bytes > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 500}, "expected 512 token ids, got 500"),
        ({"target_hidden_size": 128}, "expected hidden states of 64, got 128"),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
            r"expected numbers of layers from 1 to 3, got \[1, 2, 4\]",
        ),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 3]},
            r"fc.weight for 2 hidden states of 64, \[..., 128\], got \[64, 192\]",
        ),
        ({"eagle_config": {}}, "eagle_aux_hidden_state_layer_ids for so few layers, got none"),
        ({"hidden_size": 128}, "an embedding of its own or a hidden_size of 64, got 128"),
    ],
)
def test_a_drafter_of_another_model_is_refused(served, drafters, changes, message):
    with pytest.raises(InputError, match=rf"cannot draft for served: .*{message}; use the drafter"):
        inspect(drafters(**changes), served)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_vocab_size": 100}, "expected a tensor d2t, since its 100 token ids are not"),
        ({"draft_vocab_size": -1}, "draft_vocab_size: expected a positive integer, got -1"),
        ({"vocab_size": "many"}, "vocab_size: expected a positive integer, got 'many'"),
        ({"num_hidden_layers": 900}, "expected at most 64|cannot hold so many"),
        ({"num_attention_heads": 5}, "the files do not fit EAGLE-3"),
        ({"hidden_act": "relu"}, "hidden_act: expected silu"),
        ({"rope_theta": "x"}, "rope_theta: expected a positive number, got 'x'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: expected a positive number, got -1"),
        ({"intermediate_size": [1]}, "the files do not fit EAGLE-3"),
        ({"eagle_aux_hidden_state_layer_ids": "123"}, "expected numbers of different layers"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}, "expected numbers of different layers"),
        ({"eagle_aux_hidden_state_layer_ids": [1.0, 2, 3]}, "expected numbers of different"),
    ],
)
def test_a_damaged_config_ends_in_a_sentence(served, drafters, changes, message):
    with pytest.raises(CheckpointError, match=message):
        inspect(drafters(**changes), served)


def test_damaged_tensors_end_in_a_sentence(served, drafters, tmp_path):
    whole = drafters(known=2)
    tensors = dict(mx.load(str(whole / "model.safetensors")))
    cases = (
        ("d2t", tensors["d2t"] + 300, "d2t: expected token ids from 0 to 511, got 5"),
        ("d2t", tensors["d2t"].astype(mx.float32) * mx.nan, "d2t: expected integers, got "),
        ("d2t", tensors["d2t"][:9], "the files do not fit EAGLE-3: .*d2t"),
        ("midlayer.hidden_norm.weight", None, "Missing 1 parameters: layers.0.hidden_norm.weight"),
        ("lm_head.weight", None, "Missing 1 parameters: lm_head.weight"),
        ("midlayer.self_attn.q_norm.weight", mx.ones(16), "1 parameters not in model"),
    )
    folder = shutil.copytree(whole, tmp_path / "damaged")
    for name, tensor, message in cases:
        changed = {n: t for n, t in ({**tensors, name: tensor}).items() if t is not None}
        mx.save_safetensors(str(folder / "model.safetensors"), changed)
        with pytest.raises(CheckpointError, match=message):
            inspect(folder, served)


def damage_at_random(whole, folder, served, turns=25):
    """Inspect copies with some other bytes in the config or in the header; how many are refused."""
    rng, refused = random.Random(5), 0
    shutil.copytree(whole, folder)
    for turn in range(turns):
        name = ("config.json", "model.safetensors")[turn % 2]
        content = bytearray((whole / name).read_bytes())
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(min(len(content), 2500))] = rng.choice(b'0129[]{}",:-eN\xff')
        (folder / name).write_bytes(content)
        try:
            inspect(folder, served)
        except CenacleError:
            refused += 1
        shutil.copy(whole / name, folder)
    return refused


def test_random_damage_never_raises_anything_else(served, drafters, tmp_path):
    assert damage_at_random(drafters(known=2), tmp_path / "damaged", served) > 5


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, "EAGLE-3"),
        ({"architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3"}, "EAGLE-3"),
        ({"architectures": ["EagleLlamaForCausalLM"]}, "EAGLE"),
        ({"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}, "DFlash"),
        ({"architectures": ["Qwen3DSparkModel"], "dflash_config": {}}, "DSpark"),
        ({"model_type": "gemma4_dspark"}, "DSpark"),
        ({"model_type": "llama", "dflash_config": {}}, "DFlash"),
        ({"architectures": ["MedusaModel"]}, "Medusa"),
        ({"model_type": "qwen3_5_mtp"}, "multi-token prediction layer"),
        ({"model_type": "gemma4_assistant"}, "assistant"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, None),
        ({"architectures": 7, "model_type": ["eagle3"]}, None),
        ({"architectures": [None, {}]}, None),
    ],
)
def test_forms_are_recognized(config, form):
    assert find_form(config) == form


def test_other_forms_are_refused_with_what_is_supported(served, drafters):
    folder = drafters(architectures=["MedusaModel"])
    expected = (
        r"a drafter of the form Medusa, which is not supported; expected an ordinary .*EAGLE-3, D"
    )
    with pytest.raises(InputError, match=expected):
        inspect(folder, served)
    with pytest.raises(InputError, match="that can drop its last tokens"):
        inspect(drafters(), served, plain_kv_cache=False)
    with pytest.raises(InputError, match="--speculative auto or always"):
        inspect(drafters(), served, speculative="off")


def test_it_drafts_for_several_requests_at_once(served, drafters):
    """Of different lengths, so that rows of a pass are padded."""
    requests = [
        Request(f"r{i}", prompt, 24 - 5 * i, (), Sampling(seed=i, temperature=0.4 * i))
        for i, prompt in enumerate(((5, 80, 200, 17, 9), (7, 3), (1, 2, 3, 4, 5, 6)))
    ]
    results = []
    for mode in ("off", "always"):
        model, proposer = load(served), None
        if mode == "always":
            proposer = make_proposer(drafters(skill="trained"), served, model)
            record_layer_outputs(model, LAYERS, proposer.states.record)
        results.append(answer(model, requests, mode, proposer))
    require_same(results[1][0], results[0][0])
    drafts = results[1][1]
    assert drafts.by_model_accepted > 0.6 * drafts.by_model > 0
    assert results[1][2] < results[0][2] / 2


def test_inspect_names_it_and_says_why_it_does_not_fit(served, drafters):
    arguments = ["inspect", "-m", str(served.folder), "--draft-model"]
    folder = drafters(known=2)
    result = CliRunner().invoke(make_app(), [*arguments, str(folder)], catch_exceptions=False)
    assert f"EAGLE-3 drafter {folder.name} of " in result.output
    assert "reads layers 0, 1, 2 of the model" in result.output
    other = str(drafters(vocab_size=500))
    with pytest.raises(InputError, match="expected 512 token ids, got 500"):
        CliRunner().invoke(make_app(), [*arguments, other], catch_exceptions=False)
    with pytest.raises(CheckpointError, match=r"a drafter \(EAGLE-3\); .*--draft-model"):
        read_model_spec(Checkpoint.open(folder))
