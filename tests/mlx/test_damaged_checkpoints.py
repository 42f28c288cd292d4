"""Files that do not belong to a checkpoint, and files that were made to harm."""

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from cenacle import CheckpointError
from cenacle.cluster.node_info import checkpoint_digest
from cenacle.core.plan import Plan
from cenacle.engine.cache.disk_store import fingerprint
from cenacle.model.checkpoint import Checkpoint, locate_checkpoint
from cenacle.model.config_catalog import tiny_config
from cenacle.model.loader import load_rank_model
from cenacle.model.spec_reader import read_model_spec
from cenacle.model.synth import synth
from cenacle.model.workload import read_workload
from cenacle.planning.model_shapes import shape_from_config
from cenacle.text.tokenizer import ChatTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    synth(folder, family="qwen3_moe", shard_bytes=200_000)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source, tmp_path / "model")
    return tmp_path / "model"


def logits(folder: Path) -> mx.array:
    checkpoint = Checkpoint.open(folder)
    plan = Plan.whole(read_model_spec(checkpoint), 1)
    return load_rank_model(checkpoint, plan, 0, lambda *_: None)(mx.array([[1, 2, 3]]))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-99999.safetensors", "other.safetensors"]
)
def test_files_that_the_index_does_not_name_are_left_alone(
    source: Path, folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected, before = logits(folder), (checkpoint_digest(folder), fingerprint(folder, {}))
    synth(tmp_path / "other", family="qwen3_moe", seed=9)
    (whole,) = (tmp_path / "other").glob("*.safetensors")
    shutil.copy(whole, folder / name)
    with caplog.at_level(logging.WARNING):
        assert mx.array_equal(logits(locate_checkpoint(str(folder))), expected)
        locate_checkpoint(str(folder))
    (record,) = caplog.records
    assert f"not used, such as {name}" in record.getMessage()
    assert (checkpoint_digest(folder), fingerprint(folder, {})) == before


def test_a_stray_file_may_be_anything(folder: Path) -> None:
    expected = logits(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert mx.array_equal(logits(folder), expected)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    first = min(folder.glob("model-*.safetensors"))
    shutil.copy(first, folder / "model-00000.safetensors")
    with pytest.raises(
        CheckpointError, match=r"in model-00000.safetensors and .*; remove the file"
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd.safetensors", "a.bin", 3])
def test_an_index_names_files_beside_it_only(folder: Path, file: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(CheckpointError, match="expected"):
        Checkpoint.open(folder)


def test_no_code_of_a_checkpoint_is_run(folder: Path) -> None:
    """Not even when asked on the terminal: standard input says y to everything."""
    ran = folder / "RAN"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: ...\n")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
    settings = {"auto_map": auto, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for remove in ((), ("tokenizer.json",)):
        for name in remove:
            (folder / name).unlink()
        done = subprocess.run(
            [sys.executable, "-m", "cenacle", "generate", "-m", str(folder), "-p", "x"],
            input="y\n" * 9,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not ran.exists()
        assert "Traceback" not in done.stderr
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(CheckpointError, match="does not run"):
        ChatTokenizer(folder, config)
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    with pytest.raises(CheckpointError, match="executes no code"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested levels"),
        ('{"model_type": "qwen3_moe", "x": NaN}', "got NaN"),
        ('{"model_type": "cache"}', "supports model_type"),
        ('{"model_type": "../os"}', "a model_type that is a name"),
        ('{"model_type": "qwen3_moe", "text_config": ""}', "text_config: expected a JSON object"),
        ('{"model_type": "qwen3_moe", "text_config": [{}]}', "text_config: expected a JSON"),
        ('{"model_type": "qwen3_moe", "text_config": null}', "text_config: expected a JSON"),
        ('{"model_type": ["x"]}', "a model_type that is a name"),
        ('{"model_type": "qwen3_moe", "num_hidden_layers": 1000000000}', "from 0 to 1,000"),
        ('{"model_type": "qwen3_moe", "num_hidden_layers": 900}', "describes 900 layers"),
        ('{"model_type": "qwen3_moe", "num_experts": 9000}', "describes 9000 experts"),
        ('{"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 9}', "got 9"),
        ('{"model_type": "qwen3_moe", "hidden_size": 1e300}', "larger one"),
    ],
)  # fmt: skip
def test_odd_configs_are_refused_before_anything_is_built(
    folder: Path, text: str, reason: str
) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        logits(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "qwen3_moe", "text_config": ""}',
        '{"model_type": "qwen3_moe", "num_hidden_layers": 1000000000000}',
        "[" * 100_000,
    ],
)
def test_a_config_alone_is_checked_like_a_folders(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_workload(tmp_path / "config.json", None, 1000, 1, 100)


@pytest.mark.parametrize("limit", ["", [8000]])
def test_a_limit_of_an_activation_that_is_no_number_is_named(limit: object, tmp_path: Path) -> None:
    pytest.importorskip("mlx_vlm", reason="needs the extra vlm")
    config = tiny_config("deepseek_v4") | {"swiglu_limit": limit}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="swiglu_limit: expected a number"):
        read_workload(tmp_path / "config.json", None, 1000, 1, 100)


@pytest.mark.parametrize(
    ("family", "key", "value", "reason"),
    [
        ("qwen3_moe", "hidden_size", ["x"], "hidden_size: expected a whole number from 1"),
        ("qwen3_moe", "num_key_value_heads", 0, "num_key_value_heads: expected a whole number"),
        ("qwen3_moe", "mlp_only_layers", 3, "mlp_only_layers: expected a list of whole numbers"),
        ("qwen3_moe", "mlp_only_layers", [[]], "mlp_only_layers: expected a list of whole numbers"),
        ("qwen3_moe", "moe_intermediate_size", True, "expected a whole number from 0"),
        ("deepseek_v3", "first_k_dense_replace", 7, "none of the . layers in the config"),
        ("deepseek_v3", "kv_lora_rank", "x", "kv_lora_rank: expected a whole number"),
        ("kimi_linear", "linear_attn_config", {"kda_layers": 1}, "kda_layers: expected a list"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(
    family: str, key: str, value: object, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        shape_from_config("model", {**tiny_config(family), key: value})


def test_stray_tensors_are_refused_before_a_model_is_built(folder: Path) -> None:
    file = min(folder.glob("model-*.safetensors"))
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"stray.{i}": entry for i in range(50_000)} | json.loads(data[8 : 8 + length])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CheckpointError, match=r"expected at most .* tensors for what config.json"):
        Checkpoint.open(folder)


def change_header(file: Path, change: Callable[[dict], str | None]) -> None:
    """`change` alters the entries, or returns the header's text."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = (change(header) or json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_tensors_that_share_bytes_are_refused(folder: Path) -> None:
    """A small file would be a model of any size."""

    def share(header: dict) -> None:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        last = max(entries, key=lambda entry: entry["data_offsets"])
        last["data_offsets"] = [byte - 4 for byte in last["data_offsets"]]

    change_header(max(folder.glob("model-*.safetensors")), share)
    with pytest.raises(CheckpointError, match=r"begins inside .*; download it again"):
        Checkpoint.open(folder)


def test_a_name_that_is_there_twice_is_refused(folder: Path) -> None:
    def double(header: dict) -> str:
        name = next(name for name in header if name != "__metadata__")
        return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"

    change_header(min(folder.glob("model-*.safetensors")), double)
    with pytest.raises(CheckpointError, match="a name is listed twice"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("shape", [[-2, -2], [2.0, 2], [True, 4], [0, 2**63], [2**31, 0]])
def test_shapes_are_whole_numbers_that_mlx_has(folder: Path, shape: list) -> None:
    """Products of these are right."""

    def reshape(header: dict) -> None:
        entry = next(e for name, e in header.items() if name != "__metadata__")
        start = entry["data_offsets"][0]
        entry.update(dtype="U8", shape=shape, data_offsets=[start, start + 4 * (0 not in shape)])

    change_header(min(folder.glob("model-*.safetensors")), reshape)
    with pytest.raises(CheckpointError, match="expected dtype, shape and data_offsets"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_scales_of_mlx_that_are_no_numbers_are_a_sentence(tmp_path: Path, mode: str) -> None:
    folder = synth(tmp_path / "model", family="qwen3_moe", quantize=4, group_size=32, mode=mode)
    (file,) = folder.path.glob("*.safetensors")
    tensors = dict(mx.load(str(file)))
    name = next(name for name in sorted(tensors) if name.endswith("up_proj.scales"))
    tensors[name][-1, -1] = 0xFF if tensors[name].dtype == mx.uint8 else mx.nan
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales: a scale is not a number"):
        logits(folder.path)


def test_a_vocabulary_of_added_tokens_is_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][0], "id": 10_000 + i, "content": f"<{i}>"}
        for i in range(70_001)
    ]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="at most 70,000 added tokens"):
        ChatTokenizer(folder, {})


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "model-00001-of-00004.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(folder: Path, name: str, kind: str) -> None:
    """A pipe would block for ever, /dev/zero fill the memory."""
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for read in (Checkpoint.open, lambda folder: locate_checkpoint(str(folder))):
        with pytest.raises(CheckpointError, match="expected a regular file"):
            read(folder)


def test_a_generation_config_is_not_larger_than_a_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"a": "%s"}' % ("x" * (17 << 20)))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected at most"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [("qwen3_next", "partial_rotary_factor", -1), ("longcat_flash", "mla_scale_q_lora", 0)],
)
def test_a_config_that_fails_in_the_first_pass_is_named(
    family: str, key: str, value: object, tmp_path: Path
) -> None:
    """mlx-lm builds and loads such a model."""
    folder = synth(tmp_path / "model", family=family).path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    done = subprocess.run(
        [sys.executable, "-m", "cenacle", "generate", "-m", str(folder), "-p", "x"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == CheckpointError.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert f"the files do not fit {family}" in error


def test_plans_of_configs_that_lie() -> None:
    """The short form of `make fuzz`."""
    program, families = str(ROOT / "benchmarks" / "odd_configs.py"), ("deepseek_v3", "kimi_linear")
    done = subprocess.run(
        [sys.executable, program, "--every", "9", *families],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["refused"] > 20


DAMAGED = str(ROOT / "benchmarks" / "damaged_checkpoints.py")


def test_a_hundred_and_fifty_damaged_checkpoints() -> None:
    """The short form of `make fuzz`."""
    done = subprocess.run(
        [sys.executable, DAMAGED, "--format", "plain", "--count", "150"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["refused"] > 100


def test_damaged_checkpoints_of_every_kind_of_format() -> None:
    formats = ("block-fp8", "nvfp4", "int4-zeros", "awq", "gptq", "mixed-bits")
    formats += ("gguf-Q4_K", "gguf-split", "gguf-folder")
    chosen = [argument for name in formats for argument in ("--format", name)]
    done = subprocess.run(
        [sys.executable, DAMAGED, *chosen, "--count", "8", "--seed", "1000"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["checkpoints"] == 8 * len(formats)
    assert report["formats"].keys() == set(formats)
    assert report["refused"] > 20
