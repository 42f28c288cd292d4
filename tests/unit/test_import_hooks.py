"""What the hooks change in transformers finds the same names as before."""

import ast
from pathlib import Path
from types import ModuleType

import transformers
from transformers.utils import import_utils

from cenacle import import_hooks

MODELS = Path(transformers.__file__).parent / "models"
TEXTS = [path.read_text() for path in sorted(MODELS.glob("q*/*.py"))]

ODD = (
    "",
    "import os\n",
    '__all__ = ["A"]\n',
    'x = 1\n__all__ = ["A", "B"]\n',
    '__all__ = ["A"]\n__all__ = [\n    "B",\n    "C",\n]\nx = ["__all__"]\n',
)


def test_names_are_found_from_the_end():
    tree = ast.parse(Path(import_utils.__file__).read_text())
    functions = [n for n in tree.body if getattr(n, "name", "") == "fetch__all__"]
    module = ModuleType("import_utils")
    exec(compile(ast.Module(functions, []), "import_utils", "exec"), vars(module))
    find_names = module.fetch__all__
    with import_hooks.AROUND_IMPORT["transformers.utils.import_utils"](module):
        pass
    assert module.fetch__all__ is not find_names
    assert any(find_names(text) for text in TEXTS)
    for text in (*ODD, *TEXTS):
        assert module.fetch__all__(text) == find_names(text)


def test_folders_are_searched_once():
    """There are more than `functools.lru_cache` keeps by itself."""
    search = import_utils.create_import_structure_from_path
    assert search.cache_info().maxsize is None
    folder = MODELS / "qwen2"
    assert search(str(folder)) == search.__wrapped__(str(folder))


def test_mlx_lm_downloads_when_it_is_asked(monkeypatch):
    import huggingface_hub
    from mlx_lm import utils

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (a, k))
    assert utils.snapshot_download("org/model", revision="x") == (("org/model",), {"revision": "x"})


def test_signatures_of_configs_are_read_once():
    import inspect

    from mlx_lm.models import base, qwen3_moe

    assert base.inspect is not inspect
    assert base.inspect.signature.cache_info().maxsize is None
    assert base.inspect.signature(qwen3_moe.ModelArgs) == inspect.signature(qwen3_moe.ModelArgs)
    misses_before = base.inspect.signature.cache_info().misses
    config = {f"unknown {n}": n for n in range(9)}
    for kind in (base.BaseModelArgs, base.BaseModelArgs):
        assert kind.from_dict(config) == kind()
    assert base.inspect.signature.cache_info().misses <= misses_before + 1
