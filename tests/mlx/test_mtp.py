"""A checkpoint's own drafting layer: what it computes, what it costs, that it changes nothing.

The reference is the family's layer of mlx-lm over the whole text, without caches; for some families
mlx-vlm's drafter (test_mtp_zoo.py). On two nodes: tests/ranks/test_mtp_layers.py.
"""

import contextlib
import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from test_mtp_zoo import FAMILIES as ZOO_FAMILIES

from cenacle.collective.single import SingleRank
from cenacle.core.model_config import text_config
from cenacle.core.plan import Plan
from cenacle.engine.speculative.draft_model import DraftModelConfig, load_mtp
from cenacle.engine.speculative.mtp import HiddenStates, MtpProposer
from cenacle.errors import CheckpointError
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.expert_parallel import parallelize
from cenacle.model.loader import load_rank_model
from cenacle.model.mtp import (
    MTP_FAMILIES,
    describe_unused,
    has_mtp,
    language_model,
    record_hidden_states,
)
from cenacle.model.slicing import ModelLayout
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.step_timer import StepTimer
from support.drafts import generate_alone
from support.mtp_checkpoint import publish_qwen, write_mtp
from support.quantized_formats import FORMATS, write_safetensors

PROMPT = (5, 80, 200, 17, 9)
LIMIT = 24
SAMPLINGS = ({}, {"temperature": 1.0}, {"temperature": 0.8, "presence_penalty": 0.5})
QWEN_FAMILIES = ("qwen3_5_moe", "qwen3_next")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By family and skill, made when first asked for."""
    made = {}

    def get(family, skill="trained"):
        if (family, skill) not in made:
            folder = tmp_path_factory.mktemp("mtp") / f"{family}-{skill}"
            made[family, skill] = Checkpoint.open(write_mtp(folder, family, skill))
        return made[family, skill]

    return get


def load(checkpoint):
    spec = read_model_spec(checkpoint)
    plan = Plan.whole(spec, 1)
    model = load_rank_model(checkpoint, plan, 0, lambda *_: None)
    parallelize(model, spec.family, plan, SingleRank(), StepTimer(), "auto")
    return model


def make_drafter(checkpoint, model):
    states = HiddenStates()
    record_hidden_states(model, states.record)
    vocab_size = text_config(checkpoint.config)["vocab_size"]
    return MtpProposer(SingleRank(), load_mtp(checkpoint, "auto"), states, vocab_size)


@pytest.mark.parametrize("family", MTP_FAMILIES)
def test_answers_are_the_same_with_and_without_it(checkpoints, family):
    checkpoint = checkpoints(family)
    model = load(checkpoint)
    # The others sample in test_group_drafts.py.
    samplings = SAMPLINGS[: 1 if family in ZOO_FAMILIES else None]
    plain = [generate_alone(model, None, PROMPT, LIMIT, **sampling)[0] for sampling in samplings]
    drafter = make_drafter(checkpoint, model)
    for sampling, expected in zip(samplings, plain, strict=True):
        tokens, drafts = generate_alone(model, drafter, PROMPT, LIMIT, **sampling)
        assert tokens == expected
        assert drafts.by_model_accepted > 0.1 * drafts.by_model > 0


def test_it_reads_the_hidden_state_of_the_token_before(checkpoints, monkeypatch):
    """Also after drafts of which a part was kept."""
    checkpoint = checkpoints("glm4_moe")
    model, differences, draft = load(checkpoint), [], MtpProposer._draft

    def check(self, *arguments):
        expected = model.model(mx.array([self._text[:-1]]))[0, -1]
        differences.append(float(mx.abs(self.states.last(1)[0] - expected).max()))
        return draft(self, *arguments)

    monkeypatch.setattr(MtpProposer, "_draft", check)
    drafter = make_drafter(checkpoint, served := load(checkpoint))
    _, drafts = generate_alone(served, drafter, PROMPT, 30, temperature=1.0)
    assert 0 < drafts.by_model_accepted < drafts.by_model
    assert max(differences) < 1e-2


def reference(checkpoint, family, ids, hidden):
    """States and logits by mlx-lm's layer over the whole text."""
    tensors = dict(mx.load(str(checkpoint.files[0])))
    model, _ = load_model(
        checkpoint.folder, lazy=True, strict=False, model_config=checkpoint.config
    )
    layers, text = len(model.layers), language_model(model)
    is_qwen = family.startswith("qwen")
    prefix = "mtp." if is_qwen else f"model.layers.{layers}."
    embedding = "word_embeddings" if family == "bailing_moe" else "embed_tokens"
    names = {"qwen": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")}.get(
        family[:4], ("enorm", "hnorm", "eh_proj", "final_layernorm")
    )
    final = f"{prefix}shared_head.norm.weight"
    first_norm, second_norm, join, last_norm = (f"{prefix}{name}.weight" for name in names)
    last_norm = final if final in tensors else last_norm
    # The last layer is of the kind that drafts.
    layer = type(model.layers[-1])(text.args, layers - 1)
    inside = f"{prefix}layers.0." if is_qwen else prefix
    sanitized = {n: t for n, t in tensors.items() if n.startswith(inside)}
    layer.load_weights([(n.removeprefix(inside), t) for n, t in sanitized.items()], strict=False)

    def norm(x, name):
        return mx.fast.rms_norm(x, tensors[name], 1e-6)

    embedded = model.model[embedding](ids)
    joined = mx.concatenate([norm(embedded, first_norm), norm(hidden, second_norm)], axis=-1)
    mask = mx.tril(mx.ones((ids.shape[1], ids.shape[1]), dtype=mx.bool_))
    states = norm(layer(joined @ tensors[join].T, mask, None), last_norm)
    return states, text.lm_head(states[:, -1])


@pytest.mark.parametrize("family", [f for f in MTP_FAMILIES if f not in ZOO_FAMILIES])
def test_the_layer_computes_what_mlx_lm_computes(checkpoints, family):
    """Read token by token with a cache, against mlx-lm's layer over the whole text."""
    checkpoint = checkpoints(family, "random")
    ids = mx.array([PROMPT])
    width = text_config(checkpoint.config)["hidden_size"]
    hidden = mx.random.normal((1, len(PROMPT), width), key=mx.random.key(1))
    expected, logits = reference(checkpoint, family, ids, hidden)
    head = load_mtp(checkpoint, "auto")
    caches = make_prompt_cache(head.model)
    states = []
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        got, state = head(ids[:, part], hidden[:, part], caches)
        states.append(state)
    assert mx.allclose(mx.concatenate(states, axis=1), expected, atol=2e-3)
    assert mx.allclose(got, logits, atol=2e-2)


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_a_published_layout_gives_the_same_layer(checkpoints, tmp_path, family):
    """Norms less 1, single or fused experts."""
    written = checkpoints(family, "random")
    shutil.copytree(written.folder, tmp_path, dirs_exist_ok=True)
    published = Checkpoint.open(publish_qwen(tmp_path))
    hidden = mx.random.normal((1, len(PROMPT), 64), key=mx.random.key(2))
    results = []
    for checkpoint in (written, published):
        head = load_mtp(checkpoint, "mlx")
        results.append(head(mx.array([PROMPT]), hidden, make_prompt_cache(head.model))[0])
    assert mx.array_equal(*results)
    assert mx.max(mx.abs(results[0])).item() > 0.1


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_a_layer_in_fp8_is_read(checkpoints, tmp_path, family):
    """Single experts in blocks, as Qwen's own FP8 checkpoints have them; `mtp.fc` is not."""
    written = checkpoints(family, "random")
    shutil.copytree(written.folder, tmp_path, dirs_exist_ok=True)
    file, form, rng = tmp_path / "model.safetensors", FORMATS["block-fp8"], np.random.default_rng(0)
    stored, decoded = {}, {}
    for name, tensor in mx.load(str(publish_qwen(tmp_path, single=True) / file.name)).items():
        plain = {name: ("F32", np.array(tensor.astype(mx.float32)))}
        path = name.removesuffix(".weight")
        is_linear = path.endswith(("_proj", "shared_expert_gate")) and path.startswith("mtp.layers")
        if is_linear and tensor.shape[0] > 1:
            leaves, weight = form.layer(rng, *tensor.shape)
            stored |= {f"{path}.{leaf}": value for leaf, value in leaves.items()}
            decoded[name] = ("F32", weight)
        else:
            stored |= plain
            decoded |= plain
    config = json.loads((tmp_path / "config.json").read_text())
    hidden = mx.random.normal((1, len(PROMPT), 64), key=mx.random.key(2))
    results = []
    for tensors, settings in ((decoded, {}), (stored, {"quantization_config": form.settings})):
        write_safetensors(file, tensors)
        (tmp_path / "config.json").write_text(json.dumps(config | settings))
        head = load_mtp(Checkpoint.open(tmp_path), "mlx")
        results.append(head(mx.array([PROMPT]), hidden, make_prompt_cache(head.model))[0])
    assert mx.allclose(*results, atol=1e-3)
    assert mx.max(mx.abs(results[0])).item() > 0.1


def test_its_memory_is_known_before_loading(checkpoints):
    checkpoint = checkpoints("glm4_moe")
    draft = DraftModelConfig.find_mtp(checkpoint, "auto", plain_kv_cache=True)
    parameters = tree_flatten(load_mtp(checkpoint, "mlx").model.parameters())
    embedding = checkpoint.tensors["model.layers.3.embed_tokens.weight"]
    nbytes = sum(a.nbytes for _, a in parameters) + embedding.stop - embedding.start
    assert (draft.mtp, draft.weight_bytes) == (True, nbytes)
    assert draft.cache_bytes > 0
    assert DraftModelConfig.find_mtp(checkpoint, "auto", plain_kv_cache=False) is None


def test_the_model_does_not_read_it(checkpoints):
    checkpoint = checkpoints("deepseek_v3")
    assert has_mtp(checkpoint, "deepseek_v3")
    assert not has_mtp(checkpoint, "qwen3_moe")
    assert not any("layers.3." in name for name in ModelLayout.read(checkpoint).tensors)
    without = {n: t for n, t in checkpoint.tensors.items() if "eh_proj" not in n}
    broken = dataclasses.replace(checkpoint, tensors=without)
    assert not has_mtp(broken, "deepseek_v3")
    assert "(23 tensors) is not used: it is not complete" in describe_unused(broken, "deepseek_v3")
    config = {**checkpoint.config, "dspark_target_layer_ids": [1]}
    other = dataclasses.replace(checkpoint, config=config)
    assert "dspark_target_layer_ids, a form that is not" in describe_unused(other, "deepseek_v4")
    assert "drafts with that of mimo_v2" in describe_unused(checkpoint, "mimo_v2")
    assert describe_unused(checkpoint, "deepseek_v3") is None


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_5_moe", "mtp.layers.0.self_attn.q_proj.weight"),
        ("glm4_moe", "model.layers.3.self_attn.q_proj.weight"),
        ("hy_v4", "model.mtp_layers.0.self_attn.q_a_proj.weight"),
    ],
)
def test_a_damaged_layer_is_left_out_and_its_reason_names_the_file_s_tensor(
    checkpoints, caplog, family, name
):
    checkpoint, reasons = checkpoints(family), []
    tensors = {n: t for n, t in checkpoint.tensors.items() if n != name}
    damaged = dataclasses.replace(checkpoint, tensors=tensors)
    find_mtp = DraftModelConfig.find_mtp
    assert find_mtp(damaged, "auto", plain_kv_cache=True, report=reasons.append) is None
    (reason,) = reasons
    assert reason.startswith("the layer for multi-token prediction is not used: ")
    assert reason.endswith(f"Missing 1 parameters: {name}.")
    with caplog.at_level("WARNING"):
        assert find_mtp(damaged, "auto", plain_kv_cache=True) is None
    assert reason in caplog.text
    assert load(damaged) is not None  # the model needs none of it


@pytest.mark.parametrize("metadata", [[1], "mlx"])
def test_a_damaged_file_s_metadata_ends_nothing(checkpoints, tmp_path, metadata):
    shutil.copytree(checkpoints("qwen3_next").folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8:end]), "__metadata__": metadata}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    with contextlib.suppress(CheckpointError):
        DraftModelConfig.find_mtp(Checkpoint.open(tmp_path), "auto", plain_kv_cache=True)


def test_shared_tensors_come_from_the_model(checkpoints):
    """Where the layer has no embedding, head and norm of its own."""
    whole = checkpoints("glm4_moe")
    own = ("embed_tokens", "shared_head")
    tensors = {n: t for n, t in whole.tensors.items() if not any(f"3.{o}" in n for o in own)}
    checkpoint = dataclasses.replace(whole, tensors=tensors)
    text, hidden = mx.array([PROMPT]), mx.random.normal((1, 5, 64), key=mx.random.key(2))
    results = []
    for one in (whole, checkpoint):
        head = load_mtp(one, "auto")
        results.append(head(text, hidden, make_prompt_cache(head.model))[0])
    assert mx.array_equal(*results)


def test_only_passes_that_all_ranks_compute_are_recorded():
    states = HiddenStates(limit=4)
    states.record(mx.ones((1, 3, 2)))
    assert len(states) == 0
    for length in (1, 3, 2):
        with states.recording():
            states.record(mx.full((1, length, 2), length))
    assert len(states) == 5  # the first part is not needed for four
    states.drop(1)
    assert states.last(2).tolist() == [[3, 3], [2, 2]]
    states.drop(9)
    assert len(states) == 0
