"""Which plan is chosen, and what is said of it."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from cenacle.core.model_spec import DenseModule, ModelSpec, MoELayer
from cenacle.errors import PlanError
from cenacle.planning import catalog
from cenacle.planning.catalog import CatalogLink, Fact, Machine
from cenacle.planning.choose_plan import choose_plan
from cenacle.planning.model_shapes import shape_from_config
from cenacle.planning.perf_model import PaperConstants
from cenacle.planning.plan_cost import MeasuredMachines


def model(expert_bytes: int, modules: tuple[DenseModule, ...] = ()) -> ModelSpec:
    moe = tuple(MoELayer(i, 16, expert_bytes, units=8) for i in range(10))
    trunk = sum(m.bytes for m in modules) + 5000
    return ModelSpec("mixtral", 10, moe, 4, trunk, None, 9, "float32", None, modules, 1000)


HEAD = DenseModule("lm_head", "head", 100, 10**7)


@pytest.mark.parametrize(
    ("spec", "options", "expected", "reason"),
    [
        (model(10**8), {}, "sliced/replicated", "experts sliced, trunk replicated: "),
        (model(10**8, (HEAD,)), {}, "sliced/sharded", "sliced/replicated"),
        (model(10**8, (HEAD,)), {"latency_s": 10}, "sliced/replicated", "10000 ms per all-reduce"),
        (model(10**8, (HEAD,)), {"trunk": "replicated"}, "sliced/replicated", "whole/replicated"),
        (model(10**8, (HEAD,)), {"placement": "whole"}, "whole/sharded", "whole/replicated"),
        (replace(model(10**8), unsliceable_reason="no"), {}, "whole/replicated", ""),
        (model(10**8), {"gpu": True}, "sliced/replicated", "400 GB/s"),
        (model(10**8), {"placement": "replicated"}, "replicated/replicated", ""),
        (model(10**8), {"trunk": "sharded"}, "sliced/sharded", "not plain grouped-query"),
    ],
)
def test_choices(spec, options, expected, reason):
    plan, why = choose_plan(spec, 2, **options)
    assert f"{plan.placement}/{plan.trunk}" == expected
    assert reason in why


SHAPE = {
    "model_type": "mixtral", "hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128,
    "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 9,
    "num_local_experts": 16, "num_experts_per_tok": 4, "max_position_embeddings": 4096,
}  # fmt: skip


def machines(*gb_s: float, latency_us: float = 100.0, config: dict = SHAPE) -> MeasuredMachines:
    """Machines on which only reads and all-reduces take time."""
    numbers = {"memory_gib": 64, "tflops": 1000, "usd": 0, "watts": 0, "efficiency": 1}
    numbers |= {"kv_efficiency": 1, "compute": 1, "attention_compute": 1, "overhead_us": 0}
    facts = {k: Fact(v, "M", "") for k, v in numbers.items()}
    nodes = tuple(
        Machine(f"m{r}", "", "cpu", {**facts, "bandwidth_gb_s": Fact(r, "M", "")}, 0.9)
        for r in gb_s
    )
    between = {"latency_us": Fact(latency_us, "M", ""), "gb_s": Fact(1, "M", "")}
    return MeasuredMachines(
        config, nodes, CatalogLink("l", "", "mesh", between), PaperConstants(0.2, 0, 1, 0), "a test"
    )


def test_measured_machines_override_assumed_ones():
    plan, why = choose_plan(model(10**8, (HEAD,)), 2, measured=machines(50, 50))
    assert plan.placement == "sliced"
    assert "at 50 GB/s per node and 0.1 ms per all-reduce, a test" in why


def test_a_model_of_unknown_shape_is_judged_by_its_lower_bound():
    plan, why = choose_plan(model(10**8), 2, measured=machines(50, 25, config={"model_type": "x"}))
    assert plan.placement == "sliced"
    assert "50 GB/s per node and 0.1 ms per all-reduce, a test" in why


def test_one_node_needs_no_choice():
    plan, why = choose_plan(model(5), 1)
    assert (plan.placement, plan.trunk, why) == ("whole", "replicated", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "half"}, "expected whole, sliced, replicated or auto, got 'half'"),
        ({"trunk": "half"}, "expected replicated or sharded, got 'half'"),
        ({"node_memory_bytes": [1, 1]}, "expected placement replicated, got auto"),
        ({"placement": "sliced", "nodes": 9}, "8 slices at most"),
        ({"nodes": 17}, "at most 16"),
    ],
)
def test_impossible_choices(options, message):
    with pytest.raises(PlanError, match=message):
        choose_plan(model(5), **{"nodes": 2, **options})


# The choices of the program before its two models of a token's time became one. A key is
# model, nodes, node weights, trunk, device and latency (us); "measured" is the GB/s of a machine.
CHOICES = json.loads((Path(__file__).parent / "plan_choices.json").read_text())
KNOWN = catalog.load_catalog()
GRID_MODELS = (
    *("dbrx", "qwen3-30b-a3b", "gpt-oss-120b", "deepseek-v3", "qwen3-next-80b-a3b", "mixtral-8x7b"),
)


def grid_config(name: str) -> dict:
    """The first layers of a model of the catalog, with few experts."""
    row = KNOWN.models[KNOWN.model(name).name]
    config = json.loads(json.dumps(KNOWN.configs[row["config"]]["config"]))
    limits = dict.fromkeys(("num_hidden_layers", "n_layers"), 2)
    limits |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 32)
    limits["first_k_dense_replace"] = 1
    for table in (config, config.get("text_config") or {}):
        table |= {key: min(table[key], limit) for key, limit in limits.items() if key in table}
    return config


def grid_spec(name: str) -> ModelSpec:
    """A spec of that size at 4.5 bits, with everything that can be divided."""
    s, size = shape_from_config(name, grid_config(name)), 4.5 / 8
    modules: list[DenseModule] = []
    for attention in s.attention if s.kv_heads else ():
        head = int(s.hidden * attention.head_dim * 2 * size)
        counts = (attention.heads, head, attention.kv_heads, head)
        modules += [DenseModule("self_attn", "attention", *counts)] * attention.layers
    if dense_layers := s.layers - s.moe_layers:
        width = int(s.dense / dense_layers * size) // 64
        modules += [DenseModule("mlp", "mlp", 64, width)] * dense_layers
    kind = "head" if s.head else "tied"
    modules.append(DenseModule("lm_head", kind, s.vocabulary, int(s.hidden * size)))
    units = max(1, int(s.expert / 3 / s.hidden) // 64)
    layer = (s.experts, int(s.expert * size), int(s.shared * size), units, units)
    moe = tuple(MoELayer(i, *layer) for i in s.moe_ids)
    sizes = (int(s.trunk * size), None, s.vocabulary, "bfloat16", None, tuple(modules))
    return ModelSpec(s.family, s.layers, moe, s.top_k, *sizes, int(s.embedding * size))


def grid_machines(name: str, gb_s: float, weights: tuple[float, ...], latency_us: float):
    numbers = {"memory_gib": 512, "tflops": 20, "usd": 0, "watts": 0, "efficiency": 0.8}
    numbers |= {"kv_efficiency": 0.5, "compute": 0.5, "attention_compute": 0.2}
    facts = {k: Fact(v, "M", "") for k, v in {**numbers, "overhead_us": 100}.items()}
    nodes = tuple(
        Machine("m", "", "cpu", {**facts, "bandwidth_gb_s": Fact(gb_s * weight, "M", "")}, 0.9)
        for weight in weights
    )
    link = CatalogLink(
        "l", "", "mesh", {"latency_us": Fact(latency_us, "M", ""), "gb_s": Fact(2, "M", "")}
    )
    constants = PaperConstants(0.2, 0, 1, 0)
    return MeasuredMachines(grid_config(name), nodes, link, constants, "a test")


def grid():
    for name in GRID_MODELS:
        spec = grid_spec(name)
        for nodes, trunk, gpu, latency_us in product(
            (2, 8), ("auto", "replicated"), (False, True), (3, 100, 20_000)
        ):
            for weights in ((1.0,) * nodes, (2.0, *(1.0,) * (nodes - 1))):
                node_weights = None if len(set(weights)) == 1 else weights
                for gb_s in (None, 10, 800) if trunk == "auto" else (None,):
                    measured = gb_s and grid_machines(name, gb_s, weights, latency_us)
                    key = f"{name} {nodes} {weights[0]:g} {trunk} {'gpu' if gpu else 'cpu'}"
                    latency_s = latency_us / 1e6
                    options = (node_weights, "auto", trunk, None, gpu, latency_s, measured)
                    yield f"{key} {latency_us} {gb_s or 'assumed'}", (spec, nodes, *options)


def test_choices_are_those_of_the_grid():
    chosen = {}
    for key, arguments in grid():
        plan, _ = choose_plan(*arguments)
        chosen[key] = f"{plan.placement}/{plan.trunk}"
    expected = {key: placement for placement, keys in CHOICES.items() for key in keys}
    assert chosen == expected
