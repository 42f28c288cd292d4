"""Drafting layers of families for which mlx-vlm has a drafter: what they compute is what it does.

The reference is mlx-vlm's drafter over the whole text at once. That answers do not change:
test_mtp.py, test_group_drafts.py.
"""

import mlx.core as mx
import pytest

from cenacle.core.model_config import text_config
from cenacle.engine.speculative.draft_model import load_mtp
from cenacle.model.checkpoint import Checkpoint
from support.mtp_checkpoint import EMBEDDINGS, write_mtp

FAMILIES = ("hy_v4", "nemotron_h", "qwen4_exp")
IDS = [(37 * i * i + 11 * i + 5) % 500 for i in range(40)]


def load_reference(checkpoint):
    """mlx-vlm's drafter, and all tensors of the file."""
    pytest.importorskip("mlx_vlm", reason="needs the extra vlm")
    from mlx_vlm.speculative.drafters.mtp_split import get_mtp_splitter

    splitter = get_mtp_splitter(source_config=checkpoint.config)
    text = splitter.read_text_config(checkpoint.config)
    tensors = mx.load(str(checkpoint.files[0]))
    chosen = {n: t for n, t in tensors.items() if splitter.select_keys(n, text)}
    weights = splitter.run_sanitize(splitter.rename(chosen, text), text)
    kind = splitter.draft_model_cls
    config = kind.__init__.__annotations__["config"]
    drafter = kind(config.from_dict({"text_config": text}))
    drafter.load_weights(list(weights.items()))
    return drafter, tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_computes_what_mlx_vlm_computes(tmp_path, family):
    """Read token by token with a cache, against mlx-vlm's drafter over the whole text."""
    checkpoint = Checkpoint.open(write_mtp(tmp_path / family, family))
    drafter, tensors = load_reference(checkpoint)
    embedding = next(t for n, t in tensors.items() if n.endswith(EMBEDDINGS))
    output = next(t for n, t in tensors.items() if n.endswith("lm_head.weight"))
    ids, text = mx.array([IDS]), text_config(checkpoint.config)
    width = text["hidden_size"] * (text["hc_count"] if family == "qwen4_exp" else 1)
    hidden = mx.random.normal((1, len(IDS), width), key=mx.random.key(1))
    if family == "hy_v4":
        expected = passed_on = drafter._forward_hidden(embedding[ids], hidden, None, None)
    else:
        own_caches = drafter.make_cache()
        expected, passed_on = drafter._forward_hidden(embedding[ids], hidden, ids, own_caches)
    head = load_mtp(checkpoint, "mlx")
    caches, logits, states = head.make_caches(), [], []
    for part in (slice(0, 30), slice(30, 31), slice(31, 40)):
        got, state = head(ids[:, part], hidden[:, part], caches)
        logits.append(got)
        states.append(state)
    assert mx.allclose(mx.concatenate(states, axis=1), passed_on, atol=1e-4)
    for got, end in zip(logits, (29, 30, 39), strict=True):
        assert mx.allclose(got, expected[:, end] @ output.T, atol=1e-3)
