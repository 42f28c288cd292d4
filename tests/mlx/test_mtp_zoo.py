"""Drafting layers of families for which mlx-vlm has a drafter: what they compute is what it does.

The reference is mlx-vlm's drafter over the whole text at once. That answers do not change:
test_mtp.py, test_group_drafts.py.
"""

import json

import mlx.core as mx
import numpy as np
import pytest

from cenacle.core.model_config import text_config
from cenacle.engine.speculative.draft_model import load_mtp
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.mtp import FORMS
from support.mtp_checkpoint import EMBEDDINGS, write_mtp
from support.published_layouts import (
    LAYOUTS,
    QUANTIZATION_CONFIGS,
    QUANTIZED_LAYOUTS,
    convert_hy_v4,
    hy_v4_formats,
    hy_v4_stacks,
    qwen4_exp_singles,
)
from support.quantized_formats import write_safetensors

FAMILIES = ("deepseek_v4", "glm5_next", "hy_v4", "inkling", "nemotron_h", "qwen4_exp")
IDS = [(37 * i * i + 11 * i + 5) % 500 for i in range(40)]
STREAMS = {"deepseek_v4": "hc_mult", "qwen4_exp": "hc_count"}


def publish_inkling(tensors):
    for name, array in LAYOUTS["inkling"](tensors):
        yield name.replace("model.llm.mtp.", "model.mtp."), array


PUBLISHED = {
    "deepseek_v4": LAYOUTS["deepseek_v4"],
    "glm5_next": LAYOUTS["glm5_next"],
    "hy_v4": hy_v4_stacks,
    "inkling": publish_inkling,
    "qwen4_exp": qwen4_exp_singles,
}


def load_reference(checkpoint):
    """mlx-vlm's drafter, and all tensors of the file."""
    pytest.importorskip("mlx_vlm", reason="needs the extra vlm")
    from mlx_vlm.speculative.drafters.mtp_split import get_mtp_splitter

    splitter = get_mtp_splitter(source_config=checkpoint.config)
    text = splitter.read_text_config(checkpoint.config)
    tensors = mx.load(str(checkpoint.files[0]))
    if "model.mtp.layers.0.embed_norm.weight" in tensors:  # inkling's: the model's, by its name
        tensors["model.llm.norm.weight"] = tensors["language_model.model.norm.weight"]
    chosen = {n: t for n, t in tensors.items() if splitter.select_keys(n, text)}
    weights = splitter.run_sanitize(splitter.rename(chosen, text), text)
    kind = splitter.draft_model_cls
    config = kind.__init__.__annotations__["config"]
    drafter = kind(config.from_dict({"text_config": text}))
    drafter.load_weights(list(weights.items()))
    return drafter, tensors


def require_same(checkpoint, reference, family, tolerance):
    """Read in three parts with a cache, against mlx-vlm's drafter over the whole text."""
    drafter, tensors = load_reference(reference)
    embedding = next(t for n, t in tensors.items() if n.endswith(EMBEDDINGS))
    output = next(t for n, t in tensors.items() if n.endswith("lm_head.weight"))
    ids, text = mx.array([IDS]), text_config(checkpoint.config)
    width = text["hidden_size"] * text.get(STREAMS.get(family), 1)
    hidden = mx.random.normal((1, len(IDS), width), key=mx.random.key(1))
    if family == "hy_v4":
        expected = passed_on = drafter._forward_hidden(embedding[ids], hidden, None, None)
    elif family == "inkling":
        drafter._input_embed, drafter._cache = lambda ids: embedding[ids], drafter.make_cache()
        passed_on = drafter._forward_seq(ids, hidden, 0, mx.int32)
        expected = drafter.norm(passed_on)
    else:
        drafter._next_position = int(family == "glm5_next")  # 0 is the first token of a text
        own_caches = drafter.make_cache()
        expected, passed_on = drafter._forward_hidden(embedding[ids], hidden, ids, own_caches)
    head = load_mtp(checkpoint, "mlx")
    caches, logits, states = head.make_caches(), [], []
    for part in (slice(0, 30), slice(30, 31), slice(31, 40)):
        got, state = head(ids[:, part], hidden[:, part], caches)
        logits.append(got)
        states.append(state)
    passed_on = passed_on.reshape(1, len(IDS), -1)
    assert mx.allclose(mx.concatenate(states, axis=1), passed_on, atol=tolerance)
    for got, end in zip(logits, (29, 30, 39), strict=True):
        assert mx.allclose(got, expected[:, end] @ output.T, atol=10 * tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_computes_what_mlx_vlm_computes(tmp_path, family):
    checkpoint = Checkpoint.open(write_mtp(tmp_path, family))
    require_same(checkpoint, checkpoint, family, 1e-4)


def stack_experts(tensors):
    stacks = {}
    for name, (kind, array) in tensors.items():
        head, found, tail = name.partition(".experts.")
        key = f"{head}.switch_mlp.{tail.partition('.')[2]}" if found else name
        stacks.setdefault(key, []).append((kind, array))
    return {
        name: (parts[0][0], np.stack([array for _, array in parts]))
        if ".switch_mlp." in name
        else parts[0]
        for name, parts in stacks.items()
    }


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_layer_computes_the_same(tmp_path, family):
    """With the names and formats of makers; mlx-vlm reads the decoded floats."""
    folder = write_mtp(tmp_path, family)
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    prefix = FORMS[family].list_prefixes(config)[0]
    plain, stored, decoded = {}, {}, {}
    tensors = mx.load(str(file))
    for name in [name for name in tensors if not name.startswith(prefix)]:
        plain[name] = "F32", np.array(tensors.pop(name).astype(mx.float32))
    for name, array in PUBLISHED[family](tensors):
        encode = QUANTIZED_LAYOUTS.get(family, lambda *_: None)
        if (made := encode(name, array.shape)) is None:
            stored[name] = decoded[name] = "F32", np.array(array)
        else:
            stored |= made[0]
            decoded[name] = "F32", made[1]
    if family == "qwen4_exp":  # mlx-vlm takes no single experts that are floats
        decoded = stack_experts(decoded)
    if encode is hy_v4_formats:
        converted = convert_hy_v4(decoded)
        decoded = {name.removeprefix("language_model."): value for name, value in converted}
    (folder / "dense").mkdir()
    write_safetensors(folder / "dense" / "model.safetensors", plain | decoded)
    (folder / "dense" / "config.json").write_text(json.dumps(config))
    write_safetensors(file, plain | stored)
    if family in QUANTIZATION_CONFIGS:
        config["quantization_config"] = QUANTIZATION_CONFIGS[family]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint, reference = (Checkpoint.open(f) for f in (folder, folder / "dense"))
    require_same(checkpoint, reference, family, 1e-3)
