"""MoE models in GGUF files: logits are those of the same weights as floats, on 1 to 3 ranks."""

import json
import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from one_process import in_threads, load_rank, run_ranks
from tokenizers import Tokenizer

import cenacle
from cenacle.core.plan import Plan
from cenacle.errors import CenacleError, CheckpointError
from cenacle.gguf.file import GgufFile
from cenacle.model import gguf_families
from cenacle.model.byte_ranges import total_bytes
from cenacle.model.checkpoint import Checkpoint, locate_checkpoint
from cenacle.model.format_notices import describe_formats
from cenacle.model.generation_config import read_sampling_defaults
from cenacle.model.gguf_checkpoint import GgufIndex
from cenacle.model.loader import load_rank_model
from cenacle.model.quantized_layers import QuantizedLayers
from cenacle.model.slicing import ModelLayout, required_ranges, slices_for
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.tensor_info import TensorInfo
from cenacle.model.weight_files import GGUF_INDEX
from support.moe_gguf import ARCHITECTURES, write_moe
from support.tiny_gguf import byte_vocabulary

YARN = {
    **{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    **{"beta_fast": 32, "beta_slow": 1},
}
TOKENS = [[1, 40, 7, 99, 200, 13, 5, 64]]


@pytest.fixture(autouse=True)
def models_home(tmp_path, monkeypatch):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path / "home"))


def logits_of(folder: Path, nodes: int, placement: str) -> list[np.ndarray]:
    return run_ranks(
        folder, nodes, lambda model, _: np.array(model(mx.array(TOKENS))), placement=placement
    )


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_logits_are_those_of_the_floats(tmp_path, monkeypatch, family):
    if family == "glm4_moe_lite":  # told by its size
        monkeypatch.setattr(gguf_families, "_GLM_LAYERS", (3,))
        monkeypatch.setattr(gguf_families, "_GLM_VOCABULARY", len(byte_vocabulary()[0]))
    expected = np.array(write_moe(tmp_path, family)(mx.array(TOKENS)))
    folder = locate_checkpoint(str(tmp_path / "model.gguf"))
    for nodes, placement in ((1, "whole"), (3, "whole"), (2, "sliced"), (2, "replicated")):
        for logits in logits_of(folder, nodes, placement):
            assert np.abs(logits - expected).max() < 1e-4, (nodes, placement)


@pytest.mark.parametrize(
    "family", ["glm4_moe", "minimax", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe"]
)
def test_scaled_positions_are_those_of_the_floats(tmp_path, family):
    """Files of 128K tokens; tests/mlx/test_rotary.py has transformers' logits."""
    expected = np.array(write_moe(tmp_path, family, rope_scaling=YARN)(mx.array(TOKENS)))
    plain = np.array(write_moe(tmp_path / "plain", family)(mx.array(TOKENS)))
    assert np.abs(plain - expected).max() > 1e-2
    folder = locate_checkpoint(str(tmp_path / "model.gguf"))
    for logits in logits_of(folder, 2, "sliced"):
        assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_quantized_experts_are_sliced_at_blocks(tmp_path, kind):
    expected = np.array(write_moe(tmp_path, "qwen3_moe", kind)(mx.array(TOKENS)))
    folder = locate_checkpoint(str(tmp_path / "model.gguf"))
    for nodes, placement in ((1, "whole"), (3, "sliced"), (2, "whole")):
        for logits in logits_of(folder, nodes, placement):
            assert np.abs(logits - expected).max() < 1e-3, (nodes, placement)


def test_attention_with_sinks_is_divided(tmp_path):
    expected = np.array(write_moe(tmp_path, "gpt_oss")(mx.array(TOKENS)))
    folder = locate_checkpoint(str(tmp_path / "model.gguf"))
    plan = Plan.whole(read_model_spec(Checkpoint.open(folder)), 2, trunk="sharded")
    for logits in in_threads(2, lambda t: np.array(load_rank(folder, plan, t)(mx.array(TOKENS)))):
        assert np.abs(logits - expected).max() < 1e-4


# Types of tensors that llama.cpp's convert script rearranged; those that become one are of two.
MIXED = {
    "deepseek_v2": {"attn_k_b": "Q8_0", "attn_v_b": "Q4_0"},
    "deepseek_v3": {"attn_k_b": "Q8_0", "attn_kv_b": "Q5_1", "ffn_down_exps": "MXFP4"},
    "gpt_oss": {"_exps": "MXFP4"},
    "qwen3_5_moe": {"attn_qkv": "Q5_0", "ssm_out": "Q8_0"},
    "qwen3_next": {"attn_gate": "Q5_0"},
}


@pytest.mark.parametrize("family", sorted(MIXED))
def test_rearranged_tensors_stay_quantized(tmp_path, family):
    logits = []
    for as_floats in (False, True):
        folder = tmp_path / str(as_floats)
        write_moe(folder, family, "Q4_0", mixed=MIXED[family], as_floats=as_floats)
        path = locate_checkpoint(str(folder / "model.gguf"))
        logits += logits_of(path, 1, "whole")
        if not as_floats:
            logits += logits_of(path, 3, "sliced")
    for others in logits[:-1]:
        assert np.abs(others - logits[-1]).max() < 1e-3 * np.abs(logits[-1]).max()


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_next"])
def test_files_of_older_scripts_are_read(tmp_path, family):
    expected = np.array(write_moe(tmp_path, family, legacy=True)(mx.array(TOKENS)))
    (logits,) = logits_of(locate_checkpoint(str(tmp_path / "model.gguf")), 1, "whole")
    assert np.abs(logits - expected).max() < 1e-4


def test_split_files_are_one_model(tmp_path):
    expected = np.array(write_moe(tmp_path, "qwen3_moe", "Q8_0", 10)(mx.array(TOKENS)))
    files = sorted(tmp_path.glob("model-*.gguf"))
    assert len(files) > 3
    folders = {locate_checkpoint(str(path)) for path in (files[0], files[-1])}
    assert len(folders) == 1
    for nodes, placement in ((1, "whole"), (2, "sliced")):
        for logits in logits_of(*folders, nodes, placement):
            assert np.abs(logits - expected).max() < 1e-3, (nodes, placement)


def test_types_that_are_rounded_are_named():
    kinds = ("Q6_K", "Q8_0", "Q2_K", "Q6_K", "F32")
    tensors = {str(i): TensorInfo(str(i), Path(), kind, (1,), 0, 1) for i, kind in enumerate(kinds)}
    notices = describe_formats(
        nn.Module(), QuantizedLayers(), GgufIndex(tensors), uses_native_kernels=True
    )
    assert [notice.split(" are held as 8 bits")[0] for notice in notices] == [
        "1 tensors of the GGUF file (Q2_K)",
        "2 tensors of the GGUF file (Q6_K)",
    ]


@pytest.mark.parametrize("placement", ["whole", "sliced"])
def test_a_rank_reads_its_own_experts_alone(tmp_path, placement):
    write_moe(tmp_path, "qwen3_moe", "Q8_0")
    checkpoint = Checkpoint.open(locate_checkpoint(str(tmp_path / "model.gguf")))
    plan = getattr(Plan, placement)(read_model_spec(checkpoint), 2)
    assert plan.spec.quantization == "GGUF Q8_0"
    layout = ModelLayout.read(checkpoint)
    experts = sum(t.stop - t.start for n, t in checkpoint.tensors.items() if "switch_mlp" in n)
    for rank in range(2):
        (ranges,) = required_ranges(slices_for(plan, rank, layout)).values()
        assert total_bytes(ranges) == checkpoint.nbytes() - experts // 2


def test_a_file_is_served_with_its_tokenizer(tmp_path):
    model = write_moe(tmp_path, "qwen3_moe", "Q8_0")
    with cenacle.load(str(tmp_path / "model.gguf"), nodes=2) as served:
        answer = served.generate("hello", max_tokens=6, temperature=0)
    folder = locate_checkpoint(str(tmp_path / "model.gguf"))
    assert read_sampling_defaults(folder) == {"temperature": 0.5, "top_k": 20}
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("hello").ids
    for token in answer.tokens:
        assert int(mx.argmax(model(mx.array([ids]))[0, -1])) == token
        ids.append(token)


def served_error(path):
    """The sentence with which a file is refused; None: its weights are read."""
    try:
        checkpoint = Checkpoint.open(locate_checkpoint(str(path)))
        plan = Plan.whole(read_model_spec(checkpoint), 1)
        load_rank_model(checkpoint, plan, 0, lambda done, total: None)
    except CenacleError as error:
        return str(error)
    return None


SCALING = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "expert_weights_norm: expected False"),
        ("llama4", {"rope_scaling": SCALING}, "rope_freqs.weight: expected factors of Llama's"),
        (
            "llama4",
            {"rope_scaling": SCALING | YARN},
            "rope.scaling.type: expected 'none', got 'yarn'|expected factors of Llama's",
        ),
        ("minimax", {"scoring_func": "softmax"}, "expert_gating_func: expected 2, got 1"),
    ],
)
def test_what_a_model_class_cannot_compute_is_refused(tmp_path, family, changes, message):
    write_moe(tmp_path, family, **changes)
    with pytest.raises(CheckpointError, match=message):
        locate_checkpoint(str(tmp_path / "model.gguf"))


def test_damaged_files_are_a_sentence_each(tmp_path):
    write_moe(tmp_path, "qwen3_moe", "Q8_0", num_hidden_layers=1)
    data = (tmp_path / "model.gguf").read_bytes()
    generator = random.Random(0)
    refused = 0
    for i in range(60):
        altered = bytearray(data)
        if i % 3 == 0:
            del altered[generator.randrange(len(data)) :]
        else:  # a number, or one of the words
            at = generator.randrange(8, 1500) if i % 3 == 1 else generator.randrange(8, 9000)
            altered[at] = generator.randrange(256)
        file = tmp_path / f"damaged-{i}.gguf"
        file.write_bytes(altered)
        error = served_error(file)
        refused += error is not None
        assert error is None or (len(error) < 1500 and "Traceback" not in error)
    assert refused > 20


def test_scales_that_are_no_numbers_are_a_sentence(tmp_path):
    write_moe(tmp_path, "qwen3_moe", "Q8_0", num_hidden_layers=1)
    file = GgufFile.open(tmp_path / "model.gguf")
    tensor = next(t for t in file.tensors if t.name == "blk.0.ffn_up_exps.weight")
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[tensor.stop - 34 : tensor.stop - 32] = b"\0\x7e"  # of the last block
    (tmp_path / "model.gguf").write_bytes(data)
    error = served_error(tmp_path / "model.gguf")
    assert error is not None
    assert "up_proj.scales: a scale is not a number; download it again" in error


@pytest.mark.parametrize(
    "change",
    [
        {0: "../model.gguf"},
        {0: "."},
        {0: 3},
        {1: "X"},
        {2: [-1, -1]},
        {2: [1.0, 4]},
        {2: []},
        {3: -(10**6), 4: -1},
        {3: 2**63, 4: 2**63 + 8},
    ],
)
def test_a_list_of_tensors_that_lies_is_refused(tmp_path, change):
    """It lies in a folder that anybody may have written."""
    write_moe(tmp_path, "qwen3_moe", "Q8_0", num_hidden_layers=1)
    folder = locate_checkpoint(str(tmp_path / "model.gguf"))
    index = json.loads((folder / GGUF_INDEX).read_text())
    entry = index["tensors"]["model.layers.0.self_attn.q_proj.weight"]
    for place, value in change.items():
        entry[place] = value
    (folder / GGUF_INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint.open(folder)


def test_a_link_to_itself_is_a_sentence(tmp_path):
    (tmp_path / "model.gguf").symlink_to("model.gguf")
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read"):
        locate_checkpoint(str(tmp_path))


def test_what_is_not_supported_is_said(tmp_path):
    write_moe(tmp_path, "qwen3_moe")
    data = (tmp_path / "model.gguf").read_bytes()
    for old, new, expected in (
        (
            b"qwen3moe",
            b"qwen9moe",
            "expected a GGUF model of one of .*, llama, .* got 'qwen9moe'",
        ),
        (b"blk.0.attn_q_norm", b"blk.0.attn_q_nose", "unknown tensor blk.0.attn_q_nose.weight"),
        (b"qwen3moe.expert_count", b"qwen3moe.expert_cou_t", "the model is dense"),
        (b"qwen3moe.block_count", b"qwen3moe.block_cou_t", "qwen3moe.block_count: expected a num"),
    ):
        (tmp_path / "other.gguf").write_bytes(data.replace(old, new))
        with pytest.raises(CheckpointError, match=expected):
            locate_checkpoint(str(tmp_path / "other.gguf"))
