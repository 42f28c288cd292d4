"""Checkpoints as makers publish them, whose tensors have other names than the models' parameters.

The witness is mlx-vlm's own load of the same folder.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from one_process import run_ranks

from cenacle.cluster.node_info import checkpoint_digest
from cenacle.core.plan import Plan
from cenacle.errors import CheckpointError
from cenacle.model.byte_ranges import total_bytes
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.config_catalog import tiny_config
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth
from support.own_models import load_own_model
from support.published_layouts import (
    LAYOUTS,
    QUANTIZATION_CONFIGS,
    QUANTIZED_LAYOUTS,
    hy_v4_stacks,
    publish,
    publish_quantized,
    qwen4_exp_singles,
)

pytest.importorskip("mlx_vlm", reason="needs the extra vlm")

IDS = mx.array([[5, 9, 2, 77, 1, 31, 8, 4]])


def logits(model, _=None) -> np.ndarray:
    cache = make_prompt_cache(model)
    return np.array(model(IDS, cache=cache))


def difference(got, expected) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_published_layout_is_the_model_that_mlx_vlm_makes_of_it(family, tmp_path):
    synth(tmp_path / "converted", family=family, dtype="float32")
    folder = publish(tmp_path / "converted", tmp_path / "published", LAYOUTS[family])
    expected = logits(load_own_model(folder)[0])
    # Floats are published without factors of single experts, or without the bias of routers.
    if family not in ("inkling", "mistral_large3"):
        assert difference(logits(load_own_model(tmp_path / "converted")[0]), expected) < 1e-4
    checkpoint = Checkpoint.open(folder)
    spec = read_model_spec(checkpoint)
    layout = ModelLayout.read(checkpoint)
    for nodes, placement in ((1, "whole"), (3, "whole"), (2, "sliced")):
        got = run_ranks(folder, nodes, logits, placement=placement)
        assert difference(got[0], expected) < 1e-4, (nodes, placement)
        plan = getattr(Plan, placement)(spec, nodes)
        for rank in range(nodes):
            ranges = required_ranges(slices_for(plan, rank, layout)).values()
            # Shared experts are read whole, and then sliced.
            shared = sum(layer.shared_bytes for layer in spec.moe) if placement == "sliced" else 0
            limit = 1.05 * plan.bytes_of(rank)["total"] + shared
            assert sum(map(total_bytes, ranges)) <= limit, placement


PARAMS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    **{
        name: name
        for name in (
            *("vocab_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "v_head_dim", "rope_theta", "max_position_embeddings"),
        )
    },
}
MOE_PARAMS = {
    "expert_hidden_dim": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "first_k_dense_replace": "first_k_dense_replace",
}
VISION_PARAMS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("image_size", "patch_size", "rope_theta"),
)


def test_mistrals_own_files_are_read(tmp_path):
    """params.json instead of config.json, an index and files named consolidated."""
    from mlx_vlm.models.mistral_large3.config import TextConfig, config_from_params

    synth(tmp_path / "converted", family="mistral_large3", dtype="float32")
    layout = LAYOUTS["mistral_large3"]
    folder = publish(tmp_path / "converted", tmp_path / "published", layout)
    config = json.loads((folder / "config.json").read_text())
    text = TextConfig.from_dict(config["text_config"])
    params = {name: getattr(text, key) for name, key in PARAMS.items()}
    params["moe"] = {name: getattr(text, key) for name, key in MOE_PARAMS.items()}
    params["vision_encoder"] = dict.fromkeys(VISION_PARAMS, 64) | {"num_attention_heads": 2}
    params["vision_encoder"] |= {"image_token_id": 10, "spatial_merge_size": 2}
    params["vision_encoder"] |= {"adapter_bias": False}
    (folder / "config.json").write_text(json.dumps(config_from_params(params)))
    expected = run_ranks(folder, 1, logits)[0]
    (folder / "config.json").unlink()
    (folder / "params.json").write_text(json.dumps(params))
    weights = folder / "consolidated-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(weights)
    assert difference(run_ranks(folder, 2, logits)[0], expected) < 1e-4
    names = Checkpoint.open(folder).tensors
    index = {"weight_map": dict.fromkeys(names, weights.name)}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    assert difference(run_ranks(folder, 2, logits, placement="sliced")[0], expected) < 1e-4
    digest = checkpoint_digest(folder)
    (folder / "params.json").write_text(json.dumps(params | {"rope_theta": 2.0}))
    assert checkpoint_digest(folder) != digest
    params.pop("moe")
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match="expected a Mistral Large 3"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("family", QUANTIZED_LAYOUTS)
def test_a_published_format_is_the_model_of_its_decoded_weights(family, tmp_path):
    config = tiny_config(family) | {"torch_dtype": "float32"}
    if family == "mimo_v2":
        config["num_key_value_heads"] = 2  # for two ranks of its makers
    synth(tmp_path / "converted", config=config, dtype="float32")
    others = {"hy_v4": hy_v4_stacks, "qwen4_exp": qwen4_exp_singles}
    layout = others.get(family, LAYOUTS[family])
    folder = publish(tmp_path / "converted", tmp_path / "published", layout)
    publish_quantized(folder, QUANTIZED_LAYOUTS[family])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION_CONFIGS[family]
    (folder / "config.json").write_text(json.dumps(config))
    expected = run_ranks(folder / "dense", 1, logits)[0]
    for nodes, placement in ((1, "whole"), (3, "whole"), (2, "sliced")):
        got = run_ranks(folder, nodes, logits, placement=placement)
        assert difference(got[0], expected) < 1e-4, (nodes, placement)
