"""The performance model against measurements.

Owns: measurements (published ones, a user's CSV), the prediction of each, the fit of the few
parameters of fits.toml on those marked for it, leave-one-out, and the paper's results.
Does not know: how anything was measured (`local_runs.py`), MLX.
Invariant: a measurement that was fitted is marked wherever it is shown; others never touch a
parameter. The error is |predicted - measured| / measured.
"""

from __future__ import annotations

import csv
import io
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import CenacleError, InputError
from ..planning.catalog import CATALOG_DIR, Catalog, parse_quantization, total_usd
from ..planning.perf_model import PAPER_SCHEMES, PaperConstants, Prediction, Workload, predict
from ..planning.routing_stats import ExpertGroup, expected_max_load
from .local_fit import coordinate_descent, fit_loss

REQUIRED_COLUMNS = (
    *("model", "quant_bits", "machine", "nodes", "link", "scheme", "context", "tok_per_s"),
)
COLUMNS = (*REQUIRED_COLUMNS, "source")
CSV_SCHEMES = ("single", "pipeline", "tensor", "expert")
DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class Measurement:
    """A measured speed. `machines` and `quant` are as on the command line.

    Args:
        confidence: see `catalog.CONFIDENCE_LEVELS`.
        fit: whether it may be used to fit.
        reason: why its error is large.
        skip: why it is not predicted.
    """

    model: str
    quant: str
    machines: str
    scheme: str
    context: int
    tok_per_s: float
    source: str
    link: str | None = None
    confidence: str = "C"
    fit: bool = False
    reason: str = ""
    skip: str = ""


@dataclass(frozen=True)
class Validation:
    """A measurement and its prediction."""

    measurement: Measurement
    prediction: Prediction

    @property
    def error(self) -> float:
        """Relative, without sign."""
        return abs(self.prediction.tok_per_s / self.measurement.tok_per_s - 1)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        m, p = self.measurement, self.prediction
        return {
            "model": m.model,
            "quant": m.quant,
            "machines": m.machines,
            "link": m.link,
            "scheme": m.scheme,
            "context": m.context,
            "measured": m.tok_per_s,
            "predicted": p.tok_per_s,
            "error": self.error,
            "fitted": m.fit,
            "fits": p.fits,
            "bound_by": p.bound_by,
            "step_timings_ms": {k: 1000 * v for k, v in p.step_timings.items()},
            "source": m.source,
            "reason": m.reason,
        }


@dataclass(frozen=True)
class Summary:
    """Errors of some validations."""

    rows: int
    median: float
    worst: float

    @classmethod
    def of(cls, validations: Sequence[Validation]) -> Summary | None:
        """None if there are none."""
        if not validations:
            return None
        errors = [v.error for v in validations]
        return cls(len(errors), median(errors), max(errors))


def load_published() -> list[Measurement]:
    """The rows of published.toml."""
    rows = tomllib.loads((CATALOG_DIR / "published.toml").read_text())["row"]
    return [Measurement(**row) for row in rows]


def validate_one(measurement: Measurement, catalog: Catalog) -> Validation:
    """Predict a measurement.

    Scheme "expert" is Cenacle's best placement that needs no spare memory: sliced, or weighted for
    unlike machines, with attention replicated.

    Raises:
        InputError, PlanError: an unknown name, an impossible scheme.
    """
    machines = catalog.parse_machines(measurement.machines)
    quantization = parse_quantization(measurement.quant)
    workload = Workload(catalog.model(measurement.model), quantization, measurement.context)
    clustered = len(machines) > 1
    link = catalog.link(measurement.link) if measurement.link and clustered else None
    alike = len({m.name for m in machines}) == 1
    prediction = predict(
        workload,
        measurement.scheme if clustered else "single",
        machines,
        link,
        PaperConstants.from_fits(catalog.fits["paper"]),
        placement="sliced" if alike else "weighted",
    )
    return Validation(measurement, prediction)


def validate_all(measurements: Sequence[Measurement], catalog: Catalog) -> list[Validation]:
    """All measurements but those to skip."""
    return [validate_one(m, catalog) for m in measurements if not m.skip]


# ---- a user's measurements


def read_csv(path: Path, catalog: Catalog) -> tuple[list[Measurement], list[str]]:
    """Rows of a CSV file with the columns `COLUMNS`, each checked against the catalog.

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
    missing = [c for c in REQUIRED_COLUMNS if c not in (reader.fieldnames or ())]
    if missing:
        raise InputError(
            f"rows: {path}: expected the columns {','.join(COLUMNS)}; missing {', '.join(missing)}",
            "rows",
        )
    measurements: list[Measurement] = []
    problems: list[str] = []
    for record in reader:
        row = {k: (v or "").strip() for k, v in record.items() if k in COLUMNS}
        if not any(row.values()):
            continue
        try:
            measurement = _parse_row(row)
            validate_one(measurement, catalog)
        except CenacleError as error:
            problems.append(f"line {reader.line_num}: {error}")
            continue
        measurements.append(measurement)
    if not measurements and not problems:
        raise InputError(f"rows: expected at least one row in {path}, got no rows", "rows")
    return measurements, problems


def _parse_row(row: dict[str, str]) -> Measurement:
    nodes = _parse_number(row, "nodes", 1, 1)
    if nodes != int(nodes):
        raise InputError(f"nodes: expected a whole number, got {row['nodes']!r}", "nodes")
    scheme = row["scheme"].lower() or ("single" if nodes == 1 else "")
    if scheme not in CSV_SCHEMES:
        raise InputError(
            f"scheme: expected one of {', '.join(CSV_SCHEMES)}, got {row['scheme']!r}", "scheme"
        )
    if (scheme == "single") != (nodes == 1):
        raise InputError(f"scheme: {scheme} cannot be used with {nodes:g} nodes", "scheme")
    link = row["link"] if row["link"].lower() not in ("", "-", "none", "n/a") else None
    if nodes > 1 and link is None:
        raise InputError("link: several nodes need a link such as tb5-rdma, got none", "link")
    # "2" nodes of "m4-max-128", or several machines: "m1-ultra-128+m3-max-128".
    names = [n.strip() for n in row["machine"].replace("+", ";").replace(",", ";").split(";")]
    if len(names) not in (1, nodes):
        raise InputError(f"machine: expected 1 or {nodes:g} machines, got {len(names)}", "machine")
    machines = f"{int(nodes)}x{names[0]}" if len(names) < nodes else ",".join(names)
    tok_per_s = _parse_number(row, "tok_per_s", 0)
    if tok_per_s <= 0:
        raise InputError(f"tok_per_s: expected more than 0, got {row['tok_per_s']!r}", "tok_per_s")
    return Measurement(
        model=row["model"],
        quant=row["quant_bits"],
        machines=machines,
        scheme=scheme,
        context=max(1, int(_parse_number(row, "context", 0, DEFAULT_CONTEXT))),
        tok_per_s=tok_per_s,
        source=row.get("source", ""),
        link=link if nodes > 1 else None,
    )


def _parse_number(
    row: dict[str, str], key: str, least: float, default: float | None = None
) -> float:
    if not row[key] and default is not None:
        return default
    try:
        value = float(row[key])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise InputError(f"{key}: expected a number of at least {least:g}, got {row[key]!r}", key)
    return value


# ---- fitting


@dataclass(frozen=True)
class Parameter:
    """A number of fits.toml that is fitted.

    Args:
        path: its keys.
        start: the guess before any measurement: a fit begins here, whatever the file says.
        low, high: its limits.
        prior: weight of staying near `start`; a measurement has weight 1.
    """

    path: tuple[str, str, str] | tuple[str, str]
    start: float
    low: float
    high: float
    prior: float = 0.0

    def affects(self, measurement: Measurement, catalog: Catalog) -> bool:
        """Whether a measurement's prediction depends on it."""
        table, name = self.path[:2]
        if table == "paper":
            return measurement.scheme in PAPER_SCHEMES
        if table == "links":
            return measurement.link is not None and catalog.link(measurement.link).name == name
        return any(m.family == name for m in catalog.parse_machines(measurement.machines))


def _family(name: str, overhead: float, efficiency: float | None = 0.75) -> tuple[Parameter, ...]:
    parameters = [Parameter(("families", name, "overhead_us"), overhead, 20, 800)]
    if efficiency is not None:
        path = ("families", name, "efficiency")
        parameters.append(Parameter(path, efficiency, 0.4, 0.95, 1.0))
    return tuple(parameters)


# Of a family with a single measurement only one number is fitted.
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


def fit(measurements: Sequence[Measurement], catalog: Catalog) -> Catalog:
    """The catalog with `PARAMETERS` fitted to `measurements`.

    Least `fit_loss` of log(predicted / measured) plus each parameter's prior.
    """
    affecting = [tuple(p for p in PARAMETERS if p.affects(m, catalog)) for m in measurements]
    known: dict[tuple[int, tuple[float, ...]], float] = {}

    def log_error(i: int, values: dict[Parameter, float]) -> float:
        key = (i, tuple(values[p] for p in affecting[i]))
        if key not in known:
            validation = validate_one(measurements[i], _with_values(catalog, values))
            ratio = validation.prediction.tok_per_s / measurements[i].tok_per_s
            known[key] = math.log(ratio)
        return known[key]

    def loss(values: dict[Parameter, float]) -> float:
        priors = [p.prior * abs(math.log(values[p] / p.start)) for p in PARAMETERS]
        return fit_loss(log_error(i, values) for i in range(len(measurements))) + sum(priors)

    values = coordinate_descent({p: (p.start, p.low, p.high) for p in PARAMETERS}, loss)
    return _with_values(catalog, values)


def _with_values(catalog: Catalog, values: dict[Parameter, float]) -> Catalog:
    fits = {k: {n: dict(r) for n, r in t.items()} for k, t in catalog.fits.items()}
    for parameter, value in values.items():
        table: Any = fits
        for key in parameter.path[:-1]:
            table = table.setdefault(key, {})
        table[parameter.path[-1]] = {"v": value, "c": "F", "s": "cenacle validate --refit"}
    return replace(catalog, fits=fits)


def leave_one_out(measurements: Sequence[Measurement], catalog: Catalog) -> list[Validation]:
    """Each measurement predicted by parameters fitted on all the others."""
    validations = []
    for i, measurement in enumerate(measurements):
        others = [*measurements[:i], *measurements[i + 1 :]]
        validations.append(validate_one(measurement, fit(others, catalog)))
    return validations


def format_fits(catalog: Catalog, template: str) -> str:
    """`template`, the text of fits.toml, with the catalog's numbers; the rest of it is kept."""
    lines: list[str] = []
    table = ""
    written: set[tuple[str, str]] = set()
    for line in template.splitlines():
        if line.startswith("["):
            lines += _missing_lines(catalog, table, written)
            table = line.strip("[]").replace('"', "")
        key = line.split(" = ")[0]
        row = _rows_of_table(catalog, table).get(key) if " = {" in line else None
        if row is not None:
            written.add((table, key))
            line = _format_row(key, row)
        lines.append(line)
    lines += _missing_lines(catalog, table, written)
    for name, rows in catalog.fits["links"].items():
        if f"links.{name}" not in template:
            lines += ["", f'[links."{name}"]' if "." in name else f"[links.{name}]"]
            lines += [_format_row(key, row) for key, row in rows.items()]
    return "\n".join(lines) + "\n"


def _rows_of_table(catalog: Catalog, table: str) -> dict[str, Any]:
    group, _, name = table.partition(".")
    rows = catalog.fits.get(group, {})
    return rows.get(name, {}) if name else (rows if group == "paper" else {})


def _missing_lines(catalog: Catalog, table: str, written: set[tuple[str, str]]) -> list[str]:
    rows = _rows_of_table(catalog, table) if table else {}
    return [_format_row(key, row) for key, row in rows.items() if (table, key) not in written]


def _format_row(key: str, row: dict[str, Any]) -> str:
    return f'{key} = {{ v = {row["v"]:.4g}, c = "{row["c"]}", s = "{row["s"]}" }}'


# ---- the paper


def compare_with_paper(catalog: Catalog) -> list[tuple[str, float, float, str]]:
    """(quantity, stated, predicted, remark) for the paper's results."""
    one, two = ExpertGroup(8), ExpertGroup(8, 2)
    rows = [
        ("E[max] 2 nodes, 8+8", 2.6462, expected_max_load((one, one), 4), "by exact counting"),
        ("E[max] 3 nodes, 8 / 8x2", 2.3231, expected_max_load((one, two), 4), "exact"),
        ("E[max] 4 nodes, 8x2 / 8x2", 1.5692, expected_max_load((two, two), 4), "exact"),
    ]
    paper = [m for m in load_published() if m.scheme in PAPER_SCHEMES]
    validations = {
        (v.measurement.machines, v.measurement.scheme): v for v in validate_all(paper, catalog)
    }
    for (machines, scheme), v in validations.items():
        remark = "fitted" if v.measurement.fit else "not fitted"
        if v.measurement.confidence == "D":
            remark += ", recalled"
        speeds = (v.measurement.tok_per_s, v.prediction.tok_per_s)
        rows.append((f"tok/s {scheme} on {machines}", *speeds, remark))
    for machines, stated in {
        "2xm2-ultra-192": 0.23,
        "3xm2-ultra-192": 0.29,
        "4xm2-ultra-192": 0.33,
    }.items():
        p = validations[machines, "P-LR-D"].prediction
        share = p.step_timings["communication"] / p.token_s
        remark = "per_peer is a prior"
        rows.append((f"communication share on {machines}", stated, share, remark))
    recalled = (5.9 / 13198) / (112.5 / 289000)
    remark = "from recalled inputs (unverified): 5.9 tok/s, 13198 USD, 112.5 tok/s, 289000 USD"
    rows.append(("tok/s per dollar against 8xH100", 1.15, recalled, remark))
    cluster = validations["2xm2-ultra-192", "P-LR-D"].prediction
    workload = Workload(catalog.model("dbrx"), parse_quantization(16), 192)
    constants = PaperConstants.from_fits(catalog.fits["paper"])
    server = predict(workload, "single", (catalog.machine("8xh100"),), None, constants)
    cluster_usd, server_usd = total_usd(cluster.machines), total_usd(server.machines)
    assert cluster_usd is not None
    assert server_usd is not None
    ratio = (cluster.tok_per_s / cluster_usd) / (server.tok_per_s / server_usd)
    rows.append(("the same with both speeds predicted", 1.15, ratio, "prices recalled"))
    return rows
