"""Names, units and quantizations: generous to people, strict to files."""

import json

import pytest

from cenacle.errors import CheckpointError, InputError
from cenacle.planning import catalog
from cenacle.planning.catalog import parse_quantization

KNOWN = catalog.load_catalog()

ENTRY = """
[machines.shed]
title = "The shed"
family = "cpu"
memory_gib = {{ v = [64], c = "M", s = "me" }}
bandwidth_gb_s = {{ v = {bandwidth}, c = "M", s = "me" }}
tflops = {{ v = 1, c = "M", s = "me" }}
usd = {{ v = [0], c = "M", s = "me" }}
watts = {{ v = 90, c = "M", s = "me" }}
{more}
"""


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        ("mlx-community/DeepSeek-V3-0324-4bit", "deepseek-v3"),
        ("mlx-community/Qwen3-235B-A22B-Instruct-2507-8bit", "qwen3-235b-a22b"),
        ("unsloth/DeepSeek-R1-0528-GGUF", "deepseek-v3"),
        ("databricks/dbrx-instruct", "dbrx-132b"),
        ("DBRX", "dbrx-132b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("gpt-oss-20b-MXFP4-Q8", "gpt-oss-20b"),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("moonshotai/Kimi-K2-Instruct-0905", "kimi-k2"),
        ("Qwen3 30B A3B", "qwen3-30b-a3b"),
        ("qwen3_next_80b_a3b_instruct", "qwen3-next-80b-a3b"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama-4-scout"),
        ("Qwen3-Coder-480B-A35B-Instruct-4bit-DWQ", "qwen3-coder-480b-a35b"),
        ("DeepSeek-V3.1-Terminus-Q4_K_M", "deepseek-v3"),
    ],
)
def test_models_by_any_name(alias, name):
    assert KNOWN.model(alias).name == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("M3 Ultra 512GB", "m3-ultra-512"),
        ("Mac Studio M3 Ultra (512 GB)", "m3-ultra-512"),
        ("m3-ultra", "m3-ultra-512"),
        ("M4 Max 128", "m4-max-128"),
        ("MacBook Pro M4 Max 64GB", "m4-max-64"),
        ("DGX Spark", "dgx-spark"),
        ("NVIDIA RTX 5090", "rtx-5090"),
        ("H100 80GB", "h100"),
        ("8xH100", "8xh100"),
        ("Strix Halo 128GB", "strix-halo-128"),
    ],
)
def test_machines_by_any_name(alias, name):
    assert KNOWN.machine(alias).name == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("10 GbE", "10gbe"),
        ("TB5 RDMA", "tb5-rdma"),
        ("Thunderbolt 5", "tb5-tcp"),
        ("InfiniBand", "infiniband"),
        ("200GbE RoCE", "roce-200"),
        ("RDMA over Thunderbolt 5", "tb5-rdma"),
    ],
)
def test_links_by_any_name(alias, name):
    assert KNOWN.link(alias).name == name


def test_several_machines():
    names = [m.name for m in KNOWN.parse_machines("1xm3-ultra-256, 2xm4-max-128,8xh100")]
    assert names == ["m3-ultra-256", "m4-max-128", "m4-max-128", "8xh100"]
    assert len(KNOWN.parse_machines("2x8xh100")) == 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: KNOWN.machine("m3-ulta-512"), r"nearest: .*m3-ultra-512"),
        (lambda: KNOWN.parse_machines("0xm3-ultra-512"), "expected 1 to 64"),
        (lambda: KNOWN.parse_machines("-1xm3-ultra-512"), "expected 1 to 64"),
        (lambda: KNOWN.parse_machines(""), "unknown name"),
        (lambda: KNOWN.link("tb5-rmda"), r"nearest: .*tb5-rdma"),
        (lambda: KNOWN.model("qwen3-30b-a4b"), r"nearest: qwen3-30b-a3b"),
        (lambda: KNOWN.model("llama-3.1-8b"), "nearest"),
        (lambda: KNOWN.model("  "), "nearest: .+, .+, .+$"),
    ],
)
def test_unknown_names_get_the_nearest(what, message):
    with pytest.raises(InputError, match=message):
        what()


@pytest.mark.parametrize(
    ("text", "expert", "trunk"),
    [
        (4, 4.5, 4.5),
        ("4.5", 4.5, 4.5),
        ("8bit", 8.5, 8.5),
        ("16", 16, 16),
        ("bf16", 16, 16),
        ("mxfp4", 4.25, 8.5),
        ("MXFP4-Q8", 4.25, 8.5),
        ("fp8", 8, 8),
        ("Q4_K_M", 4.5, 4.5),
        ("Q8_0", 8.5, 8.5),
        ("2", 2.5, 6.5),
        ("2.5/8.5", 2.5, 8.5),
        ("int4", 4.5, 4.5),
        ("4.0", 4.5, 4.5),
    ],
)
def test_quantizations(text, expert, trunk):
    q = parse_quantization(text)
    assert (q.expert_bits, q.trunk_bits) == (expert, trunk)


@pytest.mark.parametrize("text", ["", "7", "0", "-4", "nan", "four", "64", "1/2/3", "0.1/4", "inf"])
def test_what_is_no_quantization(text):
    with pytest.raises(InputError, match="expected bits"):
        parse_quantization(text)


def test_every_entry_is_whole():
    """Every machine, link and model can be had, with a source for each number."""
    for chip, memory in KNOWN.machine_names().values():
        machine = KNOWN.machine(f"{chip}-{memory:g}")
        assert all(
            f.source and f.confidence in catalog.CONFIDENCE_LEVELS for f in machine.facts.values()
        )
    for name in KNOWN.links:
        assert KNOWN.link(name).facts
    for name, row in KNOWN.models.items():
        shape = KNOWN.model(name)
        assert sum(a.layers for a in shape.attention) == shape.layers
        if "total_b" in row:
            assert shape.total / 1e9 == pytest.approx(row["total_b"], rel=0.02), name
        if "active_b" in row:  # the tables differ in whether they count the embedding
            assert shape.active / 1e9 == pytest.approx(row["active_b"], rel=0.2), name


def test_an_owners_machine(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(ENTRY.format(bandwidth=50, more=""))
    machine = catalog.load_catalog([file]).machine("shed")
    assert machine["bandwidth_gb_s"] == 50
    assert machine.usd is None


@pytest.mark.parametrize(
    ("bandwidth", "more", "message"),
    [
        (50, 'bandwidth_gbps = { v = 1, c = "A", s = "" }', "nearest: bandwidth_gb_s"),
        (-1, "", "positive"),
        ('"fast"', "", "positive"),
        (50, 'efficiency = { v = 0.5, c = "Z", s = "" }', "confidence"),
        (50, 'efficiency = { v = 0.5, c = "A", source = "" }', "unknown key 'source'"),
        (50, "[models.x]", "expected tables machines and links"),
        (50, "[links.x]\ntitle='x'", "missing"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_where(tmp_path, bandwidth, more, message):
    file = tmp_path / "mine.toml"
    file.write_text(ENTRY.format(bandwidth=bandwidth, more=more))
    with pytest.raises(InputError, match=message):
        catalog.load_catalog([file])


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        catalog.load_catalog([tmp_path / "none.toml"])
    (tmp_path / "bad.toml").write_text("[machines")
    with pytest.raises(InputError, match="cannot read"):
        catalog.load_catalog([tmp_path / "bad.toml"])


def test_the_owners_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / "shed.toml").write_text(ENTRY.format(bandwidth=50, more=""))
    assert catalog.load_catalog().machine("shed").name == "shed"


def test_a_dense_model_is_refused():
    from cenacle.planning.model_shapes import shape_from_config

    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 9}
    with pytest.raises(CheckpointError, match="the config has no experts"):
        shape_from_config("llama", config)
    with pytest.raises(CheckpointError, match="none of num_hidden_layers"):
        shape_from_config("x", json.loads("{}"))
