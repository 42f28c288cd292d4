"""The performance model held against measurements.

Owns: rows (published, an owner's CSV), predicting each, fitting the few parameters of fits.toml on
the rows marked so, leave-one-out, and the paper's results.
Does not know: how rows were measured (`runs.py`), MLX.
Invariant: a row that was fitted is marked wherever it is shown; others never touch a parameter.
Error is |predicted - measured| / measured.
"""

from __future__ import annotations

import csv
import io
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import CenacleError, InputError
from ..planning.catalog import CATALOG_DIR, Catalog, parse_quantization, total_usd
from ..planning.perf_model import PAPER_SCHEMES, PaperConstants, Prediction, Workload, predict
from .local_fit import coordinate_descent

COLUMNS = (
    *("model", "quant_bits", "machine", "nodes", "link", "scheme", "context", "tok_per_s"),
    "source",
)
CSV_SCHEMES = ("single", "pipeline", "tensor", "expert")


@dataclass(frozen=True)
class Measurement:
    """One measurement. `machines` and `quant` as on the command line; `fit`: used to fit."""

    model: str
    quantization: str
    machines: str
    link: str | None
    scheme: str
    context: int
    tok_per_s: float
    source: str
    confidence: str = "C"
    fit: bool = False
    reason: str = ""
    skip: str = ""


@dataclass(frozen=True)
class Validation:
    """A row and what the model says."""

    row: Measurement
    predicted: Prediction

    @property
    def error(self) -> float:
        """Relative, without sign."""
        return abs(self.predicted.tok_per_s / self.row.tok_per_s - 1)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "model": self.row.model,
            "quant": self.row.quantization,
            "machines": self.row.machines,
            "link": self.row.link,
            "scheme": self.row.scheme,
            "context": self.row.context,
            "measured": self.row.tok_per_s,
            "predicted": self.predicted.tok_per_s,
            "error": self.error,
            "fitted": self.row.fit,
            "fits": self.predicted.fits,
            "binding": self.predicted.bound_by,
            "terms_ms": {k: 1000 * v for k, v in self.predicted.step_timings.items()},
            "source": self.row.source,
            "reason": self.row.reason,
        }


@dataclass(frozen=True)
class Summary:
    """Errors of some rows."""

    rows: int
    median: float
    worst: float

    @classmethod
    def of(cls, checked: Sequence[Validation]) -> Summary | None:
        """None of none."""
        if not checked:
            return None
        errors = [c.error for c in checked]
        return cls(len(errors), median(errors), max(errors))


def load_published() -> list[Measurement]:
    """The rows of published.toml."""
    rows = tomllib.loads((CATALOG_DIR / "published.toml").read_text())["row"]
    return [
        Measurement(
            r["model"],
            r["quant"],
            r["machines"],
            r.get("link"),
            r["scheme"],
            r["context"],
            r["tok_per_s"],
            r["source"],
            r["c"],
            r.get("fit", False),
            r.get("reason", ""),
            r.get("skip", ""),
        )
        for r in rows
    ]


def validate_one(row: Measurement, catalogue: Catalog) -> Validation:
    """Predict a row.

    Scheme "expert" is Cenacle's best placement that needs no spare memory: sliced, or weighted for
    unlike machines, with attention replicated.

    Raises:
        InputError, PlanError: a name that is unknown, a scheme that cannot be had.
    """
    machines = catalogue.parse_machines(row.machines)
    job = Workload(catalogue.model(row.model), parse_quantization(row.quantization), row.context)
    link = catalogue.link(row.link) if row.link and len(machines) > 1 else None
    alike = len({m.name for m in machines}) == 1
    return Validation(
        row,
        predict(
            job,
            row.scheme if len(machines) > 1 else "single",
            machines,
            link,
            PaperConstants.from_fits(catalogue.fits["paper"]),
            placement="sliced" if alike else "weighted",
        ),
    )


def validate_all(rows: Sequence[Measurement], catalogue: Catalog) -> list[Validation]:
    """All rows but those to skip."""
    return [validate_one(r, catalogue) for r in rows if not r.skip]


# ---- an owner's rows


def read_csv(path: Path, catalogue: Catalog) -> tuple[list[Measurement], list[str]]:
    """Rows of a CSV file with the columns `COLUMNS`, each checked against the catalogue.

    Returns:
        The rows that can be predicted, and for each of the others a sentence with its line, what
        was expected, and for an unknown name the nearest.

    Raises:
        InputError: not such a file, or no row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"rows: cannot read {path}: {error}", "rows") from error
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    missing = [c for c in COLUMNS[:-1] if c not in (reader.fieldnames or ())]
    if missing:
        raise InputError(
            f"rows: {path}: expected the columns {','.join(COLUMNS)}; missing {', '.join(missing)}",
            "rows",
        )
    rows: list[Measurement] = []
    problems: list[str] = []
    for record in reader:
        if not any((v or "").strip() for v in record.values() if isinstance(v, str)):
            continue
        try:
            row = _csv_row({k: (v or "").strip() for k, v in record.items() if k in COLUMNS})
            validate_one(row, catalogue)
        except CenacleError as error:
            problems.append(f"line {reader.line_num}: {error}")
            continue
        rows.append(row)
    if not rows and not problems:
        raise InputError(f"rows: {path} has no rows", "rows")
    return rows, problems


def _csv_row(r: dict[str, str]) -> Measurement:
    def number(key: str, least: float, default: float | None = None) -> float:
        if not r[key] and default is not None:
            return default
        try:
            value = float(r[key])
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least):
            raise InputError(f"{key}: expected a number of at least {least:g}, got {r[key]!r}", key)
        return value

    nodes = number("nodes", 1, 1)
    if nodes != int(nodes):
        raise InputError(f"nodes: expected a whole number, got {r['nodes']!r}", "nodes")
    scheme = r["scheme"].lower() or ("single" if nodes == 1 else "")
    if scheme not in CSV_SCHEMES:
        raise InputError(
            f"scheme: expected one of {', '.join(CSV_SCHEMES)}, got {r['scheme']!r}", "scheme"
        )
    if (scheme == "single") != (nodes == 1):
        raise InputError(f"scheme: {scheme} does not go with {nodes:g} nodes", "scheme")
    link = r["link"] if r["link"].lower() not in ("", "-", "none", "n/a") else None
    if nodes > 1 and link is None:
        raise InputError("link: several nodes need one, such as tb5-rdma", "link")
    # "2" nodes of "m4-max-128", or several machines named: "m1-ultra-128+m3-max-128".
    parts = [p.strip() for p in r["machine"].replace("+", ";").replace(",", ";").split(";")]
    if len(parts) == 1:
        machines = f"{int(nodes)}x{parts[0]}" if nodes > 1 else parts[0]
    elif len(parts) == nodes:
        machines = ",".join(parts)
    else:
        raise InputError(
            f"machine: {len(parts)} machines do not go with {nodes:g} nodes", "machine"
        )
    measured = number("tok_per_s", 0)
    if measured <= 0:
        raise InputError(f"tok_per_s: expected more than 0, got {r['tok_per_s']!r}", "tok_per_s")
    context = int(number("context", 0, 512))
    return Measurement(
        r["model"],
        r["quant_bits"],
        machines,
        link if nodes > 1 else None,
        scheme,
        max(1, context),
        measured,
        r.get("source", ""),
    )


# ---- fitting


@dataclass(frozen=True)
class Parameter:
    """A number of fits.toml that is fitted.

    Args:
        path: where it is.
        start: the guess before any row was seen: a fit begins here, whatever the file says.
        low, high: what it may be.
        prior: weight of staying near `start`; a row pulls as 1.
    """

    path: tuple[str, str, str] | tuple[str, str]
    start: float
    low: float
    high: float
    prior: float = 0.0

    def touches(self, row: Measurement, catalogue: Catalog) -> bool:
        """Whether a row's prediction depends on it."""
        if self.path[0] == "paper":
            return row.scheme in PAPER_SCHEMES
        if self.path[0] == "links":
            return row.link is not None and catalogue.link(row.link).name == self.path[1]
        return any(m.family == self.path[1] for m in catalogue.parse_machines(row.machines))


def _family(name: str, overhead: float, efficiency: float | None = 0.75) -> tuple[Parameter, ...]:
    out = [Parameter(("families", name, "overhead_us"), overhead, 20, 800)]
    if efficiency is not None:
        out.append(Parameter(("families", name, "efficiency"), efficiency, 0.4, 0.95, 1.0))
    return tuple(out)


# Where one row is all there is of a family, only one number is fitted.
PARAMETERS = (
    *_family("apple-m1-m2", 150),
    *_family("apple-m3-m4", 130),
    *_family("apple-m5", 100),
    *_family("nvidia-gb10", 60, None),
    *_family("nvidia-rtx", 60, None),
    *_family("nvidia-8xh100", 100, None),
    *_family("amd-strix", 120, None),
    Parameter(("links", "tb5-rdma", "latency_us"), 43.5, 5, 200),
    Parameter(("links", "roce-200", "latency_us"), 60, 5, 400),
    Parameter(("links", "tb5-tcp", "hop_us"), 1000, 50, 30000),
    Parameter(("paper", "handoff_us"), 600, 10, 3000),
    Parameter(("paper", "naive_exchange_us"), 4000, 10, 30000),
)


def fit(
    rows: Sequence[Measurement], catalogue: Catalog, parameters: Sequence[Parameter] = PARAMETERS
) -> Catalog:
    """The catalogue with `parameters` fitted to `rows`.

    Least sum of |log(predicted / measured)|, so that one row that is wrong does not pull the
    others far, plus a little of its square and each parameter's prior; by going through the
    parameters with shrinking steps.
    """
    mine = [tuple(p for p in parameters if p.touches(r, catalogue)) for r in rows]
    known: dict[tuple[int, tuple[float, ...]], float] = {}

    def error(i: int, at: dict[Parameter, float]) -> float:
        key = (i, tuple(at[p] for p in mine[i]))
        if key not in known:
            known[key] = _log_error(rows[i], _set(catalogue, at))
        return known[key]

    def loss(at: dict[Parameter, float]) -> float:
        errors = [error(i, at) for i in range(len(rows))]
        pulls = [p.prior * abs(math.log(at[p] / p.start)) for p in parameters]
        return sum(abs(e) + e * e for e in errors) + sum(pulls)

    values = coordinate_descent({p: (p.start, p.low, p.high) for p in parameters}, loss)
    return _set(catalogue, values)


def _set(catalogue: Catalog, values: dict[Parameter, float]) -> Catalog:
    fits = {k: {n: dict(r) for n, r in t.items()} for k, t in catalogue.fits.items()}
    for p, value in values.items():
        where: Any = fits
        for key in p.path[:-1]:
            where = where.setdefault(key, {})
        where[p.path[-1]] = {"v": value, "c": "F", "s": "cenacle validate --refit"}
    return replace(catalogue, fits=fits)


def _log_error(row: Measurement, catalogue: Catalog) -> float:
    return math.log(validate_one(row, catalogue).predicted.tok_per_s / row.tok_per_s)


def leave_one_out(
    rows: Sequence[Measurement],
    catalogue: Catalog,
    parameters: Sequence[Parameter] = PARAMETERS,
    progress: Callable[[int], None] | None = None,
) -> list[Validation]:
    """Each row predicted by parameters fitted on all the others."""
    out = []
    for i, row in enumerate(rows):
        others = [r for j, r in enumerate(rows) if j != i]
        out.append(validate_one(row, fit(others, catalogue, parameters)))
        if progress is not None:
            progress(i)
    return out


def format_fits(catalogue: Catalog, old: str) -> str:
    """fits.toml with the catalogue's fitted numbers, its comments and everything else kept."""
    lines, table = [], ""
    seen: set[tuple[str, str]] = set()
    for line in old.splitlines():
        if line.startswith("["):
            lines += _added(catalogue, table, seen)
            table = line.strip("[]").replace('"', "")
        key = line.split(" = ")[0]
        row = _rows_of(catalogue, table).get(key) if " = {" in line else None
        if row is not None:
            seen.add((table, key))
            line = _line(key, row)
        lines.append(line)
    lines += _added(catalogue, table, seen)
    for name, rows in catalogue.fits["links"].items():
        if f"links.{name}" not in old:
            lines += ["", f'[links."{name}"]' if "." in name else f"[links.{name}]"]
            lines += [_line(k, r) for k, r in rows.items()]
    return "\n".join(lines) + "\n"


def _rows_of(catalogue: Catalog, table: str) -> dict[str, Any]:
    group, _, name = table.partition(".")
    rows = catalogue.fits.get(group, {})
    return rows.get(name, {}) if name else (rows if group == "paper" else {})


def _added(catalogue: Catalog, table: str, seen: set[tuple[str, str]]) -> list[str]:
    rows = _rows_of(catalogue, table)
    return [_line(k, r) for k, r in rows.items() if (table, k) not in seen] if table else []


def _line(key: str, row: dict[str, Any]) -> str:
    return f'{key} = {{ v = {row["v"]:.4g}, c = "{row["c"]}", s = "{row["s"]}" }}'


# ---- the paper


def compare_with_paper(catalogue: Catalog) -> list[tuple[str, float, float, str]]:
    """(what, stated, ours, remark) for the paper's results."""
    from ..planning.routing_stats import ExpertGroup, expected_max_load

    eight = (ExpertGroup(8), ExpertGroup(8))
    out = [
        ("E[max] 2 nodes, 8+8", 2.6462, expected_max_load(eight, 4), "by exact counting"),
        (
            "E[max] 3 nodes, 8 / 8x2",
            2.3231,
            expected_max_load((ExpertGroup(8), ExpertGroup(8, 2)), 4),
            "exact",
        ),
        (
            "E[max] 4 nodes, 8x2 / 8x2",
            1.5692,
            expected_max_load((ExpertGroup(8, 2),) * 2, 4),
            "exact",
        ),
    ]
    rows = {
        (r.machines, r.scheme): validate_one(r, catalogue)
        for r in load_published()
        if r.scheme in PAPER_SCHEMES and not r.skip
    }
    for (machines, scheme), c in rows.items():
        mark = "fitted" if c.row.fit else "not fitted"
        unverified = ", recalled" if c.row.confidence == "D" else ""
        out.append(
            (
                f"tok/s {scheme} on {machines}",
                c.row.tok_per_s,
                c.predicted.tok_per_s,
                mark + unverified,
            )
        )
    shares = {"2xm2-ultra-192": 0.23, "3xm2-ultra-192": 0.29, "4xm2-ultra-192": 0.33}
    for machines, stated in shares.items():
        terms = rows[machines, "P-LR-D"].predicted.step_timings
        share = terms["communication"] / sum(terms.values())
        out.append((f"communication share on {machines}", stated, share, "per_peer is a prior"))
    recalled = (5.9 / 13198) / (112.5 / 289000)
    out.append(
        (
            "tok/s per dollar against 8xH100",
            1.15,
            recalled,
            "from recalled inputs (unverified): 5.9 tok/s, 13198 USD, 112.5 tok/s, 289000 USD",
        )
    )
    mac, box = rows["2xm2-ultra-192", "P-LR-D"].predicted, catalogue.machine("8xh100")
    job = Workload(catalogue.model("dbrx"), parse_quantization(16), 192)
    big = predict(job, "single", (box,), None, PaperConstants.from_fits(catalogue.fits["paper"]))
    mac_usd, box_usd = total_usd(mac.machines), total_usd(big.machines)
    assert mac_usd is not None
    assert box_usd is not None
    ours = (mac.tok_per_s / mac_usd) / (big.tok_per_s / box_usd)
    out.append(("the same with both speeds predicted", 1.15, ours, "prices recalled"))
    return out
