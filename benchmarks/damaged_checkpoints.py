"""Checkpoints that are damaged or made to harm: `python benchmarks/damaged_checkpoints.py`.

    python benchmarks/damaged_checkpoints.py [--format gptq --format gguf-Q4_K] [--count 40]

Each is a small checkpoint with one to three faults: in config.json, the index, the headers, the
tokenizer's files, the files themselves; for a published format also in what makes it the format
(`format_damage.py`). "plain" has mlx-lm's own formats. Loading one as a rank of one or three, and
computing a few tokens where one rank has all, must end with a result or with an error of ours in
one line, within bounded time and memory; a traceback, a crash, a hang, or bytes listed to be read
that the files do not have are failures. The last line of stdout is JSON, with counts for each
format; exit status 1 if something failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from format_damage import (
    NAMES,
    SAFETENSORS,
    damage_gguf,
    damage_safetensors,
    model_path,
    write_source,
)

LIMIT_S = 60  # of processor time for one checkpoint; ordinary ones take 0.1 s
LIMIT_BYTES = 64 << 20  # that a checkpoint of 1 MB may take beyond what the process has
PLAIN = "plain"
FAMILIES = ("qwen3_moe", "dbrx", "deepseek_v3", "gpt_oss", "nemotron_h", "mixtral")
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 7.5, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**30,
    "", "x", "\x1b[2Jx", "../../etc/passwd", "\ud800", [], [[]], [None] * 3, [1, 2], {}, {"a": 1},
    "float99", "base", "cache", "switch_layers", "rope_utils", "os", [-1] * 100,
)  # fmt: skip
JSON_FILES = (
    "config.json", "config.json", "config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip


def deep(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all members, the first 500."""
    found, rest = [], [(path, value)]
    while rest and len(found) < 500:
        path, value = rest.pop(0)
        if path:
            found.append(path)
        if isinstance(value, dict):
            rest += [((*path, key), member) for key, member in value.items()]
        elif isinstance(value, list):
            rest += [((*path, at), item) for at, item in enumerate(value[:20])]
    return found


def change_json(folder: Path, dice: random.Random) -> str:
    """One member of a JSON file becomes something else, or the file is none any more."""
    name = dice.choice(JSON_FILES)
    file = folder / name
    if not file.exists():
        file.write_text(dice.choice(("{}", "[]", '{"eos_token_id": ["a"]}', "", deep())))
        return f"{name} made"
    if dice.random() < 0.15:
        text = file.read_text()
        half, nested = text[: len(text) // 2], '{"a":' * 5000
        made = dice.choice(
            ("", "[]", "null", "3", '"x"', "{", "\x00", deep(), nested, half, text + text)
        )
        file.write_text(made)
        return f"{name} = {made[:20]!r}"
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return f"{name} left"
    if not (paths := places(data)):
        return f"{name} left"
    path, odd = dice.choice(paths), dice.choice(ODD)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    if dice.random() < 0.2 and isinstance(parent, dict):
        del parent[path[-1]]
        what = "deleted"
    elif isinstance(parent[path[-1]], int) and dice.random() < 0.5:
        number = parent[path[-1]]
        parent[path[-1]] = what = dice.choice((number * 1000, number + 1, -number, number * 10**9))
    else:
        parent[path[-1]] = what = odd
    file.write_text(json.dumps(data))
    return f"{name} {path} = {what!r}"[:120]


def change_header(folder: Path, dice: random.Random) -> str:
    """A header says something that its file does not hold."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return "no file left"
    file = dice.choice(files)
    data = file.read_bytes()
    if len(data) < 16:
        return "short file left"
    (length,) = struct.unpack("<Q", data[:8])
    if dice.random() < 0.3:
        made = dice.choice((0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1, 99_000_000))
        file.write_bytes(struct.pack("<Q", max(0, made)) + data[8:])
        return f"{file.name} header of {made}"
    try:
        header = json.loads(data[8 : 8 + length])
        name = dice.choice([key for key in header if key != "__metadata__"])
        entry = header[name]
        kind = dice.choice(("dtype", "shape", "data_offsets", "name", "deep", "entry"))
        if kind == "dtype":
            entry["dtype"] = dice.choice(("F64", "F99", 3, None, "I8", "F8_E4M3"))
        elif kind == "shape":
            shapes = ([], [0], [-1], [2**31, 2**31], ["a"], None, [1] * 99, entry["shape"][::-1])
            entry["shape"] = dice.choice(shapes)
        elif kind == "data_offsets":
            start, stop = entry["data_offsets"]
            offsets = (
                [stop, start],
                [start, stop + 8],
                [-8, stop],
                [0, 2**62],
                [start],
                "x",
                [1.5, 2],
            )
            entry["data_offsets"] = dice.choice(offsets)
        elif kind == "name":
            header[
                dice.choice(("", "x", "../x", "a" * 5000, "\x1b[2J", "model.layers.99999999.x"))
            ] = entry
            if dice.random() < 0.5:
                del header[name]
        elif kind == "entry":
            header[name] = dice.choice(ODD)
        text = json.dumps(header).encode() if kind != "deep" else deep().encode()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"{file.name} left"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"{file.name} {kind} of {name[:40]}"


def change_file(folder: Path, dice: random.Random) -> str:
    """A file is cut, extended, replaced or joined by another."""
    file = dice.choice([path for path in sorted(folder.iterdir()) if path.is_file()] or [folder])
    if file == folder:
        return "empty folder"
    kind = dice.choice(
        ("cut", "longer", "gone", "folder", "loop", "flip", "stray", "template", "code")
    )
    data = file.read_bytes()
    if kind == "cut":
        file.write_bytes(data[: dice.randrange(len(data) + 1)])
    elif kind == "longer":
        file.write_bytes(data + b"\0" * 999)
    elif kind == "flip" and data:
        at = dice.randrange(min(len(data), 4000))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :])
    elif kind in ("gone", "folder", "loop"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
        elif kind == "loop":
            file.symlink_to(file.name)
    elif kind == "stray":
        shutil.copy(
            file, folder / dice.choice(("model.safetensors", "model-9.safetensors", "a.json"))
        )
    elif kind == "template":
        text = dice.choice(
            ("{{", "{% for %}", "{{ 1/0 }}", "{{ messages[99].x }}", "{{ x.y.z }}" * 999)
        )
        (folder / "chat_template.jinja").write_text(text)
    elif kind == "code":
        change_json_members(folder / "config.json", {"auto_map": {"AutoConfig": "evil.Config"}})
        change_json_members(
            folder / "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Evil"},
        )
        (folder / "evil.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")
    return f"{file.name} {kind}"


def change_json_members(file: Path, members: dict[str, Any]) -> None:
    try:
        data = json.loads(file.read_text())
        file.write_text(json.dumps({**data, **members}))
    except (OSError, ValueError, RecursionError, TypeError):
        pass


Change = Callable[[Path, random.Random], str]
CHANGES: tuple[Change, ...] = (
    change_json, change_json, change_json, change_header, change_header, change_file,
)  # fmt: skip


def damage(folder: Path, dice: random.Random, changes: tuple[Change, ...]) -> str:
    """Make one fault."""
    try:
        return dice.choice(changes)(folder, dice)
    except Exception as error:  # the one before has left nothing here
        return f"none ({type(error).__name__})"


def load(path: Path, dice: random.Random) -> str:
    """Load as a rank and a server would, and compute; what became of it."""
    from cenacle.errors import CenacleError
    from cenacle.load_options import LoadOptions
    from cenacle.model.loader import load_rank_model
    from cenacle.runtime import resolve

    try:
        deployment = resolve(LoadOptions(str(path)))
        plan, rank = deployment.plan, 0
        if dice.random() < 0.3:
            plan = dice.choice((type(plan).whole, type(plan).sliced))(plan.spec, 3)
            rank = dice.randrange(3)
        require_inside(deployment.checkpoint, plan, rank)
        model = load_rank_model(deployment.checkpoint, plan, rank, lambda *_: None)
        if (text := deployment.tokenizer) is not None:
            text.decode(text.encode("hello"))
            if text.has_template:
                text.render([{"role": "user", "content": "hello"}])
        if plan.nodes == 1 and not compute(model, plan):
            return "refused"
    except CenacleError as error:
        message = str(error)
        assert message, "an error without words"
        assert "\n" not in message, f"an error of several lines: {message!r}"
        assert message.isprintable(), f"control characters: {message!r}"
        assert len(message) <= 2000, f"an error of {len(message)} characters"
        return "refused"
    return "loaded"


def require_inside(checkpoint: Any, plan: Any, rank: int) -> None:
    """What a rank would read lies in the files, and is not more than they have."""
    from cenacle.model.byte_ranges import total_bytes
    from cenacle.model.slicing import ModelLayout, required_ranges, slices_for

    sizes = {file.name: file.stat().st_size for file in checkpoint.files}
    ranges = required_ranges(slices_for(plan, rank, ModelLayout.read(checkpoint)))
    for name, listed in ranges.items():
        beyond = [r for r in listed if not 0 <= r[0] <= r[1] <= sizes[name]]
        assert not beyond, f"{name} of {sizes[name]} bytes: {beyond[0]} is to be read"
        assert total_bytes(listed) <= sizes[name], f"{name}: more is to be read than it has"


def compute(model: Any, plan: Any) -> bool:
    """A few tokens with the native kernels; False: what a rank reports as files that do not fit."""
    import mlx.core as mx

    from cenacle.collective.single import SingleRank
    from cenacle.model.expert_parallel import parallelize
    from cenacle.model.step_timer import StepTimer

    parallelize(model, plan.spec.family, plan, SingleRank(), StepTimer())
    try:
        mx.eval(model(mx.array([[1, 2, 3, 1]])))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False  # `ranks/worker.py` makes a sentence of these
    return True


def peak_bytes() -> int:
    """The most memory since `reset_peak`."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def damaged_copy(sources: Path, folder: Path, name: str, dice: random.Random) -> dict[str, Any]:
    """A source with faults, in `folder`; what was done."""
    source = dice.choice(sorted((sources / name).iterdir()))
    shutil.copytree(source, folder)
    changes = CHANGES
    if name != PLAIN:
        of_format = damage_safetensors if name in SAFETENSORS else damage_gguf
        changes = (*CHANGES, *[of_format] * 12)
    faults = [damage(folder, dice, changes) for _ in range(dice.randint(1, 3))]
    return {"family": source.name, "faults": faults}


def work(sources: Path, cases: list[tuple[str, int]]) -> None:
    """Damage and load; a line of JSON before and after each checkpoint."""
    for name, seed in cases:
        dice = random.Random(f"{name} {seed}")
        with tempfile.TemporaryDirectory(prefix="cenacle-damaged-") as made:
            folder = Path(made) / "model"
            os.environ["CENACLE_HOME"] = str(Path(made) / "home")
            case = {"format": name, "seed": seed}
            made_of = damaged_copy(sources, folder, name, dice)
            print(json.dumps({**case, **made_of}), flush=True)
            reset_peak()
            began, usual = time.process_time(), peak_bytes()
            signal.setitimer(signal.ITIMER_REAL, 10 * LIMIT_S)
            failure = ""
            try:
                result = load(model_path(folder, dice), dice)
            except BaseException as error:  # whatever is not an error of ours
                result, failure = "failed", f"{type(error).__name__}: {error}"[:300]
                import traceback

                failure += " at " + "; ".join(
                    f"{Path(f.filename).name}:{f.lineno}"
                    for f in traceback.extract_tb(error.__traceback__)[-6:]
                )
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds, more = time.process_time() - began, peak_bytes() - usual
            if not failure and seconds > LIMIT_S:
                result, failure = "failed", f"took {seconds:.0f} s"
            if not failure and more > LIMIT_BYTES:
                result, failure = "failed", f"took {more >> 20} MB"
            if (folder / "RAN").exists():
                result, failure = "failed", "code of the checkpoint ran"
            report = {**case, "result": result, "failure": failure, "mb": more >> 20}
            print(json.dumps(report), flush=True)


def run(names: list[str], count: int, first: int, sources: Path) -> dict[str, Any]:
    """All of them, in a process that is started again when it ends early."""
    cases = [(name, first + i) for name in names for i in range(count)]
    results = {name: Counter({"refused": 0, "loaded": 0, "failed": 0}) for name in names}
    failures, done, peak = [], 0, 0
    while done < len(cases):
        command = [sys.executable, __file__, "--work", str(sources), json.dumps(cases[done:])]
        process = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        begun: dict[str, Any] = {}
        for line in map(json.loads, process.stdout.splitlines()):
            if "faults" in line:
                begun = line
                continue
            results[line["format"]][line["result"]] += 1
            peak = max(peak, line["mb"])
            if line["failure"]:
                failures.append({**begun, "failure": line["failure"]})
            done, begun = done + 1, {}
        if done < len(cases):  # it ended in the middle
            name, seed = cases[done]
            results[name]["failed"] += 1
            ended = f"the process ended with {process.returncode}"
            failures.append({**(begun or {"format": name, "seed": seed}), "failure": ended})
            done += 1
    totals = sum(results.values(), Counter())
    counts = {key: totals[key] for key in ("refused", "loaded", "failed")}
    report = {"checkpoints": len(cases), "first_seed": first, **counts, "peak_mb": peak}
    return {**report, "formats": results, "failures": failures}


def write_sources(folder: Path, names: list[str]) -> None:
    from cenacle.model.synth import synth

    os.environ["CENACLE_HOME"] = str(folder / "home")
    for name in names:
        if name != PLAIN:
            write_source(folder / name, name)
            continue
        for family in FAMILIES:
            synth(folder / name / family, family=family, shard_bytes=200_000)


def main() -> None:
    """Entry point."""
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--format", action="append", choices=(PLAIN, *NAMES), metavar="NAME", help="default: all"
    )
    parser.add_argument("--count", type=int, default=40, help="checkpoints of each format")
    parser.add_argument("--seed", type=int, default=0, help="of the first; they are counted up")
    args = parser.parse_args()
    names = args.format or [PLAIN, *NAMES]
    with tempfile.TemporaryDirectory(prefix="cenacle-damaged-") as made:
        write_sources(Path(made), names)
        report = run(names, args.count, args.seed, Path(made))
    for failure in report["failures"]:
        print(json.dumps(failure), file=sys.stderr)
    print(json.dumps({**report, "failures": len(report["failures"])}))
    sys.exit(1 if report["failures"] else 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
