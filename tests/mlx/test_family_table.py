"""What `cenacle families` says, column by column, against what each family does."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from one_process import load_rank, run_ranks, spec_of, tiny_model

from cenacle.collective.single import SingleRank
from cenacle.core.plan import Plan
from cenacle.core.request import Request, Sampling
from cenacle.core.step import PromptChunk, Step
from cenacle.engine.capabilities import find_capabilities
from cenacle.engine.engine import Engine
from cenacle.engine.options import EngineOptions
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.families import Batching, family_of, list_families
from cenacle.model.image_settings import IMAGE_FAMILIES
from cenacle.model.slicing import ModelLayout, slices_for
from cenacle.model.step_timer import StepTimer
from support.moe_gguf import ARCHITECTURES
from support.quantized_formats import FORMATS, Format, Stored, write_safetensors

RUNNABLE = [row.name for row in list_families() if row.refused is None]
IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
STACK = re.compile(r"(.*?)(?:\.experts)?\.(?:switch_mlp|experts|switch_glu)\.(\w+)\.weight")
DENSE = re.compile(r".*(?:attn|attention)\.(?:q|k|v|o)_proj\.weight")
QWEN_NORM = re.compile(r"(?:layernorm|model\.norm|[qk]_norm)\.weight$")
HALVES = ("gate_proj", "up_proj")


def split_stack(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """The matrices of stacked experts, as other programs name them."""
    match = STACK.fullmatch(name)
    assert match is not None
    parts = {match[2]: array}
    if match[2] == "gate_up_proj":
        parts = dict(zip(HALVES, np.split(array, 2, axis=1), strict=True))
    return {
        f"{match[1]}.experts.{expert}.{projection}": part[expert]
        for projection, part in parts.items()
        for expert in range(len(part))
    }


def write_format(source: Path, target: Path, form: Format) -> None:
    """Two checkpoints: experts and attention in a format, and the same decoded, in "dense"."""
    rng = np.random.default_rng(1)
    config = json.loads((source / "config.json").read_text())
    plain: dict[str, Stored] = {}
    quantized: dict[str, Stored] = {}
    decoded: dict[str, Stored] = {}
    for name, array in mx.load(str(source / "model.safetensors")).items():
        values = np.array(array)
        if values.ndim == 3 and STACK.fullmatch(name) and "switch_mlp_1." not in name:
            matrices = split_stack(name, values)
        elif values.ndim == 2 and (
            DENSE.fullmatch(name) or re.search(r"experts\.\d+\.\w+\.", name)
        ):
            matrices = {name.removesuffix(".weight"): values}
        else:
            kind = {"float32": "F32", "int64": "I64", "int32": "I32"}[str(values.dtype)]
            plain[name] = kind, values
            if config["model_type"] == "qwen3_next" and QWEN_NORM.search(name):
                quantized[name] = kind, values - 1  # published without the one that is added
            continue
        weights = {}
        for path, matrix in matrices.items():
            leaves, weights[path] = form.layer(rng, *matrix.shape)
            quantized |= {f"{path}.{leaf}": stored for leaf, stored in leaves.items()}
        if values.ndim == 2:
            decoded[name] = "F32", weights[name.removesuffix(".weight")]
            continue
        parts = HALVES if "gate_up_proj" in name else ("",)
        stacks = [np.stack([w for p, w in weights.items() if p.endswith(part)]) for part in parts]
        decoded[name] = "F32", np.concatenate(stacks, axis=1)
    for folder, tensors in ((target, quantized), (target / "dense", decoded)):
        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", plain | tensors)
        (folder / "config.json").write_text(json.dumps(config))
        shutil.copy(source / "tokenizer.json", folder)
        config = {k: v for k, v in config.items() if k != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": form.settings}))


@pytest.mark.parametrize("number", range(len(RUNNABLE)), ids=lambda number: RUNNABLE[number])
def test_formats_are_read_for_every_family(number, tmp_path):
    """One format for each family, another for the next: int4 and FP8 in blocks most often."""
    names = [n for n, form in FORMATS.items() if not form.separate]
    form = FORMATS[("int4", "block-fp8", names[number // 3 % len(names)])[number % 3]]
    plain = tiny_model(RUNNABLE[number])
    write_format(plain, tmp_path / "model", form)
    plan = Plan.whole(spec_of(plain), 1)  # decoded weights are of the same shapes and types
    dense = load_rank(tmp_path / "model" / "dense", plan, SingleRank())
    expected = np.array(dense(IDS))
    units = spec_of(tmp_path / "model").moe[0].units
    placement = "sliced" if units > 1 else "whole"
    got = run_ranks(
        tmp_path / "model", 2, lambda model, _: np.array(model(IDS)), placement=placement
    )[0]
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def record_passes(model, passes: list[tuple[int, int]]) -> None:
    """Note (requests, tokens of each) of every call of a model."""
    kind = type(model)

    def call(self, ids, *arguments, **keywords):
        passes.append(ids.shape)
        return kind.__call__(self, ids, *arguments, **keywords)

    model.__class__ = type("Recorded", (kind,), {"__call__": call})


def run_together(engine: Engine, names: str, max_tokens: int) -> None:
    """Requests that repeat one token to their ends, all at once."""
    always = Sampling(seed=1, logit_bias={7: 100.0})
    requests = tuple(Request(name, (7,) * 12, max_tokens, sampling=always) for name in names)
    number = engine._next_step
    chunks = tuple(PromptChunk(name, 0, 12) for name in names)
    engine.step(Step(number, requests, final_chunks=chunks))
    for later in range(number + 1, number + max_tokens + 2):
        engine.step(Step(later))


@pytest.mark.parametrize(
    "row", [r for r in list_families() if r.refused is None], ids=lambda row: row.name
)
def test_columns_say_what_the_engine_and_the_plan_do(row):
    can = find_capabilities(row)
    folder = tiny_model(row.name)
    checkpoint, spec = Checkpoint.open(folder), spec_of(folder)
    model = load_rank(folder, Plan.whole(spec, 1), SingleRank())
    passes: list[tuple[int, int]] = []
    record_passes(model, passes)
    batching = family_of(row.name).batching
    options = EngineOptions(speculative="off")
    engine = Engine(model, SingleRank(), StepTimer(), options, batching=batching)
    run_together(engine, "ab", 4)
    engine.close()
    shared = {tokens > 1 for requests, tokens in passes if requests > 1}
    expected = {
        Batching.PADDED: {True, False},
        Batching.UNPADDED_PROMPTS: {False},
        Batching.ONE_BY_ONE: set(),
    }
    assert shared == expected[can.batching]
    options = EngineOptions(speculative="always")
    engine = Engine(model, SingleRank(), StepTimer(), options, batching=batching)
    run_together(engine, "c", 12)
    engine.close()
    assert (engine.take_draft_stats().accepted > 0) == can.drafts
    assert can.gguf == (row.name in ARCHITECTURES)  # which tests/mlx/test_gguf_models.py loads
    plan = Plan.whole(spec, 2, trunk="sharded")
    divided = slices_for(plan, 0, ModelLayout.read(checkpoint)).attention
    assert bool(divided) == can.attention_sharding
    assert can.images == (row.name in IMAGE_FAMILIES)  # which tests/mlx/test_vision.py compares


def test_a_family_that_cannot_run_has_no_columns():
    refused = [row for row in list_families() if row.refused is not None]
    assert refused
    assert {find_capabilities(row) for row in refused} == {None}
