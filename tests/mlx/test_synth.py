"""Random checkpoints: every family loads in mlx-lm itself, and gives logits worth comparing."""

import hashlib
import json
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import get_total_parameters, load, load_model

from cenacle.core.model_config import text_config
from cenacle.errors import InputError
from cenacle.model import architecture
from cenacle.model.config_catalog import (
    family_names,
    first_layers,
    full_config,
    layer_count,
    model_catalog,
    tiny_config,
)
from cenacle.model.families import family_of
from cenacle.model.random_tensors import LINEAR_STD, _encode
from cenacle.model.synth import build_lazy_model, synth
from support.own_models import load_own_model

PROMPT = mx.array([[(37 * i + 11) % 512 for i in range(24)]])


def logits_of(model):
    """Float32 logits [length, vocabulary] of the prompt."""
    return np.array(model(PROMPT).astype(mx.float32))[0]


def tensors_in(folder):
    files = sorted(folder.glob("model*.safetensors"))
    return {name: value for file in files for name, value in mx.load(str(file)).items()}


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def metal_only(family):
    """mlx-lm's code for the family is Metal kernels."""
    return family_of(family).metal_only


@pytest.mark.parametrize("family", family_names())
def test_every_family_loads_and_its_logits_are_well_spread(family, tmp_path):
    made = synth(tmp_path, family=family)
    assert made.family == architecture.resolve_family(tiny_config(family))
    model, _ = load_own_model(tmp_path)

    # Its package changes nothing on loading, and nothing is as constant as its own start values.
    loaded = dict(tree_flatten(model.parameters()))
    written = tensors_in(tmp_path)
    assert loaded.keys() == written.keys()
    assert not [n for n, v in loaded.items() if not mx.array_equal(v, written[n])]
    floats = {n: v for n, v in loaded.items() if mx.issubdtype(v.dtype, mx.floating)}
    assert not [n for n, v in floats.items() if v.size > 1 and mx.all(v == v.reshape(-1)[0])]
    assert made.parameters == sum(v.size for v in loaded.values())

    if metal_only(family) and not mx.metal.is_available():
        return
    logits = logits_of(model)
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 5
    centered = logits - logits.mean(axis=-1, keepdims=True)
    centered /= np.linalg.norm(centered, axis=-1, keepdims=True)
    alike = (centered @ centered.T)[~np.eye(len(centered), dtype=bool)]
    assert alike.mean() < 0.5, "different tokens must give different logits"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {"quantize": 4}),
        ("mixtral", {"quantize": 2, "group_size": 32}),
        ("dbrx", {"quantize": 3, "group_size": 32}),
        ("glm4_moe", {"quantize": 5}),
        ("olmoe", {"quantize": 6, "dtype": "bfloat16"}),
        ("deepseek_v3", {"quantize": 8}),
        ("gpt_oss", {"mode": "mxfp4"}),
    ],
)
def test_quantized(family, options, tmp_path):
    synth(tmp_path, family=family, **options)
    model, config = load_model(tmp_path)
    quantization = config["quantization"]
    assert quantization["bits"] == options.get("quantize", 4)
    assert quantization["mode"] == options.get("mode", "affine")
    assert np.isfinite(logits_of(model)).all()
    for module in model.modules():
        if not isinstance(module, QuantizedSwitchLinear):
            continue
        assert (module.bits, module.group_size) == (
            quantization["bits"],
            quantization["group_size"],
        )
        weight = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            module.group_size,
            module.bits,
            mode=module.mode,
        ).astype(mx.float32)
        assert mx.std(weight).item() == pytest.approx(
            LINEAR_STD / math.sqrt(module.input_dims), rel=0.25
        )
        assert abs(mx.mean(weight).item()) < 0.01


def test_router_gates_are_quantized_as_mlx_lm_does(tmp_path):
    synth(tmp_path, family="qwen3_moe", quantize=4, group_size=32)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert quantization["model.layers.1.mlp.gate"] == {"group_size": 64, "bits": 8}


@pytest.mark.parametrize("options", [{}, {"quantize": 4}, {"mode": "mxfp4"}])
def test_same_seed_same_bytes(options, tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        synth(tmp_path / folder, family="qwen3_next", seed=seed, **options)
    a, b, c = (digest(tmp_path / folder) for folder in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


def test_encoding_rounds_as_mlx_does():
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    for dtype in (mx.bfloat16, mx.float16):
        expected = np.array(mx.array(values).astype(dtype).view(mx.uint16))
        assert np.array_equal(_encode(values, dtype).view(np.uint16), expected)


def test_shards(tmp_path):
    whole = synth(tmp_path / "whole", family="mixtral")
    limit = whole.bytes // 5
    parts = synth(tmp_path / "parts", family="mixtral", shard_bytes=limit)
    assert whole.shards == 1
    assert parts.shards > 5
    names = [f"model-{i + 1:05d}-of-{parts.shards:05d}.safetensors" for i in range(parts.shards)]
    assert sorted(p.name for p in (tmp_path / "parts").glob("*.safetensors")) == names

    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.bytes
    one, many = tensors_in(tmp_path / "whole"), tensors_in(tmp_path / "parts")
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(mx.array_equal(one[n], many[n]) for n in one)
    for name in names:
        local = mx.load(str(tmp_path / "parts" / name))
        assert {n for n, file in index["weight_map"].items() if file == name} == local.keys()
        assert len(local) == 1 or sum(v.nbytes for v in local.values()) <= limit
    load_model(tmp_path / "parts")


@pytest.mark.parametrize("family", [f for f in family_names() if not metal_only(f)])
def test_fewer_layers(family, tmp_path):
    config = tiny_config(family)
    total = layer_count(config)
    for layers in range(1, total + 1):
        try:
            made = synth(tmp_path, config=config, layers=layers, dtype="float32", overwrite=True)
        except InputError:
            assert layers < total
            continue
        model, made_config = load_own_model(tmp_path)
        assert made.layers == len(model.layers) == layer_count(made_config) == layers
        assert "layer_types" not in text_config(made_config) or len(
            text_config(made_config)["layer_types"]
        ) == (layers)
        cache = make_prompt_cache(model)
        for tokens in (PROMPT, PROMPT[:, :1]):
            assert mx.all(mx.isfinite(model(tokens, cache=cache)))
        return


def test_full_size_models_have_the_parameters_their_sources_state():
    for name, entry in model_catalog().items():
        assert entry.source
        assert entry.confidence in "ABCDE"
        parameters = get_total_parameters(build_lazy_model(full_config(name)))
        if entry.parameters is not None:
            assert parameters == pytest.approx(entry.parameters, rel=0.01), name


def test_first_layers_of_a_full_size_model():
    config = first_layers(full_config("kimi-k2.5"), 3)
    assert config["text_config"]["num_hidden_layers"] == 3
    assert len(build_lazy_model(config).layers) == 3
    assert len(build_lazy_model(first_layers(full_config("granite-4.0-h-small"), 6)).layers) == 6
    with pytest.raises(InputError, match="holds routed experts"):
        build_lazy_model(first_layers(full_config("deepseek-v3"), 3))
    with pytest.raises(InputError, match="at least 4"):
        first_layers(full_config("llama-4-scout"), 2)
    with pytest.raises(InputError, match="1 to 40"):
        first_layers(full_config("dbrx-132b"), 41)


def test_every_token_is_text(tmp_path):
    synth(tmp_path, family="qwen3_moe")
    _, tokenizer = load(str(tmp_path))
    assert tokenizer.eos_token_ids == {257, 258}
    assert all(tokenizer.decode([i]) for i in range(512))
    for text in ("Grüße, 世界!\n", "a  b\tc", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>") == [256]
    assert tokenizer.encode("ab") == [97, 98]


def test_invalid_input_is_explained(tmp_path):
    for options, words in (
        ({"family": "qwen3_mo"}, "nearest: qwen3_moe"),
        ({"name": "dbrx-132"}, "nearest: dbrx-132b"),
        ({}, "exactly one"),
        ({"family": "dbrx", "name": "dbrx-132b"}, "exactly one"),
        ({"family": "dbrx", "quantize": 7}, "got 7"),
        ({"family": "dbrx", "quantize": 8, "mode": "mxfp4"}, "mxfp4 has 4 bits"),
        ({"family": "dbrx", "mode": "nvfp4"}, "nvfp4"),
        ({"family": "dbrx", "quantize": 4, "group_size": 48}, "group_size"),
        ({"family": "dbrx", "dtype": "int8"}, "dtype"),
        ({"config": tiny_config("dbrx") | {"vocab_size": 258}}, "at least 259"),
        ({"config": {"model_type": "dbrx", "vocab_size": 512}}, "cannot be built"),
        ({"config": tmp_path / "none.json"}, "cannot read"),
    ):
        with pytest.raises(InputError, match=words):
            synth(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="empty"):
        synth(tmp_path / "out", family="dbrx")
    synth(tmp_path / "out", family="dbrx", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").exists()


def test_model_that_does_not_fit_on_the_disk_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(InputError, match="GiB left"):
        synth(tmp_path, family="dbrx")
    assert not list(tmp_path.iterdir())
