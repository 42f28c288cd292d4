"""Ranks start without transformers, and get it when they need it."""

import subprocess
import sys

import pytest

from support.scripted_app import DEMO

BEGIN = """
import sys
from cenacle import deferred_transformers as deferred
deferred.defer()
import mlx_lm.generate, mlx_lm.models.qwen3_moe, mlx_lm.utils
from mlx_lm.models.cache import KVCache
def is_loaded():
    return "transformers.utils" in sys.modules
assert not is_loaded()
"""
TOKENIZER = f"""
from pathlib import Path
from cenacle.text.tokenizer import ChatTokenizer
text = ChatTokenizer(Path({str(DEMO)!r}), {{}})
assert is_loaded()
assert text.decode(text.encode("12 + 30")) == "12 + 30"
from mlx_lm import tokenizer_utils
import transformers
assert issubclass(tokenizer_utils.NewlineTokenizer, transformers.PreTrainedTokenizerFast)
"""


@pytest.mark.parametrize(
    "code",
    [
        "assert not is_loaded()",
        TOKENIZER,
        "import transformers\nassert transformers.AutoConfig.from_pretrained\nassert is_loaded()",
        "from transformers.processing_utils import ProcessorMixin\nassert is_loaded()",
        "import transformers.processing_utils as used\nassert used.ProcessorMixin" + TOKENIZER,
        "import transformers.utils.import_utils as used\n"
        "assert used.fetch__all__.__module__ == 'cenacle.import_hooks'",
        "from mlx_vlm.models import glm4v_moe\nassert is_loaded()",
        "deferred.defer()\ndeferred.load()\ndeferred.load()\nassert is_loaded()" + TOKENIZER,
    ],
)
def test_transformers_is_imported_when_it_is_needed(code):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


RENDER = f"""
import sys
from cenacle import deferred_transformers
{{before}}
render = deferred_transformers.import_renderer()
from pathlib import Path
template = (Path({str(DEMO)!r}) / "chat_template.jinja").read_text()
messages = [{{{{"role": "user", "content": "12 + 30"}}}}]
print(render(conversations=[messages], chat_template=template, add_generation_prompt=True)[0])
print("transformers.utils.generic" in sys.modules)
"""


def test_chats_are_rendered_without_the_rest_of_transformers():
    outputs = []
    # A version whose renderer needs the rest.
    again = (
        "import importlib\nreal = importlib.import_module\n"
        "def fail_once(name):\n"
        "    importlib.import_module = real\n"
        "    raise ImportError(name)\n"
        "importlib.import_module = fail_once"
    )
    for before in ("", again, "import transformers", "deferred_transformers.defer()"):
        program = [sys.executable, "-W", "ignore", "-c", RENDER.format(before=before)]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    assert "12 + 30" in outputs[0][0]
    assert all(lines[:-1] == outputs[0][:-1] for lines in outputs)
    assert [lines[-1] for lines in outputs] == ["False", "True", "True", "True"]
