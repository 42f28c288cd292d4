"""MLX loads code that it compiled from $TMPDIR/mlx, whoever has put it there: nobody else can.

On CPUs ranks have nothing compiled: no compiler, and no such folder.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import cenacle
from cenacle import paths

DEMO = Path(cenacle.__file__).parent / "demo" / "demo_model"


PROGRAM = f"""
import cenacle
with cenacle.load({str(DEMO)!r}, nodes=2, kernels="mlx") as model:
    print(model.generate("What is 12 + 30?").text)
"""
COMMAND = ("-m", "cenacle", "generate", "-m", str(DEMO), "-n", "2", "-p", "What is 12 + 30?")


@pytest.mark.parametrize("arguments", [(*COMMAND, "--kernels", "mlx"), ("-c", PROGRAM)])
def test_ranks_need_no_compiler(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    home, shared, empty = tmp_path / "home", tmp_path / "shared", tmp_path / "empty"
    shared.mkdir(mode=0o777)
    empty.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if name != "MLX_DISABLE_COMPILE"},
        "TMPDIR": str(shared),
        "CENACLE_HOME": str(home),
        "PATH": str(empty),
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert not (shared / "mlx").exists()
    assert not list(home.rglob("*.so"))
    assert stat.S_IMODE((home / "tmp").stat().st_mode) == 0o700


OTHER_USER = 65534
MLX_ALONE = f"""
import mlx.core as mx
from mlx_lm.utils import load_model
from pathlib import Path
model, _ = load_model(Path({str(DEMO)!r}))
mx.eval(model(mx.array([[1]])))
"""
PLANTED = """
#include <fstream>
struct Ran { Ran() { std::ofstream("%s") << "code of another user ran"; } } ran;
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_a_planted_library_of_another_user_is_never_loaded(tmp_path: Path) -> None:
    """Also not one that is in the private folder since a time when others could write there."""
    program = [sys.executable, *COMMAND, "--kernels", "mlx"]
    mlx_alone = [sys.executable, "-c", MLX_ALONE]
    environment = {name: text for name, text in os.environ.items() if name != "MLX_DISABLE_COMPILE"}
    first = tmp_path / "first"
    first.mkdir()
    subprocess.run(mlx_alone, check=True, env={**environment, "TMPDIR": str(first)}, timeout=300)
    libraries = [path.relative_to(first) for path in first.rglob("*.so")]
    assert libraries
    ran, library = tmp_path / "RAN", tmp_path / "planted.so"
    (tmp_path / "planted.cpp").write_text(PLANTED % ran)
    compiler = ["c++", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "planted.cpp")]
    subprocess.run(compiler, check=True, timeout=300)
    shared, home = tmp_path / "shared", tmp_path / "home"
    for place in (shared, home / "tmp"):
        for name in libraries:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place / name)
        for path in (place, *place.rglob("*")):
            if path != home / "tmp":
                os.chown(path, OTHER_USER, OTHER_USER)
    shared.chmod(0o1777)
    (home / "tmp").chmod(0o777)

    environment |= {"TMPDIR": str(shared), "CENACLE_HOME": str(home)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert not ran.exists()
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    subprocess.run(mlx_alone, env=environment, timeout=300)
    assert ran.exists()  # it would have been: MLX by itself loads it


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.parametrize("kind", ["open", "link", "file", "missing", "mine", "was open", "planted"])
@pytest.mark.usefixtures("restored")
def test_a_folder_that_others_could_have_made_is_not_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("CENACLE_HOME", str(home))
    home.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "open":
        home.chmod(0o777)
    elif kind == "link":
        (home / "tmp").symlink_to(elsewhere)
    elif kind == "file":
        (home / "tmp").write_text("")
    elif kind == "mine":
        (home / "tmp").mkdir(mode=0o755)
    elif kind == "was open":
        (home / "tmp").mkdir()
        (home / "tmp").chmod(0o777)
    elif kind == "planted":
        if os.geteuid() != 0:
            pytest.skip("only root can give files to another user")
        (home / "tmp" / "mlx").mkdir(parents=True)
        (home / "tmp" / "mlx" / "lib.so").touch()
        os.chown(home / "tmp" / "mlx" / "lib.so", OTHER_USER, OTHER_USER)
        (home / "tmp").chmod(0o700)
    paths.use_private_temp_dir()
    used = Path(tempfile.gettempdir())
    assert str(used) == os.environ["TMPDIR"]
    assert (used == home / "tmp") == (kind in ("mine", "missing"))
    assert stat.S_IMODE(used.lstat().st_mode) == 0o700
    if used != home / "tmp":
        used.rmdir()


def test_folders_of_killed_programs_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    first = paths.make_session_dir()
    left = first.with_name(first.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    left.mkdir()
    (left / "control").write_text("")
    second = paths.make_session_dir()
    assert not left.exists()
    assert first.exists()
    assert stat.S_IMODE(second.stat().st_mode) == 0o700


def test_paths_of_sockets_stay_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = paths.make_session_dir()
    assert len(str(folder)) <= paths.MAX_SOCKET_FOLDER
    folder.rmdir()
