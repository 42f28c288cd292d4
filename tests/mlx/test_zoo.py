"""mlx-vlm's families beside mlx-lm's: where they come from, their towers, its faults repaired."""

import json
import logging
import random

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import MODEL_REMAPPING
from one_process import load_rank, run_ranks, tiny_model

from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.errors import CheckpointError
from cenacle.model import zoo
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.config_catalog import family_names, tiny_config
from cenacle.model.families import FAMILIES, Zoo, list_families, vlm_family_name
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth
from support.own_models import load_own_model

pytest.importorskip("mlx_vlm", reason="needs the extra vlm")

VLM = [row.name for row in list_families() if row.zoo == "mlx-vlm"]
TOWERS = {
    "model.visual.blocks.0.attn.qkv.weight": (64, 64),
    "vision_tower.patch_embed.proj.weight": (64, 3, 2, 2),
    "multi_modal_projector.linear_1.weight": (64, 64),
    "audio_tower.layers.0.fc1.weight": (64, 64),
}


def load_whole(folder):
    return load_rank(folder, Plan.whole(read_model_spec(Checkpoint.open(folder)), 1), SingleRank())


@pytest.mark.parametrize(
    "row", [r for r in list_families() if r.name in family_names()], ids=lambda row: row.name
)
def test_the_table_says_which_package_runs_a_family(row):
    classes = zoo.find_classes(tiny_config(row.name))
    assert classes.zoo.value == row.zoo
    kinds = [k.__module__ for k in classes.model.__mro__]
    assert any(k.startswith(row.zoo.replace("-", "_")) for k in kinds)


def test_aliases_are_those_of_mlx_vlm():
    from mlx_vlm.utils import MODEL_REMAPPING as VLM_REMAPPING

    for name in VLM:
        both = (*VLM_REMAPPING.items(), *MODEL_REMAPPING.items())
        known = {a for a, module in both if module == name}
        assert set(FAMILIES[name].aliases) == known
        for alias in known:
            assert zoo.find_classes(tiny_config(name) | {"model_type": alias}).family == name


def test_a_family_in_both_packages_is_mlx_lms_unless_its_row_says_otherwise():
    for kind in ("qwen3_vl_moe", "llama4", "mixtral", *MODEL_REMAPPING):
        if vlm_family_name(kind) is None:
            config = {"model_type": kind}
            try:
                assert zoo.find_classes(config).zoo is Zoo.MLX_LM
            except CheckpointError:
                continue


@pytest.mark.parametrize("kind", ["cache", "base", "no_such_family", "siglip.vision", "sam3"])
def test_what_is_no_language_model_is_refused(kind):
    with pytest.raises(CheckpointError, match="neither mlx-lm nor mlx-vlm"):
        zoo.find_classes({"model_type": kind})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llada2_moe"}, "llada2_moe cannot run: it writes blocks of tokens"),
        ({"model_type": "zaya1_vl"}, "zaya1_vl cannot run: its experts are of a form of their own"),
    ],
)
def test_a_family_that_cannot_work_is_refused_with_the_reason(config, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {f"layers.{n}.x": mx.zeros((8, 8)) for n in range(8)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    with pytest.raises(CheckpointError, match=reason):
        read_model_spec(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("family", ["glm4v_moe", "llama4"])
def test_towers_are_left_alone_and_named_once(family, tmp_path, caplog):
    """Of either package: they are not read, and the language model answers as without them."""
    synth(tmp_path, family=family)
    ids = mx.array([[5, 9, 2, 77, 1]])
    expected = load_whole(tmp_path)(ids)
    weights = mx.load(str(tmp_path / "model.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, shape in TOWERS.items():
        weights[name] = mx.ones(shape)
        index["weight_map"][name] = "model.safetensors"
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    checkpoint = Checkpoint.open(tmp_path)
    with caplog.at_level(logging.INFO):
        spec = read_model_spec(checkpoint)
        read_model_spec(checkpoint)
    messages = [r.getMessage() for r in caplog.records if "ignoring" in r.getMessage()]
    assert len(messages) == 1
    assert f"{len(TOWERS)} tensors" in messages[0]
    slices = slices_for(Plan.whole(spec, 1), 0, ModelLayout.read(checkpoint))
    assert not {piece.tensor.name for piece in slices.tensors} & set(TOWERS)
    read = sum(
        stop - start for ranges in required_ranges(slices).values() for start, stop in ranges
    )
    assert read == checkpoint.nbytes() - sum(4 * int(np.prod(s)) for s in TOWERS.values())
    assert mx.array_equal(load_whole(tmp_path)(ids), expected)


def publish_ernie(folder):
    """Write a converted checkpoint as the hub has it: single experts, those of images last."""
    published = {}
    for name, array in mx.load(str(folder / "model.safetensors")).items():
        name = name.removeprefix("language_model.")
        path, _, rest = name.rpartition(".switch_mlp")
        if path:
            first, projection = (8, rest[3:]) if rest.startswith("_1.") else (0, rest[1:])
            for expert in range(len(array)):
                published[f"{path}.experts.{first + expert}.{projection}"] = array[expert]
        elif ".gate_1." in name:
            published[name.replace(".gate_1.weight", ".gate.weight_1")] = array
        else:
            published[name] = array
    published["model.resampler_model.mlp.weight"] = mx.zeros((4, 4))
    mx.save_safetensors(str(folder / "model.safetensors"), published)
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(("nodes", "placement"), [(1, "whole"), (3, "whole"), (2, "sliced")])
def test_experts_of_images_are_neither_read_nor_needed(nodes, placement, tmp_path):
    """ernie4_5_moe_vl has experts for text and for images, in one list."""
    synth(tmp_path, family="ernie4_5_moe_vl")
    ids = mx.array([[5, 9, 2, 77, 1]])
    expected = load_whole(tmp_path)(ids)
    publish_ernie(tmp_path)
    got = run_ranks(tmp_path, nodes, lambda model, _: np.array(model(ids)), placement=placement)
    assert float(mx.abs(mx.array(got[0]) - expected).max()) < 1e-4
    checkpoint = Checkpoint.open(tmp_path)
    plan = Plan.whole(read_model_spec(checkpoint), 1)
    names = {p.tensor.name for p in slices_for(plan, 0, ModelLayout.read(checkpoint)).tensors}
    assert any(".experts.7." in name for name in names)
    assert not any(".experts.8." in name or "resampler" in name for name in names)


def test_factors_of_single_experts_become_part_of_their_matrices(tmp_path):
    """inkling, as its NVFP4 checkpoints have them; random ones differ from one."""
    synth(tmp_path, family="inkling", dtype="float32")
    own, _ = load_own_model(tmp_path)
    scales = [v for n, v in tree_flatten(own.parameters()) if n.endswith("gate_scale")]
    assert scales
    assert all(float(mx.abs(v - 1).max()) > 0.01 for v in scales)
    ids = mx.array([[5, 9, 2, 77, 1]])
    expected = own(ids)
    got = run_ranks(tmp_path, 2, lambda model, _: np.array(model(ids)), placement="sliced")
    assert float(mx.abs(mx.array(got[0]) - expected).max() / mx.abs(expected).max()) < 1e-4


@pytest.fixture(scope="module", params=["deepseek_v4", "hy_v4"])
def read_at_once(request):
    """A model, a prompt, and the logits of the whole prompt."""
    model = load_whole(tiny_model(request.param))
    ids = mx.array([[random.Random(64).randrange(1, 250) for _ in range(64)]])
    return model, ids, model(ids, cache=make_prompt_cache(model))


@pytest.mark.parametrize("chunks", [[63, 1], [16] * 4, [17, 17, 17, 13], [40] + [1] * 24])
def test_a_prompt_in_parts_gives_what_it_gives_in_one(read_at_once, chunks):
    """mlx-vlm 0.7.10 loses the window before a part, and chooses tokens for other lengths."""
    model, ids, expected = read_at_once
    cache, begin, got = make_prompt_cache(model), 0, []
    for length in chunks:
        got.append(model(ids[:, begin : begin + length], cache=cache))
        mx.eval(got[-1], [c.state for c in cache])
        begin += length
    assert float(mx.abs(mx.concatenate(got, axis=1) - expected).max()) < 1e-4
