"""Machines, links, models and quantizations by name, from `catalog/*.toml`.

Owns: reading the tables strictly (an unknown key or unit is an error), finding an entry by any of
its names, the user's own entries, and the source of each number.
Does not know: time, schemes.
Invariant: an unknown name is an `InputError` with the nearest known ones.
Next: `perf_model.py` computes with these numbers; the tables say what their columns are.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
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
# A Mac wires about this much of its memory by default (ds4#909, vmlx-swift#417); a GPU's driver and
# a Linux system leave more.
DEFAULT_MEMORY_FRACTION = {"apple": 0.75, "cpu": 0.9, "amd": 0.95, "nvidia": 0.95}


@dataclass(frozen=True)
class Fact:
    """A number with its confidence (see `CONFIDENCE`) and source."""

    value: float
    confidence: str
    source: str


@dataclass(frozen=True)
class Machine:
    """A machine.

    Args:
        name: with its memory size: m3-ultra-512.
        title: for people.
        family: whose efficiency and overhead apply.
        facts: "memory_gib", "bandwidth_gb_s", "tflops", "usd", "watts", and the family's
            "efficiency" (fraction of the bandwidth at which weights are read), "kv_efficiency",
            "compute" (fraction of the operations), "attention_compute", "overhead_us" (of a plain
            layer); if measured, "alone_gb_s" and "alone_overhead_us" (see `alone`) and "expert_us"
            (see `expert_s`).
        memory_fraction: of memory that may hold weights and cache.
    """

    name: str
    title: str
    family: str
    facts: dict[str, Fact]
    memory_fraction: float

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
        """Seconds that an expert, or a slice of one, takes besides reading its bytes.

        Its matrices begin elsewhere in memory. 0 if not measured.
        """
        return self.facts["expert_us"].value / 1e6 if "expert_us" in self.facts else 0.0

    @property
    def alone(self) -> Machine:
        """This machine while the other nodes are idle: differs if nodes share a computer.

        Several processes on one computer read less each than one alone, and the preparation of the
        next layer shares the cores with the computation of this one.
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
        return self.memory_bytes * self.memory_fraction

    @property
    def usd(self) -> float | None:
        """Price; None: unknown."""
        return self["usd"] or None

    def with_fact(self, key: str, value: float, source: str) -> Machine:
        """The same machine with another number."""
        return replace(self, facts={**self.facts, key: Fact(value, "E", source)})


@dataclass(frozen=True)
class CatalogLink:
    """The network between nodes. `facts`: "latency_us", "gb_s", perhaps "hop_us" (pipelines)."""

    name: str
    title: str
    topology: str
    facts: dict[str, Fact]

    def __getitem__(self, key: str) -> float:
        return self.facts[key].value

    def with_fact(self, key: str, value: float, source: str) -> CatalogLink:
        """The same link with another number."""
        return replace(self, facts={**self.facts, key: Fact(value, "E", source)})


def total_usd(machines: Iterable[Machine]) -> float | None:
    """The price of several machines; None: one is unknown."""
    prices = [m.usd for m in machines]
    return None if None in prices else sum(price for price in prices if price is not None)


@dataclass(frozen=True)
class Quantization:
    """Bits per weight, scales included, of routed experts and of everything else."""

    name: str
    expert_bits: float
    trunk_bits: float


@dataclass(frozen=True)
class Catalog:
    """All tables, by name; shapes of models are read on demand."""

    machines: dict[str, dict[str, Any]]
    links: dict[str, dict[str, Any]]
    models: dict[str, dict[str, Any]]
    fits: dict[str, Any]
    configs: dict[str, Any] = field(repr=False)

    # ---- machines

    def machine(self, name: str, memory_fraction: float | None = None) -> Machine:
        """A machine by name: m3-ultra-512; without a memory size, the largest.

        Raises:
            InputError: an unknown name; the message has the nearest.
        """
        normalized = _normalize_machine(name)
        names = self.machine_names()
        key = names.get(normalized) or names.get(normalized.removesuffix("gb").removesuffix("-"))
        if key is None:
            raise unknown_name("machines", name, names)
        chip, memory = key
        row = self.machines[chip]
        family = row["family"]
        fit = self.fits["families"].get(family)
        if fit is None:
            raise InputError(
                f"machine {name}: expected a family of {', '.join(self.fits['families'])}, got "
                f"{family!r}",
                "machines",
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
        # Measurements of this machine override those of its family.
        facts |= {k: _fact(row[k]) for k in _MEASURED if k in row}
        if memory_fraction is None:
            memory_fraction = DEFAULT_MEMORY_FRACTION[family.split("-")[0]]
        full_name = f"{chip}-{memory:g}" if len(row["memory_gib"]["v"]) > 1 else chip
        return Machine(full_name, row["title"], family, facts, memory_fraction)

    def machine_names(self) -> dict[str, tuple[str, float]]:
        """Every normalized name, with its chip and memory size."""
        names: dict[str, tuple[str, float]] = {}
        for chip, row in self.machines.items():
            sizes = row["memory_gib"]["v"]
            for alias in (chip, *row.get("aliases", ())):
                normalized = _normalize_machine(alias)
                names[normalized] = (chip, max(sizes))
                for size in sizes:
                    names[f"{normalized}-{size:g}"] = (chip, size)
                for size in _NOMINAL_SIZES.get(chip, ()):
                    names[f"{normalized}-{size}"] = (chip, max(sizes))
        return names

    def parse_machines(
        self, text: str, memory_fraction: float | None = None
    ) -> tuple[Machine, ...]:
        """Several machines: "4xm3-ultra-512", "1xm3-ultra-256,2xm4-max-128", "this,this".

        Raises:
            InputError: an unknown machine, or no positive number of them.
        """
        machines: list[Machine] = []
        names = self.machine_names()
        for part in text.split(","):
            count = re.fullmatch(r"\s*(-?\d+)\s*[x*]\s*(.+?)\s*", part)
            # "8xh100" is a machine of its own.
            if count is None or _normalize_machine(part) in names:
                n, name = 1, part.strip()
            else:
                n, name = int(count[1]), count[2]
            if not 1 <= n <= 64:
                raise InputError(
                    f"machines: expected 1 to 64 of a kind, such as 2x{name}, got {n} in "
                    f"{part.strip()!r}",
                    "machines",
                )
            machines += [self.machine(name, memory_fraction)] * n
        return tuple(machines)

    # ---- links

    def link(self, name: str) -> CatalogLink:
        """A link by name.

        Raises:
            InputError: an unknown name; the message has the nearest.
        """
        names = _aliases(self.links, _normalize)
        # "10 GbE", "10gbe" and "TB5 RDMA", "tb5-rdma" are the same.
        without_dashes = {alias.replace("-", ""): key for alias, key in names.items()}
        key = without_dashes.get(_normalize(name).replace("-", ""))
        if key is None:
            raise unknown_name("link", name, names)
        row = self.links[key]
        facts = {k: _fact(row[k]) for k in _LINK_NUMBERS if k in row}
        facts |= {k: _fact(v) for k, v in self.fits["links"].get(key, {}).items()}
        return CatalogLink(key, row["title"], row["topology"], facts)

    # ---- models

    def model(self, name: str) -> ModelShape:
        """A model's shape by any name: qwen3-30b-a3b, Qwen/Qwen3-30B-A3B-Instruct-2507-4bit.

        Raises:
            InputError: an unknown name; the message has the nearest.
        """
        names = _aliases(self.models, _normalize_model)
        key = names.get(_normalize_model(name))
        if key is None:
            raise unknown_name("model", name, names, _normalize_model(name))
        row = self.models[key]
        if "config" in row:
            entry = self.configs[row["config"]]
            return shape_from_config(key, entry["config"], entry["source"], entry["confidence"])
        return shape_from_table(key, row["shape"], row["s"], row["c"])


def _aliases(rows: dict[str, dict[str, Any]], normalize: Callable[[str], str]) -> dict[str, str]:
    """Every normalized name of a table, with its key."""
    return {
        normalize(alias): key
        for key, row in rows.items()
        for alias in (key, *row.get("aliases", ()))
    }


# Measured on one machine; beside the vendor's numbers.
_MEASURED = (
    "efficiency", "kv_efficiency", "compute", "attention_compute", "overhead_us", "alone_gb_s",
    "alone_overhead_us", "expert_us",
)  # fmt: skip
_MACHINE = {"title", "family", "memory_gib", "bandwidth_gb_s", "tflops", "usd", "watts"}
_LINK = {"title", "topology", "latency_us", "gb_s"}
_LINK_NUMBERS = ("latency_us", "gb_s", "hop_us")
# Memory sizes as sold, where the system sees less.
_NOMINAL_SIZES = {
    "dgx-spark": (128,),
    "h100": (80,),
    "h200": (141,),
    "b200": (180, 192),
    "8xh100": (640,),
}


def load_catalog(files: Sequence[Path] = ()) -> Catalog:
    """Read the tables of the package, then those of `paths.catalog_dir`, then `files`.

    A user's file has tables [machines.NAME] and [links.NAME] with the keys of machines.toml and
    links.toml; a later entry replaces an earlier one of the same name.

    Raises:
        InputError: a file cannot be read, or has an unknown key or unit.
    """
    package = _package_catalog()
    machines, links = dict(package.machines), dict(package.links)
    for path in (*sorted(catalog_dir().glob("*.toml")), *files):
        table = _read_toml(path)
        unknown = sorted(set(table) - {"machines", "links"})
        if unknown:
            raise InputError(
                f"{path}: expected tables machines and links, got {', '.join(unknown)}", "catalog"
            )
        for name, row in table.get("machines", {}).items():
            machines[name] = _check_machine(f"{path}: machines.{name}", row)
        for name, row in table.get("links", {}).items():
            links[name] = _check_link(f"{path}: links.{name}", row)
    return replace(package, machines=machines, links=links)


@cache
def _package_catalog() -> Catalog:
    machines = _read_toml(CATALOG_DIR / "machines.toml")
    links = _read_toml(CATALOG_DIR / "links.toml")
    models = _read_toml(CATALOG_DIR / "models.toml")
    for name, row in models.items():
        _check_keys(
            f"models.{name}",
            row,
            set(),
            {"config", "shape", "aliases", "total_b", "active_b", "c", "s"},
        )
        if ("config" in row) == ("shape" in row):
            raise InputError(f"models.{name}: expected either config or shape", "catalog")
    return Catalog(
        {n: _check_machine(f"machines.{n}", row) for n, row in machines.items()},
        {n: _check_link(f"links.{n}", row) for n, row in links.items()},
        models,
        _read_toml(CATALOG_DIR / "fits.toml"),
        json.loads(MODEL_CONFIGS_FILE.read_text()),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the catalog file {path}: {error}", "catalog") from error


def _check_keys(location: str, row: Any, required: set[str], optional: Iterable[str]) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{location}: expected a table, got {row!r:.40}", "catalog")
    for key in row:
        if key not in required and key not in optional:
            near = difflib.get_close_matches(key, [*required, *optional], 1, 0.3)
            raise InputError(
                f"{location}: unknown key {key!r} (units are part of the key); nearest: "
                f"{near[0] if near else sorted(required)}",
                "catalog",
            )
    missing = required - set(row)
    if missing:
        raise InputError(f"{location}: missing {', '.join(sorted(missing))}", "catalog")


def _check_machine(location: str, row: dict[str, Any]) -> dict[str, Any]:
    _check_keys(location, row, _MACHINE, {"aliases", *_MEASURED, "measured"})
    if row["family"].split("-")[0] not in DEFAULT_MEMORY_FRACTION:
        raise InputError(
            f"{location}: family must begin with one of {', '.join(DEFAULT_MEMORY_FRACTION)}",
            "catalog",
        )
    for key in ("memory_gib", "usd"):
        _check_number(f"{location}.{key}", row[key], several=True)
    if len(row["memory_gib"]["v"]) != len(row["usd"]["v"]):
        raise InputError(f"{location}: expected one price (0: unknown) per memory size", "catalog")
    for key in ("bandwidth_gb_s", "tflops", "watts", *_MEASURED):
        if key in row:
            _check_number(f"{location}.{key}", row[key])
    return row


def _check_link(location: str, row: dict[str, Any]) -> dict[str, Any]:
    _check_keys(location, row, _LINK, {"aliases", "hop_us", "measured"})
    if row["topology"] not in ("mesh", "ring"):
        raise InputError(
            f"{location}: topology: expected mesh or ring, got {row['topology']!r}", "catalog"
        )
    for key in _LINK_NUMBERS:
        if key in row:
            _check_number(f"{location}.{key}", row[key])
    return row


def _check_number(location: str, row: Any, several: bool = False) -> None:
    _check_keys(location, row, {"v", "c", "s"}, {"spread"})
    values = row["v"] if several else [row["v"]]
    is_valid = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in values
    )
    # Watts may be unknown (0), as prices.
    may_be_zero = several or location.endswith(".watts")
    if not is_valid or not values or (not may_be_zero and values[0] <= 0):
        raise InputError(
            f"{location}: expected {'a list of numbers' if several else 'a positive number'}, "
            f"got {row['v']!r}",
            "catalog",
        )
    if row["c"] not in CONFIDENCE_LEVELS:
        raise InputError(
            f"{location}: expected a confidence of {', '.join(CONFIDENCE_LEVELS)}, got "
            f"{row['c']!r}",
            "catalog",
        )


def _fact(row: dict[str, Any]) -> Fact:
    return Fact(float(row["v"]), row["c"], row["s"])


# ---- names


def _normalize(name: str) -> str:
    """Lower case, words joined by single dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _normalize_machine(name: str) -> str:
    """`Apple M3 Ultra (512 GB)` -> m3-ultra-512."""
    normalized = re.sub(r"macbook-pro|\d+-cores?", "", _normalize(name))
    words = [w for w in normalized.split("-") if w and w not in _MACHINE_NOISE]
    joined = "-".join(re.sub(r"^(\d+)g(i?b)?$", r"\1", w) for w in words)
    return joined or _normalize(name)


_MACHINE_NOISE = {"apple", "amd", "nvidia", "geforce", "gb", "gib", "ram", "unified", "studio"} | {
    *("macbook", "mbp", "macstudio", "mac", "mini", "memory", "laptop", "sxm", "sxm5", "gpu")
}


def _normalize_model(name: str) -> str:
    """The hub's `mlx-community/Qwen3-30B-A3B-Instruct-2507-4bit` -> qwen3-30b-a3b."""
    normalized = _normalize(name.rsplit("/", 1)[-1]).replace("_", "-")
    while (shorter := _MODEL_NOISE.sub("", normalized)) != normalized:
        normalized = shorter
    return normalized


_MODEL_NOISE = re.compile(
    r"-(?:instruct|chat|base|it|thinking|reasoning|preview|hf|mlx|gguf|gptq|awq|int[48]|fp8|bf16|"
    r"fp16|f16|nvfp4|mxfp[48]|dq|dwq(?:-v\d)?|ud|xl|unsloth|text|original|latest|fp4|exp|terminus|"
    r"optiq|oq\d\w*|i?q\d(?:-(?:k|0|1|xxs|xs|s|m|l|xl|nl))*|k-[sml]|\d(?:\.\d+)?-?bits?|gs\d+|g\d+|"
    r"\d{4}|v0\.\d|mixed(?:-\d+-\d+)?|q\d)$"
)


def unknown_name(
    kind: str, name: str, known: dict[str, Any], normalized: str | None = None
) -> InputError:
    """The error for an unknown name, with the nearest of the names and aliases in `known`."""
    if (kind, name) in (("machines", "this"), ("link", "measured")):
        return InputError(f"{kind}: {name!r} is not measured yet; run `cenacle calibrate`", kind)
    ranked = difflib.get_close_matches(normalized or _normalize(name), known, n=20, cutoff=0)
    near: dict[Any, str] = {}
    for alias in ranked:  # the nearest first; aliases of the same entry are one
        near.setdefault(known[alias], alias)
    names = ", ".join([*near.values()][:3])
    return InputError(f"{kind}: unknown name {name!r}; nearest: {names}", kind)


# ---- quantization

_NAMED_BITS = {  # name -> its own name, bits of experts, bits of the trunk
    **dict.fromkeys(("mxfp4", "mxfp4-q8", "mxfp4-8", "fp4"), ("", 4.25, 8.5)),
    "nvfp4": ("", 4.5, 8.5),
    **dict.fromkeys(("bf16", "fp16", "f16", "float16", "bfloat16"), ("16", 16.0, 16.0)),
    **dict.fromkeys(("none", "unquantized"), ("16", 16.0, 16.0)),
    **dict.fromkeys(("f32", "fp32", "float32"), ("32", 32.0, 32.0)),
    **dict.fromkeys(("fp8", "f8", "e4m3"), ("fp8", 8.0, 8.0)),
}
_NUMBERED_BITS = re.compile(
    r"(?:i?q|int|gptq-int|awq-int|gptq|awq|oq|u?d-?q)?-?(\d+(?:\.\d+)?)"
    r"(?:-?bits?|e|-k|-0|-1|-xxs|-xs|-nl|-s|-m|-l|-xl)*"
)


def parse_quantization(text: str | float) -> Quantization:
    """Bits per weight as people write them.

    Whole numbers from 2 to 8 are MLX's groups of 64: half a bit more for scale and bias. At 2 and
    3 bits everything but the experts has 6.5, as in the files that people publish. Fractions count
    as they are (4.5 is all). mxfp4: 4.25 for experts, 8.5 for the rest. "2.5/8.5" gives both.

    Raises:
        InputError: not a quantization.
    """
    error = InputError(
        f"quant: expected bits such as 4, 4.5, 8, 16, mxfp4 or 2.5/8.5 (experts/rest), "
        f"got {text!r}",
        "quant",
    )
    raw = str(text).strip().lower()
    name = _normalize(raw.replace("/", "\0"))
    if "/" in raw:
        try:
            expert_bits, trunk_bits = (float(part) for part in raw.split("/"))
        except ValueError:
            raise error from None
        name = raw
    elif name in _NAMED_BITS:
        own_name, expert_bits, trunk_bits = _NAMED_BITS[name]
        return Quantization(own_name or name, expert_bits, trunk_bits)
    else:
        number = _NUMBERED_BITS.fullmatch(name)
        if number is None or raw.startswith("-"):
            raise error
        expert_bits = trunk_bits = float(number[1])
        if expert_bits == int(expert_bits):
            name = f"{expert_bits:g}"
            if expert_bits in (2, 3, 4, 5, 6, 8):
                trunk_bits = expert_bits + 0.5 if expert_bits > 3 else 6.5
                expert_bits += 0.5
            elif expert_bits not in (16, 32):
                raise error
    if not (1 <= expert_bits <= 32 and 1 <= trunk_bits <= 32):
        raise error
    return Quantization(name, expert_bits, trunk_bits)
