"""Shapes read from config.json against the models that mlx-lm builds of them."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from cenacle.model import architecture, config_catalog, synth
from cenacle.planning.model_shapes import shape_from_config

# Small models whose norms, biases and adapters are a large part: their shapes are not asked for.
TOLERANCE = 0.01


def counted(config):
    model = synth.build_lazy_model(config)
    architecture.unify_experts(model)
    total = sum(v.size for _, v in tree_flatten(model.parameters()) if isinstance(v, mx.array))
    blocks = architecture.find_blocks(model)
    routed = sum(
        m.weight.size for b in blocks for m in b.linears.values() if isinstance(m.weight, mx.array)
    )
    return total, routed, [b.layer for b in blocks]


@pytest.mark.parametrize("name", sorted(config_catalog.model_catalog()))
def test_the_catalogs_shapes(name):
    config = config_catalog.full_config(name)
    total, routed, layers = counted(config)
    shape = shape_from_config(name, config)
    assert list(shape.moe_ids) == layers
    assert shape.routed == routed
    assert shape.total == pytest.approx(total, rel=TOLERANCE)
    assert sum(a.layers for a in shape.attention) == shape.layers


@pytest.mark.parametrize("family", config_catalog.family_names())
def test_every_familys_config_can_be_planned(family):
    """A config.json of any family: its parameters are those of mlx-lm's model."""
    from cenacle.model.workload import count_parameters

    config = config_catalog.tiny_config(family)
    total, routed, layers = counted(config)
    shape = count_parameters(shape_from_config(family, config), config)
    assert list(shape.moe_ids) == layers
    assert shape.total == pytest.approx(total, rel=0.01)
    assert shape.routed == pytest.approx(routed, rel=0.1)  # experts' biases
    assert shape.active <= shape.total
