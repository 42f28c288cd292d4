"""Scaled rotary positions: as transformers computes them, or refused by name, in every family."""

import json
import shutil
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from one_process import VECTORS, load_rank, run_ranks

from cenacle.collective.single import SingleRank
from cenacle.core.model_config import text_config
from cenacle.core.plan import Plan
from cenacle.errors import CheckpointError
from cenacle.model import architecture, rotary
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.config_catalog import tiny_config
from cenacle.model.families import list_families
from cenacle.model.spec_reader import read_model_spec

SCALED = sorted(file.parent.name for file in VECTORS.glob("*/scaled.safetensors"))
RUNNABLE = [row.name for row in list_families() if row.refused is None]
IDS = mx.array([[i * 7 % 50 for i in range(40)]])
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def read_settings(family: str) -> dict[str, dict[str, Any]]:
    data = (VECTORS / family / "scaled.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["settings"])


CASES = [(family, kind) for family in SCALED for kind in read_settings(family)]


def write_scaled(family: str, kind: str, folder, *, old_names: bool) -> None:
    """The checkpoint of a family with scaled positions, as transformers 5 or 4 names them."""
    shutil.copytree(VECTORS / family, folder)
    config = json.loads((folder / "config.json").read_text())
    settings = read_settings(family)[kind]
    if old_names:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["rope_scaling"] = {"type": settings["rope_type"], **settings}
        del config["rope_scaling"]["rope_type"]
    else:
        config["rope_parameters"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_are_those_of_transformers(tmp_path, family, kind):
    vectors = mx.load(str(VECTORS / family / "scaled.safetensors"))
    tokens, expected = vectors["tokens"], vectors[f"{kind}.logits"]
    largest = mx.abs(expected).max()
    mx.eval(tokens, expected, largest)

    def run(model, _):
        y = mx.abs(model(tokens[None])[0] - expected).max() / largest
        mx.eval(y)
        return y.item()

    for old_names in (False, True):
        folder = tmp_path / str(old_names)
        write_scaled(family, kind, folder, old_names=old_names)
        assert max(run_ranks(folder, 2, run, placement="sliced")) < 5e-6
    native = load_rank(
        folder,
        Plan.whole(read_model_spec(Checkpoint.open(folder)), 1),
        SingleRank(),
        kernels="native",
    )
    assert run(native, None) < 1e-5


def build(config: dict[str, Any], weights: list[tuple[str, mx.array]] | None):
    """A model of a config, and its weights."""
    config = architecture.complete_config(config)
    classes, arguments = architecture.model_classes(config)
    model = classes(arguments.from_dict(config))
    if weights is None:
        mx.random.seed(3)
        weights = [
            (name, mx.random.normal(array.shape) * 0.3)
            for name, array in tree_flatten(model.parameters())
            if mx.issubdtype(array.dtype, mx.floating)
        ]
    model.load_weights(weights, strict=False)
    model.eval()
    return model, weights


@pytest.mark.parametrize("number", range(len(RUNNABLE)), ids=lambda number: RUNNABLE[number])
def test_no_family_ignores_a_scaling(number):
    """It changes the logits, or is refused; but for families without rotary positions."""
    family = RUNNABLE[number]
    config = tiny_config(family)
    config = json.loads(json.dumps(config))
    text = text_config(config)
    settings = (YARN, {"rope_type": "linear", "factor": 4.0})[number % 2]
    plain, weights = build(json.loads(json.dumps(config)), None)
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and number % 3:
        nested = [value for value in rope.values() if isinstance(value, dict)]
        for parameters in nested or [rope]:
            parameters |= settings
            parameters.pop("type", None)
    else:
        text["rope_scaling"] = settings
    try:
        scaled, _ = build(config, weights)
    except (CheckpointError, KeyError) as error:
        # mistral4's and mellum's own classes need more settings than these.
        assert "rop" in str(error) or "scaling" in str(error) or "attention" in str(error)  # noqa: PT017
        return
    expected, got = plain(IDS), scaled(IDS)
    apart = (
        mx.abs(got - expected).astype(mx.float32).max() / mx.abs(expected).astype(mx.float32).max()
    )
    is_same = apart.item() < 1e-6
    assert is_same == (family in rotary._WITHOUT_POSITIONS)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("mixtral", {"rope_type": "dynamic", "factor": 2.0}, "got 'dynamic'"),
        ("mixtral", {"type": "su", "factor": 2.0}, "got 'su'"),
        ("qwen3_moe", {"rope_type": "longrope", "factor": 2.0}, "got 'longrope'"),
        ("qwen3_moe", {"rope_type": "yarn"}, "'yarn' needs a factor, got none"),
        ("qwen3_moe", {"rope_type": "yarn", "factor": "4"}, "factor of rotary positions: expected"),
        ("qwen3_moe", {"rope_type": ["yarn"]}, "rope_type: expected"),
        ("deepseek_v2", {"rope_type": "linear", "factor": 2.0}, "got 'linear'"),
        ("deepseek_v2", YARN | {"attention_factor": 0.5}, "deepseek_v2 would ignore it"),
        ("qwen3_omni_moe", YARN, "got 'yarn'"),
        ("glm4v_moe", YARN, "got 'yarn'"),
    ],
)
def test_what_is_not_computed_is_refused(family, settings, reason):
    config = tiny_config(family)
    text = config.get("thinker_config", config)
    text = text.get("text_config", text)
    for key in ("rope_scaling", "rope_parameters"):
        if key in text:
            settings = {**(text.pop(key) or {}), **settings}
    text["rope_scaling"] = settings
    if family in ("qwen3_omni_moe", "glm4v_moe"):
        pytest.importorskip("mlx_vlm", reason="needs the extra vlm")
    with pytest.raises(CheckpointError, match=reason):
        build(config, None)


def test_a_class_that_nobody_looked_at_is_not_trusted():
    """mlx-vlm has families without a row, with rotary positions of their own."""
    pytest.importorskip("mlx_vlm", reason="needs the extra vlm")
    text = tiny_config("qwen3_5_moe")["text_config"]
    text["rope_parameters"] = {**text["rope_parameters"], **YARN, "mrope_section": [2, 1, 1]}
    text["rope_parameters"].pop("type", None)
    with pytest.raises(CheckpointError, match="qwen3_5_moe_text would ignore it"):
        build(text, None)


def test_deepseek_v2_runs_without_a_scaling():
    config = tiny_config("deepseek_v2")
    without = {k: v for k, v in config.items() if k != "rope_scaling"}
    model, weights = build(without, None)
    factor_one = without | {"rope_scaling": {"type": "yarn", "factor": 1.0}}
    assert mx.array_equal(model(IDS), build(factor_one, weights)[0](IDS))


def test_the_trained_length_is_the_configs_by_default():
    """As in transformers; mlx-lm takes 4,096."""
    config = tiny_config("olmoe") | {"max_position_embeddings": 16}
    stated, weights = build(config | {"rope_scaling": YARN}, None)
    unstated = {k: v for k, v in YARN.items() if not k.startswith("original")}
    assert mx.array_equal(build(config | {"rope_scaling": unstated}, weights)[0](IDS), stated(IDS))
