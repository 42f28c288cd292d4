"""Where the program's folders are."""

import stat
from pathlib import Path

import pytest

from cenacle import paths
from cenacle.errors import InputError
from cenacle.load_options import LoadOptions


def test_cenacle_home_holds_everything(monkeypatch, tmp_path):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, "/elsewhere")
    assert paths.config_dir() == paths.cache_dir() == paths.state_dir() == tmp_path
    assert paths.cluster_dir() == tmp_path / "cluster"
    assert paths.catalog_dir() == tmp_path / "catalog"
    assert paths.models_dir() == tmp_path / "models"
    assert paths.prefix_cache_dir() == tmp_path / "prefixes"
    assert paths.chat_history_file() == tmp_path / "chat_history"


@pytest.mark.parametrize(
    ("variable", "folder", "default"),
    [
        ("XDG_CONFIG_HOME", paths.config_dir, ".config"),
        ("XDG_CACHE_HOME", paths.cache_dir, ".cache"),
        ("XDG_STATE_HOME", paths.state_dir, ".local/state"),
    ],
)
def test_folders_without_cenacle_home(monkeypatch, tmp_path, variable, folder, default):
    monkeypatch.delenv("CENACLE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert folder() == tmp_path / "cenacle"
    monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / default / "cenacle"


def test_the_config_folder_is_created_for_its_owner_only(monkeypatch, tmp_path):
    monkeypatch.setenv("CENACLE_HOME", str(tmp_path / "a" / "b"))
    assert paths.make_config_dir() == tmp_path / "a" / "b"
    assert stat.S_IMODE(paths.make_config_dir().stat().st_mode) == 0o700
    monkeypatch.setenv("CENACLE_HOME", str(Path("/dev/null/x")))
    with pytest.raises(InputError, match="CENACLE_HOME"):
        paths.make_config_dir()


def test_bench_follows_cenacle_home_and_xdg_cache_home(monkeypatch, tmp_path):
    from cenacle.bench import measure
    from cenacle.load_options import LoadOptions

    monkeypatch.setenv("CENACLE_HOME", str(tmp_path))
    assert measure.BenchConfig(LoadOptions("model")).cache_dir == tmp_path
    monkeypatch.delenv("CENACLE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert measure.BenchConfig(LoadOptions("model")).cache_dir == tmp_path / "xdg" / "cenacle"


def test_demo_is_the_bundled_model_unless_the_working_folder_has_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    bundled = str(paths.BUNDLED_MODELS / "demo_model")
    assert Path(bundled, "config.json").exists()
    (tmp_path / "demo").mkdir()  # many projects have such a folder
    for name in ("demo", "./demo", "org/demo", "demos", ""):
        assert paths.resolve_model(name) == (bundled if name == "demo" else name)
    options = LoadOptions("demo", draft_model="demo")
    assert (options.model, options.draft_model) == (bundled, bundled)
    (tmp_path / "demo" / "config.json").touch()
    assert paths.resolve_model("demo") == LoadOptions("demo").model == "demo"
