"""Which models a server has, and the options that go together."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import cenacle
from cenacle.cli.inference import read_models
from cenacle.cli.options import ModelsArguments, ServingArguments, parse_duration
from cenacle.errors import CheckpointError, InputError
from cenacle.load_options import LoadOptions
from cenacle.server.model_catalog import read_catalog

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"
LOAD = ServingArguments()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "notes.txt").write_text("no model")
    (folder / "empty").mkdir()
    (folder / "one").symlink_to(DEMO)
    shutil.copytree(DEMO, folder / "two")
    (folder / "odd").mkdir()
    (folder / "odd" / "config.json").write_text("{}")
    return folder


def test_a_folder_of_models_is_read_once_and_the_rest_is_named(folder):
    messages: list[str] = []
    catalog = read_catalog(["org/later"], folder, LoadOptions(""), messages.append)
    assert list(catalog) == ["org/later", "demo_model", "two"]
    assert catalog["two"].served.context_length == catalog["demo_model"].served.context_length
    assert catalog["two"].weights_bytes
    assert catalog["org/later"].served.context_length is None  # nobody was asked
    (left_out,) = messages
    assert left_out.startswith("odd is left out: ")


def test_two_of_one_name_none_at_all_and_what_is_no_model_are_refused(folder, tmp_path):
    options = LoadOptions("")
    with pytest.raises(InputError, match="models of different names"):
        read_catalog([str(DEMO), str(folder / "one")], None, options, print)
    with pytest.raises(InputError, match="at least one model, got none in"):
        read_catalog([], tmp_path, options, print)
    with pytest.raises(InputError, match="expected a folder, got"):
        read_catalog([], tmp_path / "nowhere", options, print)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_catalog(["./nowhere/model"], None, options, print)


@pytest.mark.parametrize(
    ("arguments", "names", "on_cluster", "message"),
    [
        ({"pin": ["x"]}, (), False, r"--pin: expected the name of a model \(demo_model, two\)"),
        ({"pin": ["two", "demo_model"], "max_loaded": 1}, (), False, "--pin: expected at most 1"),
        ({"idle_unload": "soon"}, (), False, "--idle-unload: expected a time such as 30m"),
        ({}, ("gpt-4",), False, "--served-model-name: expected one model, got 2"),
        ({"max_loaded": 2}, (), True, "a cluster has one model loaded at once"),
        ({"models_memory_gb": 9.0}, (), True, "only for `cenacle serve`"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder, arguments, names, on_cluster, message):
    models = ModelsArguments(**arguments)
    with pytest.raises(InputError, match=message):
        read_models([str(DEMO), str(folder / "two")], models, LOAD, names, on_cluster=on_cluster)


def test_what_was_asked_for_is_what_the_pool_does(folder):
    arguments = ModelsArguments(folder, "30m", ["two"], 2, 16.0)
    several = read_models([], arguments, LOAD, ("*",))
    pool = several.pool
    assert (pool.idle_s, pool.max_loaded, pool.memory_bytes) == (1800, 2, 16_000_000_000)
    assert pool.pinned == {"two"}
    assert several.title == "2 models (demo_model, two)"
    on_cluster = replace(arguments, max_loaded=0, models_memory_gb=None)
    assert read_models([], on_cluster, LOAD, (), on_cluster=True).pool.max_loaded == 1


def test_one_model_without_further_options_is_loaded_at_the_start():
    assert not ModelsArguments().is_pool(["a"])
    assert ModelsArguments().is_pool(["a", "b"])
    assert ModelsArguments(idle_unload="30m").is_pool(["a"])
    with pytest.raises(InputError, match="expected a folder or a repository, got none"):
        ModelsArguments().is_pool([])


def test_times_have_units():
    texts = ("never", "0", "0m", "90", "90s", "1.5m", "2h", "1d")
    expected = [None, None, None, 90, 90, 90, 7200, 86400]
    assert [parse_duration(text, "x") for text in texts] == expected
    for text in ("", "m", "-1s", "inf", "nan", "1w"):
        with pytest.raises(InputError):
            parse_duration(text, "x")
