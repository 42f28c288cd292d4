"""Machines, links, models and quantisations by name, from `catalog/*.toml`.

Owns: reading the tables strictly (an unknown key or unit is an error), finding an entry by any of
its names, an owner's own entries, and where each number comes from.
Does not know: time, schemes.
Invariant: whatever is not known gives an `InputError` with the nearest known names.
Next: `cost.py` computes with what this gives; the tables say what their columns are.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..paths import catalog_dir
from .model_shapes import ModelShape, shape_from_config, shape_from_table

CATALOG_DIR = Path(__file__).parent / "catalog"
MODEL_CONFIGS_FILE = Path(__file__).parent.parent / "model" / "configs" / "models.json"
CONFIDENCE_LEVELS = {
    "A": "primary source read",
    "B": "two secondary sources",
    "C": "one secondary source",
    "D": "unverified: recalled",
    "E": "derived",
    "M": "measured here",
    "F": "fitted",
}
# A Mac wires about this share of its memory by default (ds4#909, vmlx-swift#417); a GPU's driver
# and a Linux system leave more.
DEFAULT_MEMORY_FRACTION = {"apple": 0.75, "cpu": 0.9, "amd": 0.95, "nvidia": 0.95}


@dataclass(frozen=True)
class Fact:
    """A number with its confidence (see `CONFIDENCE`) and source."""

    value: float
    confidence: str
    source: str

    def __str__(self) -> str:
        mark = " (unverified)" if self.confidence == "D" else ""
        return f"{self.value:g}{mark} [{self.confidence}: {self.source}]"


@dataclass(frozen=True)
class Machine:
    """A machine.

    Args:
        name: of this memory size: m3-ultra-512.
        title: for people.
        family: whose efficiency and overhead apply.
        facts: "memory_gib", "bandwidth_gb_s", "tflops", "usd", "watts", and the family's
            "efficiency" (share of the bandwidth that weights are read at), "kv_efficiency",
            "compute" (share of the operations), "attention_compute", "overhead_us" (a plain layer);
            perhaps "alone_gb_s" and "alone_overhead_us" (see `alone`), "expert_us" (`expert_s`).
        wired: share of memory that may hold weights and cache.
    """

    name: str
    title: str
    family: str
    facts: dict[str, Fact]
    wired: float

    def __getitem__(self, key: str) -> float:
        return self.facts[key].value

    @property
    def kind(self) -> str:
        """apple, nvidia, amd or cpu."""
        return self.family.split("-")[0]

    @property
    def bytes_per_s(self) -> float:
        """At which weights are read."""
        return self["bandwidth_gb_s"] * 1e9 * self["efficiency"]

    @property
    def expert_s(self) -> float:
        """Seconds that an expert, or a slice of one, costs besides reading its bytes: its matrices
        begin somewhere else in memory. 0 where it was not measured."""
        return self.facts["expert_us"].value / 1e6 if "expert_us" in self.facts else 0.0

    @property
    def alone(self) -> Machine:
        """This machine while no other of the cluster is at work: itself, unless they share one.

        Several nodes that are processes on one computer read less each than one of them does, and
        what prepares the next layer shares the cores with what computes this one.
        """
        alone = self
        if "alone_gb_s" in self.facts:
            rate = self["alone_gb_s"] / self["efficiency"]
            alone = alone.with_fact("bandwidth_gb_s", rate, self.facts["alone_gb_s"].source)
        if "alone_overhead_us" in self.facts:
            fact = self.facts["alone_overhead_us"]
            alone = alone.with_fact("overhead_us", fact.value, fact.source)
        return alone

    @property
    def memory_bytes(self) -> float:
        """All memory."""
        return self["memory_gib"] * 2**30

    @property
    def usable_bytes(self) -> float:
        """Memory for weights and cache."""
        return self.memory_bytes * self.wired

    @property
    def usd(self) -> float | None:
        """Price; None: unknown."""
        return self["usd"] or None

    def with_fact(self, key: str, value: float, why: str) -> Machine:
        """The same machine with another number."""
        return replace(self, facts={**self.facts, key: Fact(value, "E", why)})


@dataclass(frozen=True)
class Link:
    """How nodes talk. `facts`: "latency_us", "gb_s", perhaps "hop_us" (pipelines)."""

    name: str
    title: str
    topology: str
    facts: dict[str, Fact]

    def __getitem__(self, key: str) -> float:
        return self.facts[key].value

    def with_fact(self, key: str, value: float, why: str) -> Link:
        """The same link with another number."""
        return replace(self, facts={**self.facts, key: Fact(value, "E", why)})


@dataclass(frozen=True)
class Quantization:
    """Bits per weight, scales included, of routed experts and of everything else."""

    name: str
    expert_bits: float
    trunk_bits: float


@dataclass(frozen=True)
class Catalog:
    """All tables. `models` maps a name to its row; shapes are made when asked for."""

    machines: dict[str, dict[str, Any]]
    links: dict[str, dict[str, Any]]
    models: dict[str, dict[str, Any]]
    fits: dict[str, Any]
    configs: dict[str, Any] = field(repr=False)

    # ---- machines

    def machine(self, name: str, wired: float | None = None) -> Machine:
        """A machine by name: m3-ultra-512; without a memory size, the largest.

        Raises:
            InputError: unknown; names the nearest.
        """
        wanted = _plain_machine(name)
        every = self.machine_names()
        key = every.get(wanted) or every.get(wanted.removesuffix("gb").removesuffix("-"))
        if key is None:
            raise unknown_name("machine", name, every)
        chip, memory = key
        row = self.machines[chip]
        family = row["family"]
        fit = self.fits["families"].get(family)
        if fit is None:
            raise InputError(
                f"machine {name}: family {family!r} has no efficiency; known: "
                f"{', '.join(self.fits['families'])}",
                "machine",
            )
        facts = {
            "memory_gib": Fact(memory, row["memory_gib"]["c"], row["memory_gib"]["s"]),
            "usd": Fact(
                row["usd"]["v"][row["memory_gib"]["v"].index(memory)]
                if memory in row["memory_gib"]["v"]
                else 0,
                row["usd"]["c"],
                row["usd"]["s"],
            ),
        }
        for number in ("bandwidth_gb_s", "tflops", "watts"):
            facts[number] = _fact(row[number])
        facts |= {k: _fact(v) for k, v in fit.items()}
        # What was measured on this very machine goes before its family's.
        facts |= {k: _fact(row[k]) for k in _MEASURED if k in row}
        share = wired if wired is not None else DEFAULT_MEMORY_FRACTION[family.split("-")[0]]
        full = f"{chip}-{memory:g}" if len(row["memory_gib"]["v"]) > 1 else chip
        return Machine(full, row["title"], family, facts, share)

    def machine_names(self) -> dict[str, tuple[str, float]]:
        """Every name, plainly written, and its chip and memory size."""
        names: dict[str, tuple[str, float]] = {}
        for chip, row in self.machines.items():
            sizes = row["memory_gib"]["v"]
            for alias in (chip, *row.get("aliases", ())):
                plain = _plain_machine(alias)
                names[plain] = (chip, max(sizes))
                for size in sizes:
                    names[f"{plain}-{size:g}"] = (chip, size)
                # Sizes as sold, where the system sees less.
                for sold in _SOLD.get(chip, ()):
                    names[f"{plain}-{sold}"] = (chip, max(sizes))
        return names

    def machines_of(self, text: str, wired: float | None = None) -> tuple[Machine, ...]:
        """Several: "4xm3-ultra-512", "1xm3-ultra-256,2xm4-max-128", "this,this".

        Raises:
            InputError: an unknown machine, or no positive number of them.
        """
        found: list[Machine] = []
        names = self.machine_names()
        for part in text.split(","):
            count = re.fullmatch(r"\s*(-?\d+)\s*[x*]\s*(.+?)\s*", part)
            # "8xh100" is a machine of its own.
            if count is None or _plain_machine(part) in names:
                n, name = 1, part.strip()
            else:
                n, name = int(count[1]), count[2]
            if not 1 <= n <= 64:
                raise InputError(
                    f"machines: expected 1 to 64 of a kind, got {n} in {part.strip()!r}; write "
                    f"for instance 2x{name}",
                    "machines",
                )
            found += [self.machine(name, wired)] * n
        return tuple(found)

    # ---- links

    def link(self, name: str) -> Link:
        """A link by name.

        Raises:
            InputError: unknown; names the nearest.
        """
        names = {
            _plain(a): k for k, row in self.links.items() for a in (k, *row.get("aliases", ()))
        }
        # "10 GbE", "10gbe" and "TB5 RDMA", "tb5-rdma" are the same.
        squeezed = {plain.replace("-", ""): k for plain, k in names.items()}
        key = squeezed.get(_plain(name).replace("-", ""))
        if key is None:
            raise unknown_name("link", name, names)
        row = self.links[key]
        numbers: tuple[str, ...] = ("latency_us", "gb_s", "hop_us")
        facts = {k: _fact(row[k]) for k in numbers if k in row}
        facts |= {k: _fact(v) for k, v in self.fits["links"].get(key, {}).items()}
        return Link(key, row["title"], row["topology"], facts)

    # ---- models

    def model(self, name: str) -> ModelShape:
        """A model's shape by any name: qwen3-30b-a3b, Qwen/Qwen3-30B-A3B-Instruct-2507-4bit.

        Raises:
            InputError: unknown; names the nearest.
        """
        names = {
            _plain_model(a): k
            for k, row in self.models.items()
            for a in (k, *row.get("aliases", ()))
        }
        key = names.get(_plain_model(name))
        if key is None:
            raise unknown_name("model", name, names, _plain_model(name))
        row = self.models[key]
        if "config" in row:
            entry = self.configs[row["config"]]
            return shape_from_config(key, entry["config"], entry["source"], entry["confidence"])
        return shape_from_table(key, row["shape"], row["s"], row["c"])


# Measured on one machine, so given beside the vendor's numbers.
_MEASURED = (
    "efficiency", "kv_efficiency", "compute", "attention_compute", "overhead_us", "alone_gb_s",
    "alone_overhead_us", "expert_us",
)  # fmt: skip
_MACHINE = {"title", "family", "memory_gib", "bandwidth_gb_s", "tflops", "usd", "watts"}
_LINK = {"title", "topology", "latency_us", "gb_s"}
_SOLD = {"dgx-spark": (128,), "h100": (80,), "h200": (141,), "b200": (180, 192), "8xh100": (640,)}


def load_catalog(files: Sequence[Path] = ()) -> Catalog:
    """The tables of the package, then those of `paths.catalog_dir`, then `files`.

    An owner's file has tables [machines.NAME] and [links.NAME] with the keys of machines.toml and
    links.toml; a later entry replaces an earlier one of the same name.

    Raises:
        InputError: a file cannot be read, or has an unknown key or unit.
    """
    base = _package()
    machines, links = dict(base.machines), dict(base.links)
    own = catalog_dir()
    for path in (*(sorted(own.glob("*.toml")) if own.is_dir() else ()), *files):
        table = _toml(path)
        surplus = sorted(set(table) - {"machines", "links"})
        if surplus:
            raise InputError(
                f"{path}: expected tables machines and links, got {', '.join(surplus)}", "catalog"
            )
        for name, row in table.get("machines", {}).items():
            machines[name] = _checked_machine(f"{path}: machines.{name}", row)
        for name, row in table.get("links", {}).items():
            links[name] = _checked_link(f"{path}: links.{name}", row)
    return replace(base, machines=machines, links=links)


@cache
def _package() -> Catalog:
    machines = _toml(CATALOG_DIR / "machines.toml")
    links = _toml(CATALOG_DIR / "links.toml")
    models = _toml(CATALOG_DIR / "models.toml")
    for name, row in models.items():
        _keys(
            f"models.{name}",
            row,
            set(),
            {"config", "shape", "aliases", "total_b", "active_b", "c", "s"},
        )
        if ("config" in row) == ("shape" in row):
            raise InputError(f"models.{name}: expected either config or shape", "catalog")
    return Catalog(
        {n: _checked_machine(f"machines.{n}", row) for n, row in machines.items()},
        {n: _checked_link(f"links.{n}", row) for n, row in links.items()},
        models,
        _toml(CATALOG_DIR / "fits.toml"),
        json.loads(MODEL_CONFIGS_FILE.read_text()),
    )


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the catalogue {path}: {error}", "catalog") from error


def _keys(where: str, row: Any, needed: set[str], allowed: Iterable[str]) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a table, got {row!r:.40}", "catalog")
    for key in row:
        if key not in needed and key not in allowed:
            near = difflib.get_close_matches(key, [*needed, *allowed], 1, 0.3)
            raise InputError(
                f"{where}: unknown key {key!r} (units are part of the key); nearest: "
                f"{near[0] if near else sorted(needed)}",
                "catalog",
            )
    missing = needed - set(row)
    if missing:
        raise InputError(f"{where}: missing {', '.join(sorted(missing))}", "catalog")


def _checked_machine(where: str, row: dict[str, Any]) -> dict[str, Any]:
    _keys(where, row, _MACHINE, {"aliases", *_MEASURED, "measured"})
    if row["family"].split("-")[0] not in DEFAULT_MEMORY_FRACTION:
        raise InputError(
            f"{where}: family must begin with one of {', '.join(DEFAULT_MEMORY_FRACTION)}",
            "catalog",
        )
    for key in ("memory_gib", "usd"):
        _number(f"{where}.{key}", row[key], several=True)
    if len(row["memory_gib"]["v"]) != len(row["usd"]["v"]):
        raise InputError(f"{where}: expected one price (0: unknown) per memory size", "catalog")
    for key in ("bandwidth_gb_s", "tflops", "watts", *_MEASURED):
        if key in row:
            _number(f"{where}.{key}", row[key])
    return row


def _checked_link(where: str, row: dict[str, Any]) -> dict[str, Any]:
    _keys(where, row, _LINK, {"aliases", "hop_us", "measured"})
    if row["topology"] not in ("mesh", "ring"):
        raise InputError(
            f"{where}: topology: expected mesh or ring, got {row['topology']!r}", "catalog"
        )
    for key in ("latency_us", "gb_s", "hop_us"):
        if key in row:
            _number(f"{where}.{key}", row[key])
    return row


def _number(where: str, row: Any, several: bool = False) -> None:
    _keys(where, row, {"v", "c", "s"}, {"spread"})
    values = row["v"] if several else [row["v"]]
    right = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in values
    )
    # Watts may be unknown (0), as prices.
    zero = several or where.endswith(".watts")
    if not right or not values or (not zero and values[0] <= 0):
        raise InputError(
            f"{where}: expected {'a list of numbers' if several else 'a positive number'}, "
            f"got {row['v']!r}",
            "catalog",
        )
    if row["c"] not in CONFIDENCE_LEVELS:
        raise InputError(
            f"{where}: confidence must be one of {', '.join(CONFIDENCE_LEVELS)}, got {row['c']!r}",
            "catalog",
        )


def _fact(row: dict[str, Any]) -> Fact:
    return Fact(float(row["v"]), row["c"], row["s"])


# ---- names


def _plain(name: str) -> str:
    """Lower case, words joined by single dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _plain_machine(name: str) -> str:
    """`Apple M3 Ultra (512 GB)` -> m3-ultra-512."""
    plain = re.sub(r"macbook-pro|\d+-cores?", "", _plain(name))
    words = [w for w in plain.split("-") if w and w not in _MACHINE_NOISE]
    joined = "-".join(re.sub(r"^(\d+)g(i?b)?$", r"\1", w) for w in words)
    return joined or _plain(name)


_MACHINE_NOISE = {"apple", "amd", "nvidia", "geforce", "gb", "gib", "ram", "unified", "studio"} | {
    *("macbook", "mbp", "macstudio", "mac", "mini", "memory", "laptop", "sxm", "sxm5", "gpu")
}


def _plain_model(name: str) -> str:
    """The hub's `mlx-community/Qwen3-30B-A3B-Instruct-2507-4bit` -> qwen3-30b-a3b."""
    plain = _plain(name.rsplit("/", 1)[-1]).replace("_", "-")
    while True:
        shorter = _MODEL_NOISE.sub("", plain)
        if shorter == plain:
            return plain
        plain = shorter


_MODEL_NOISE = re.compile(
    r"-(?:instruct|chat|base|it|thinking|reasoning|preview|hf|mlx|gguf|gptq|awq|int[48]|fp8|bf16|"
    r"fp16|f16|nvfp4|mxfp[48]|dq|dwq(?:-v\d)?|ud|xl|unsloth|text|original|latest|fp4|exp|terminus|"
    r"optiq|oq\d\w*|i?q\d(?:-(?:k|0|1|xxs|xs|s|m|l|xl|nl))*|k-[sml]|\d(?:\.\d+)?-?bits?|gs\d+|g\d+|"
    r"\d{4}|v0\.\d|mixed(?:-\d+-\d+)?|q\d)$"
)


def unknown_name(
    kind: str, given: str, known: Iterable[str], plain: str | None = None
) -> InputError:
    """An error for a name that is nobody's, with the nearest ones."""
    if (kind, given) in (("machine", "this"), ("link", "measured")):
        return InputError(f"{kind}: {given!r} is not measured yet: run `cenacle calibrate`", kind)
    names = sorted(set(known))
    near = difflib.get_close_matches(plain or _plain(given), names, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(names)}"
    return InputError(f"{kind}: nothing is called {given!r}; {hint}", kind)


# ---- quantisation


def parse_quantization(text: str | float) -> Quantization:
    """Bits per weight as people write them.

    Whole numbers from 2 to 8 are MLX's groups of 64: half a bit more for scale and bias. At 2 and
    3 bits everything but the experts is taken at 6.5, as such files keep it. Fractions count as
    they are (4.5 is all). mxfp4: 4.25 for experts, 8.5 for the rest. "2.5/8.5" gives both.

    Raises:
        InputError: not a quantisation.
    """
    raw = str(text).strip().lower()
    plain = _plain(raw.replace("_", "-").replace("/", "\0")).strip("-")
    if "/" in raw:
        parts = raw.split("/")
        try:
            expert, trunk = (float(p) for p in parts)
        except ValueError:
            raise _no_quant(text) from None
        return _bits(text, raw, expert, trunk)
    if plain in ("mxfp4", "mxfp4-q8", "fp4", "nvfp4", "mxfp4-8"):
        bits = 4.5 if plain == "nvfp4" else 4.25
        return Quantization(plain, bits, 8.5)
    if plain in (
        "bf16",
        "fp16",
        "f16",
        "float16",
        "bfloat16",
        "none",
        "unquantised",
        "unquantized",
    ):
        return Quantization("16", 16.0, 16.0)
    if plain in ("f32", "fp32", "float32"):
        return Quantization("32", 32.0, 32.0)
    if plain in ("fp8", "f8", "e4m3"):
        return Quantization("fp8", 8.0, 8.0)
    number = re.fullmatch(
        r"(?:i?q|int|gptq-int|awq-int|gptq|awq|oq|u?d-?q)?-?(\d+(?:\.\d+)?)(?:-?bits?|e|-k|-0|-1|-xxs|"
        r"-xs|-nl|-s|-m|-l|-xl)*",
        plain,
    )
    if number is None or raw.startswith("-"):
        raise _no_quant(text)
    bits = float(number[1])
    if bits != int(bits):
        return _bits(text, plain, bits, bits)
    if bits in (16, 32):
        return Quantization(f"{bits:g}", bits, bits)
    if bits not in (2, 3, 4, 5, 6, 8):
        raise _no_quant(text)
    return Quantization(f"{bits:g}", bits + 0.5, bits + 0.5 if bits > 3 else 6.5)


def _bits(text: object, name: str, expert: float, trunk: float) -> Quantization:
    if not (1 <= expert <= 32 and 1 <= trunk <= 32):
        raise _no_quant(text)
    return Quantization(name, expert, trunk)


def _no_quant(text: object) -> InputError:
    return InputError(
        f"quant: expected bits such as 4, 4.5, 8, 16, mxfp4 or 2.5/8.5 (experts/rest), "
        f"got {text!r}",
        "quant",
    )
