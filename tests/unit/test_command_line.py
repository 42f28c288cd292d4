"""The command line without a model: shared options, errors, help, completion, docs/cli.md."""

import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Annotated

import pexpect
import pytest
import typer
from typer.testing import CliRunner

from cenacle.calibration.validate import COLUMNS
from cenacle.cli import inference, main
from cenacle.cli.command import command, option
from cenacle.cli.early_checks import check_model, check_output
from cenacle.cli.options import ServingArguments
from cenacle.errors import CheckpointError, InputError
from cenacle.load_options import LoadOptions
from cenacle.model.checkpoint import Checkpoint
from cenacle.paths import HOME_VARIABLE
from support.program import run_here

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "src" / "cenacle" / "demo" / "demo_model"
PAGE = runpy.run_path(str(ROOT / "tools" / "write_cli_docs.py"))


def show_help(name, columns):
    """What `cenacle NAME --help` prints."""
    arguments, environment = [*name.split()[1:], "-h"], {"COLUMNS": str(columns)}
    return CliRunner().invoke(main.make_app(), arguments, env=environment).output


def run_cenacle(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "cenacle", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


@cache
def all_commands():
    root = typer.main.get_command(main.make_app())
    context = typer.Context(root, info_name="cenacle")
    return dict(PAGE["find_commands"](root, context, "cenacle"))


def test_the_page_of_the_command_line_is_current():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert page == PAGE["render_page"](), "run `make docs`"


def test_help_fits_narrow_terminals(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    root, commands = typer.main.get_command(main.make_app()), all_commands()
    for name in ("cenacle", *commands):
        root.main([*name.split()[1:], "-h"], prog_name="cenacle", standalone_mode=False)
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 40, name
        for param in commands[name].params if name in commands else ():
            is_option = param.param_type_name == "option"
            for shown in param.opts if is_option else [param.metavar or param.name.upper()]:
                assert shown in text, name


def test_help_shows_brackets_and_no_value_of_flags():
    text = show_help("cenacle serve", 100)
    assert "`cenacle[otel]`" in text
    assert "bool>" not in text
    assert "[default: 8080]" in text
    assert "[default: 8080;" in show_help("cenacle serve", 40)


@pytest.mark.parametrize("name", all_commands())
def test_every_command_has_a_summary_and_an_example(name):
    help_text = CliRunner().invoke(main.make_app(), [*name.split()[1:], "--help"]).output
    assert f"Example: {name}" in " ".join(help_text.split())
    assert not re.search(r"<(str|int|float|path|list)\b", help_text, re.IGNORECASE)
    for param in all_commands()[name].params:
        assert param.help, param.name
        assert param.help[0].isupper(), param.help
        assert param.help.rstrip(")").endswith("."), param.help


# For commands typer itself imports pydantic.
@pytest.mark.parametrize(
    ("arguments", "by_typer"),
    [(("--help",), []), (("--version",), []), (("up", "--help"), ["pydantic"])],
)
def test_help_and_version_import_nothing_heavy(arguments, by_typer):
    program = (
        "import sys\nfrom cenacle.cli.main import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    status = end.code\n"
        "heavy = {'mlx', 'numpy', 'starlette', 'pydantic', 'matplotlib', 'httpx', 'cryptography'}\n"
        "print(status, sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"0 {by_typer}", done.stderr


def test_a_command_needs_its_own_module_only():
    for module, names in main.COMMANDS.items():
        for name in names:
            (group,) = main.make_app(name).registered_groups
            assert group.typer_instance is import_module(f"cenacle.cli.{module}").app
    found = typer.main.get_command(main.make_app()).commands
    assert sorted(found) == sorted(chain(*main.COMMANDS.values()))
    for module, names in main.COMMANDS.items():
        if module not in main.GROUPS:
            group = typer.main.get_group(import_module(f"cenacle.cli.{module}").app)
            assert tuple(group.commands) == names


def test_the_version_is_printed():
    done = run_cenacle("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("cenacle 0.")


@pytest.mark.parametrize(
    ("shell", "environment", "expected"),
    [
        ("bash", {"COMP_WORDS": "cenacle gen", "COMP_CWORD": "1"}, "generate\n"),
        (
            "bash",
            {"COMP_WORDS": "cenacle serve --placement s", "COMP_CWORD": "3"},
            "sliced\n",
        ),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "cenacle gen"}, '"generate":'),
        (
            "fish",
            {
                "_TYPER_COMPLETE_ARGS": "cenacle gen",
                "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            },
            "generate\t",
        ),
    ],
)
def test_shells_complete_commands_and_values(shell, environment, expected):
    done = run_cenacle(**environment, _CENACLE_COMPLETE=f"complete_{shell}")
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "-m", str(DEMO)], "--prompt: expected a value, got none; give it with -p or"),
        (["serve", "-m", "x", "--port", "70000"], "--port: expected at most 65535, got '70000'"),
        (["serve", "-m", "x", "-n", "two"], "--nodes: expected an integer, got 'two'"),
        (["up", "x", "--trunk", "y"], "--trunk: expected one of auto, replicated, sharded, got"),
        (
            ["up", "x", "--backend", "mpi"],
            "--backend: expected one of auto, mesh, ring, jaccl, nccl",
        ),
        (["plan", "--machines", "x"], "MODEL: expected a value, got none"),
        (["serve", "-m", "x", "--nodse", "2"], "no such option: --nodse; did you mean --nodes?"),
        (["generat"], "no such command 'generat'; did you mean 'generate'?"),
        (["join", "a", "b"], "unexpected extra argument(s) (b); see `cenacle join --help`"),
        (["serve"], "--model: expected a folder or a repository, got none; or use --models-dir"),
        (["chat"], "--model: expected a folder or a repository, got none; or use"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(monkeypatch, arguments, message, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    done = run_here(*arguments, home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_the_csv_columns_in_the_help_of_validate_are_those_that_are_read():
    rows = next(p for p in all_commands()["cenacle validate"].params if p.name == "rows")
    assert [column for column in COLUMNS if column not in rows.help] == []


def test_load_options_have_the_names_and_defaults_of_the_python_interface():
    from cenacle.load_options import LoadOptions

    python = {field.name: field.default for field in fields(LoadOptions)}
    keywords = ServingArguments(nodes=1).to_keywords()
    assert set(keywords) <= set(python)
    # Each command names the model in its own way; the rest is for programs.
    assert set(python) - set(keywords) == {
        *("model", "nodes", "plan"),
        *("kv_group_size", "cores", "threads", "bandwidth_gb_s"),
    }
    differing = {name for name, value in keywords.items() if value != python[name]}
    assert differing == {"max_queue", "prefix_cache_disk_gb"}  # a server's own defaults


@dataclass(frozen=True)
class Size:
    width: int = option(2, "Width.", min=1)
    unit: str | None = option(None, "Unit.")


WIDE = Size(width=7)


def test_a_dataclass_parameter_becomes_options():
    app, calls = typer.Typer(), []

    @command(app, example="print")
    def narrow(name: Annotated[str, typer.Argument(help="Name.")], size: Size) -> None:
        calls.append((name, size))

    @command(app, example="print")
    def wide(size: Size = WIDE, *, again: bool = False) -> None:
        calls.append((again, size))

    for arguments in (["narrow", "a", "--unit", "m"], ["wide"], ["wide", "--width", "3"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert calls == [("a", Size(2, "m")), (False, WIDE), (False, Size(3))]
    assert CliRunner().invoke(app, ["wide", "--width", "0"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("synth", "--family", "mixtrl", "--out", "x"), "--family: unknown 'mixtrl'; nearest: mix"),
        (
            ("synth", "--family", "dbrx", "--quantize", "7", "--out", "x"),
            "--quantize: expected 2, 3, 4, 5, 6 or 8 bits, got 7",
        ),
        (
            ("synth", "--family", "dbrx", "--quantize", "4", "--group-size", "5", "--out", "x"),
            "--group-size: expected 32, 64 or 128, got 5",
        ),
        (("bench", "--synth", "mo-2b"), "--synth: unknown 'mo-2b'; nearest: moe-2b"),
        (("keys", "remove", "nobody"), "NAME: no key is named 'nobody'"),
        (
            ("inspect", "-m", str(DEMO), "-n", "2", "--node-weights", "1,2,3"),
            "--node-weights: expected 2 numbers",
        ),
        (
            (
                *("inspect", "-m", str(DEMO), "-n", "2", "--placement", "replicated"),
                *("--node-memory-gb", "1,2,3"),
            ),
            "--node-memory-gb: expected 2 numbers, got 3",
        ),
        (
            ("inspect", "-m", str(DEMO), "--save", "/nowhere/plan.json"),
            "--save: cannot write /nowhere/plan.json: No such file or directory",
        ),
        (("plan", "nomodel", "--machines", "m3-ultra"), "MODEL: unknown name 'nomodel'; nearest: "),
    ],
)
def test_errors_name_the_option_and_not_the_field(arguments, message, tmp_path):
    result = run_here(*arguments, home=tmp_path)
    assert result.returncode in (2, 4), result
    assert result.stderr.startswith(f"error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_an_encoding_without_a_character_ends_no_command(tmp_path):
    result = run_cenacle("doctor", CENACLE_HOME=str(tmp_path), PYTHONIOENCODING="ascii")
    assert "\\u2713 Versions match" in result.stdout
    assert result.stderr == ""


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "model"
    result = run_cenacle("synth", "--family", "dbrx", "--out", str(out))
    assert result.returncode == 1
    assert result.stderr == f"error: {out}: Not a directory\n"


def test_a_file_is_refused_before_minutes_of_work_whose_result_it_could_not_hold(tmp_path):
    check_output(tmp_path / "new" / "folders" / "x.toml", "out")
    check_output(None, "out")
    (tmp_path / "file").write_text("")
    check_output(tmp_path / "file", "out")  # it is replaced
    with pytest.raises(InputError, match=r"^--out: expected a file, got the folder "):
        check_output(tmp_path, "out")
    with pytest.raises(InputError, match=r"^--out: cannot write .*/file/x"):
        check_output(tmp_path / "file" / "x", "out")


def test_what_this_user_may_not_read_is_one_sentence(tmp_path, monkeypatch):
    """Tests may run as root, who may read all."""
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cenacle.paths.os.access", lambda path, mode: path != Path("demo"))
    refusal = "^demo cannot be read: permission denied; give this user access to it$"
    for refused in (check_model, LoadOptions, lambda name: Checkpoint.open(Path(name))):
        with pytest.raises(CheckpointError, match=refusal):
            refused("demo")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: expected a model's folder, got a file"):
        Checkpoint.open(tmp_path / "file")


# Nothing that takes seconds may be imported before these are refused.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "-m", "DEMO_modl", "-p", "x"), "no such folder, and not a Hub .*; nearest: "),
        (("serve", "-m", "/nowhere/model"), "no such folder"),
        (("up", "/nowhere/model"), "no such folder"),
        (("bench", "-m", "/nowhere/model"), "no such folder"),
        (("bench", "--synth", "mo-2b"), "nearest: moe-2b, .+, .+$"),
        (("synth", "--family", "nope", "--out", "x"), "nearest: .+, .+, .+$"),
        (("plan", "nomodel", "--machines", "zzz"), "nearest: .+, .+, .+$"),
    ],
)
def test_what_does_not_exist_is_refused_before_heavy_imports(arguments, message):
    arguments = [a.replace("DEMO", str(DEMO.parent / "demo")) for a in arguments]
    program = (
        "import sys\nfrom cenacle.cli.main import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'mlx', 'starlette', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]"], done.stderr
    assert re.search(f"^error: .*{message}", done.stderr.strip()), done.stderr


class Reached(Exception):
    """A command has got to where the model is used."""


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("generate", "-p", "x", "-m"), "cli.inference.load_model"),
        (("chat", "-m"), "cli.inference.load_model"),
        (("serve", "-m"), "cli.options.ModelsArguments.is_pool"),
        (("up",), "cli.options.ModelsArguments.is_pool"),
        (("bench", "-m"), "bench.measure.run_bench"),
        (("bench", "ablation", "-m"), "research.schedule_ablation.run_ablation"),
        (
            ("record-routing", "--prompts", __file__, "-m"),
            "calibration.routing_trace.record_routing",
        ),
        (("inspect", "-m"), "model.checkpoint.locate_checkpoint"),
        (("plan", "--machines", "m3-ultra"), "model.workload.read_workload"),
    ],
)
def test_demo_is_the_bundled_model_for_every_command(arguments, place, monkeypatch):
    used = []

    def use(*values):
        used.append(repr(values))
        raise Reached

    monkeypatch.setattr(f"cenacle.{place}", use)
    result = CliRunner().invoke(main.make_app(), [*arguments, "demo"])
    assert isinstance(result.exception, Reached), result.output
    assert str(DEMO) in used[0]


class AnsweringModel:
    """Keeps the prompt."""

    def __init__(self):
        self.prompts = []
        self.text = self

    def tokens_of(self, text):
        self.prompts.append(text)
        raise InputError("enough")


@pytest.mark.parametrize(
    ("options", "piped", "prompt"),
    [
        (["-p", "-"], "two\nlines\n", "two\nlines"),
        ([], "a\n\n", "a\n"),
        ([], "a\r\n", "a"),
        (["-p", "x"], "a", "x"),
        (["-p", ""], "a", ""),
        ([], "", None),
    ],
)
def test_a_pipe_is_the_prompt(options, piped, prompt, monkeypatch):
    model = AnsweringModel()
    monkeypatch.setattr(inference, "load_model", lambda *_: nullcontext(model))
    monkeypatch.setattr(inference, "isolate_text", nullcontext)
    result = CliRunner().invoke(
        main.make_app(), ["generate", "-m", str(DEMO), *options], input=piped, catch_exceptions=True
    )
    assert model.prompts == ([] if prompt is None else [prompt])
    assert str(result.exception).startswith("--prompt: expected" if prompt is None else "enough")


def test_a_prompt_that_is_no_text_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "cenacle", "generate", "-m", str(DEMO)],
        input=b"\xff\xfe",
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: --prompt: expected UTF-8 text on standard input")


# Ctrl-C as a module is imported: in the program's start, and in a command's middle.
@pytest.mark.parametrize(
    ("module", "supervised", "message"),
    [
        ("typer", False, "interrupted\n"),
        ("cenacle.planning.report", False, "interrupted\n"),
        ("typer", True, ""),
        ("cenacle.planning.report", True, ""),
    ],
)
def test_ctrl_c_is_one_line_at_any_moment(module, supervised, message):
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = ["plan", "mixtral-8x7b", "--machines", "m3-ultra"]
from cenacle.__main__ import main
main()
"""
    environment = {**os.environ, **({"CENACLE_SUPERVISED": "{}"} if supervised else {})}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (130, message)


def test_next_to_nothing_is_imported_before_ctrl_c_is_handled():
    program = (
        "import os, re, sys\nbefore = set(sys.modules)\nimport cenacle.__main__\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    own = {"cenacle", "cenacle.__main__", "cenacle.errors", "cenacle.import_hooks"}
    # A `.pth` file of the environment may have imported some of them before.
    others = {"__future__", "atexit", "collections.abc", "contextlib", "signal", "warnings"}
    imported = {name for name in done.stdout.split() if name.partition(".")[0] != "importlib"}
    assert own <= imported <= own | others, done


HANDLED = """
import os, signal, sys
set_handler = signal.signal
def note(number, handler):
    previous = set_handler(number, handler)
    if number == signal.SIGINT and previous is signal.default_int_handler:
        os.write(1, b"handled")
    return previous
set_handler(signal.SIGINT, signal.default_int_handler)
signal.signal = note
from cenacle.__main__ import main
main()
"""


@pytest.mark.parametrize("arguments", [("--version",), ("inspect", "-m", "demo")])
def test_ctrl_c_ends_a_start_with_one_line_whenever_it_comes(arguments):
    for delay_s in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3):
        with subprocess.Popen(
            [sys.executable, "-c", HANDLED, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout.read(7) == b"handled"
            time.sleep(delay_s)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
            # It may have done its work before.
            assert (process.returncode, errors) in ((130, b"interrupted\n"), (0, b"")), delay_s


def test_ctrl_c_after_the_work_is_done_leaves_the_status_as_it_is():
    # Freed by the interpreter after it took its signal handlers back.
    late = """
import os, signal, sys
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT):
        kill(pid, number)
sys.late = Late()
"""
    done = subprocess.run([sys.executable, "-c", late + HANDLED, "--version"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_goes_away_ends_the_program_silently():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as output:  # noqa: PTH123
        for arguments in (["--version"], ["keys", "list"]):
            done = subprocess.run(
                [sys.executable, "-m", "cenacle", *arguments],
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert (done.returncode, done.stderr) == (141, "")


def test_keys_are_listed_in_a_pipe_of_40_columns(monkeypatch, tmp_path):
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    name = "someone with a name that is long"
    CliRunner().invoke(main.make_app(), ["keys", "add", name, "--tokens-per-day", "2000000"])
    printed = {}
    for columns in ("", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        printed[columns] = CliRunner().invoke(main.make_app(), ["keys", "list"]).output
    wide, narrow = (max(map(len, text.splitlines())) for text in printed.values())
    assert narrow <= 40 < wide <= 120
    letters = [sorted(text.replace("\n", "").replace(" ", "")) for text in printed.values()]
    assert letters[0] == letters[1], "nothing is cut"


def test_without_streams_and_on_a_full_disk():
    shell = f"{sys.executable} -m cenacle keys list"
    for redirection, status, message in (
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "error: the output cannot be written: No space left on device\n"),
    ):
        if "/dev/full" in redirection and not Path("/dev/full").exists():
            continue
        done = subprocess.run(["sh", "-c", f"{shell} {redirection}"], capture_output=True)
        assert (done.returncode, done.stderr.decode()) == (status, message)


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["no color", "dumb"]
)
def test_a_terminal_without_colors_gets_none_in_40_columns(environment):
    child = pexpect.spawn(
        sys.executable,
        ["-m", "cenacle", "keys", "remove", "nobody"],
        env={"TERM": "xterm-256color", **os.environ, **environment},
        encoding="utf-8",
        timeout=120,
        dimensions=(20, 40),
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", child.before) is None  # no color; bold is none
    assert child.before.count("\n") == 1, "the terminal wraps, not the program"
