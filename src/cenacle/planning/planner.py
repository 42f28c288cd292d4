"""Which scheme to use, what to buy, and when not to.

Owns: every scheme on the given machines, their order, the reason why each is not the best, the
advice in one sentence, the comparison with another machine, and what-if curves.
Does not know: files, terminals, MLX.
Invariant: options that fit come first, fastest first; `best` is the index of the first, or None.
Next: `report.py` draws the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from ..core.model_spec import ModelSpec, MoELayer
from ..core.plan import Plan, WidthSlice
from ..core.units import format_bytes
from ..errors import InputError, PlanError
from .catalog import Catalog, CatalogLink, Machine, total_usd
from .memory import wired_limit_command
from .perf_model import PAPER_SCHEMES, PHASES, PaperConstants, Prediction, Workload, predict
from .routing_stats import RoutingTrace, separate_coactivated

SINGLE = ("single", "whole", "replicated")
VARIANTS = (  # scheme, placement, trunk; of equally fast ones the first is preferred
    ("expert", "sliced", "replicated"),
    ("expert", "weighted", "replicated"),
    ("expert", "replicated", "replicated"),
    ("expert", "whole", "replicated"),
    ("expert", "sliced", "sharded"),
    ("expert", "weighted", "sharded"),
    ("expert", "replicated", "sharded"),
    ("expert", "whole", "sharded"),
    ("tensor", "sliced", "sharded"),
    ("pipeline", "whole", "layers"),
    *((scheme, "whole", "replicated") for scheme in reversed(PAPER_SCHEMES)),
)
# A cluster that is less than this much faster than one of its machines is not worth buying for
# speed: the model's own error is about 10 %, and the price at least doubles.
MIN_SPEEDUP = 1.3
CURVE_POINTS = 25
MAX_CURVE_NODES = 64


@dataclass(frozen=True)
class Option:
    """A scheme and why it is not the best. `prediction` is None if it is not possible at all."""

    scheme: str
    placement: str
    trunk: str
    machines: tuple[Machine, ...]
    prediction: Prediction | None
    reason: str

    @property
    def fits(self) -> bool:
        """Whether it is possible and fits in memory."""
        return self.prediction is not None and self.prediction.fits

    @property
    def usd(self) -> float | None:
        """Price of the machines; None: one is unknown."""
        return total_usd(self.machines)

    @property
    def has_unverified_price(self) -> bool:
        """Whether a price was recalled from memory."""
        return any(m.facts["usd"].confidence == "D" for m in self.machines)

    @property
    def machine_names(self) -> str:
        """2x m3-ultra-512, 1x dgx-spark."""
        counts: dict[str, int] = {}
        for m in self.machines:
            counts[m.name] = counts.get(m.name, 0) + 1
        return ", ".join(f"{n}x {name}" for name, n in counts.items())

    def to_json(self) -> dict[str, Any]:
        """A JSON object; numbers are null if the scheme is not possible."""
        p, usd = self.prediction, self.usd
        return {
            "scheme": self.scheme,
            "placement": self.placement,
            "trunk": self.trunk,
            "nodes": len(self.machines),
            "fits": self.fits,
            "tok_per_s": p.tok_per_s if p else None,
            "tok_per_s_all_users": p.tok_per_s_all_users if p else None,
            "ttft_s": p.ttft_s if p else None,
            "step_timings_ms": {k: 1000 * p.step_timings[k] if p else None for k in PHASES},
            "bound_by": p.bound_by if p else None,
            "bytes_per_node": [round(b) for b in p.bytes_per_node] if p else [],
            "usd": usd,
            "usd_per_tok_per_s": usd / p.tok_per_s if p and usd is not None else None,
            "watts": sum(m["watts"] for m in self.machines),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class PlannerResult:
    """Options in order, the best one, and a sentence of advice."""

    workload: Workload
    options: tuple[Option, ...]
    advice: str

    @property
    def best(self) -> int | None:
        """Index of the best option; None: nothing fits."""
        return 0 if self.options and self.options[0].fits else None

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints."""
        return {
            "model": self.workload.shape.name,
            "options": [option.to_json() for option in self.options],
            "best": self.best,
            "advice": self.advice,
        }


def resolve_cluster(
    catalog: Catalog, machines: str, link: str | None, memory_fraction: float | None
) -> tuple[tuple[Machine, ...], CatalogLink | None, PaperConstants]:
    """Machines, link and constants by name.

    Raises:
        InputError: an unknown name.
    """
    return (
        catalog.parse_machines(machines, memory_fraction),
        catalog.link(link) if link else None,
        PaperConstants.from_fits(catalog.fits["paper"]),
    )


def evaluate_options(
    workload: Workload,
    machines: Sequence[Machine],
    link: CatalogLink | None,
    constants: PaperConstants,
) -> PlannerResult:
    """Every scheme on all the machines, on each kind alone, and the best on fewer.

    Raises:
        InputError: no machine, or several without a link.
    """
    machines = tuple(machines)
    if not machines:
        raise InputError("machines: expected at least one, got none", "machines")
    if len(machines) > 1 and link is None:
        raise InputError(
            f"link: {len(machines)} machines need a link such as tb5-rdma or 10gbe, got none",
            "link",
        )

    def evaluate(variant: tuple[str, str, str], nodes: tuple[Machine, ...]) -> Option:
        return _evaluate(workload, variant, nodes, link, constants)

    kinds = _distinct(machines)
    options = [evaluate(SINGLE, (machine,)) for machine in kinds]
    unsuitable = "weighted" if len(kinds) == 1 else "sliced"
    for variant in VARIANTS if len(machines) > 1 else ():
        if variant[0] == "tensor" or variant[1] != unsuitable:
            options.append(evaluate(variant, machines))
    for n in range(2, len(machines)) if len(kinds) == 1 else ():
        fewer = [evaluate(v, machines[:n]) for v in VARIANTS if v[0] == "expert"]
        options += sorted((o for o in fewer if o.fits), key=_rank)[:1]
    options.sort(key=_rank)
    explained = tuple(replace(option, reason=_explain(option, options)) for option in options)
    return PlannerResult(workload, explained, _advise(workload, explained, machines, link))


def _distinct(machines: Iterable[Machine]) -> list[Machine]:
    kinds: dict[str, Machine] = {}
    for machine in machines:
        kinds.setdefault(machine.name, machine)
    return list(kinds.values())


def _evaluate(
    workload: Workload,
    variant: tuple[str, str, str],
    machines: tuple[Machine, ...],
    link: CatalogLink | None,
    constants: PaperConstants,
) -> Option:
    scheme, placement, trunk = variant
    try:
        p = predict(
            workload,
            scheme,
            machines,
            link if len(machines) > 1 else None,
            constants,
            placement=placement,
            trunk="sharded" if trunk == "sharded" else "replicated",
        )
    except PlanError as error:
        return Option(scheme, placement, trunk, machines, None, str(error))
    return Option(p.scheme, p.placement, p.trunk, machines, p, "")


def _rank(option: Option) -> tuple[int, float, float]:
    p = option.prediction
    if p is not None and not p.fits:
        return (1, p.missing_bytes, 0)
    speed = p.tok_per_s if p else 0.0
    # Of equally fast ones: Cenacle's placements before others, then fewer machines.
    variant = (option.scheme, option.placement, option.trunk)
    rank = VARIANTS.index(variant) if variant in VARIANTS else 0
    return (0 if p else 2, -round(speed, 6), rank + 100 * len(option.machines))


# ---- sentences


def _explain(option: Option, options: Sequence[Option]) -> str:
    """Why an option is the best, or is not."""
    p = option.prediction
    if p is None:
        return f"not possible: {option.reason}"
    if not p.fits:
        return f"does not fit: {_describe_shortage(p)}"
    best = options[0].prediction
    assert best is not None
    if option is options[0]:
        return "the fastest: " + _describe_timings(option, options)
    worst = max(PHASES, key=lambda k: p.step_timings[k] - best.step_timings[k])
    excess_ms = 1000 * (p.step_timings[worst] - best.step_timings[worst])
    slowdown = p.token_s / best.token_s
    if slowdown < 1.005:
        more_memory = sum(p.bytes_per_node) > 1.01 * sum(best.bytes_per_node)
        return "as fast as the best" + (", with more memory" if more_memory else "")
    reason = f"{slowdown:.2f}x slower than the best: {excess_ms:.1f} ms more in {worst}"
    is_paper = option.scheme in PAPER_SCHEMES
    whole_experts = (option.scheme == "expert" or is_paper) and p.max_experts > p.fair_share
    if whole_experts and worst == "experts":
        reason += (
            f" (the busiest node computes {p.max_experts:.2f} experts per layer, a fair share is "
            f"{p.fair_share:.2f})"
        )
    return reason + ("; the paper's program, for comparison" if is_paper else "")


def _describe_timings(option: Option, options: Sequence[Option]) -> str:
    p = option.prediction
    assert p is not None
    timings = ", ".join(f"{k} {1000 * s:.1f} ms" for k, s in p.step_timings.items() if s > 0)
    whole = next(
        (
            other.prediction
            for other in options
            if (other.scheme, other.placement, other.trunk) == ("expert", "whole", option.trunk)
            and len(other.machines) == len(option.machines)
        ),
        None,
    )
    if option.placement != "sliced" or whole is None:
        return timings
    return (
        f"{timings}; each node reads {p.fair_share:.2f} experts per layer, with whole experts the "
        f"busiest would compute {whole.max_experts:.2f}"
    )


def _describe_shortage(p: Prediction) -> str:
    i = max(range(len(p.machines)), key=lambda i: p.bytes_per_node[i] - p.usable_per_node[i])
    machine, needed, usable = p.machines[i], p.bytes_per_node[i], p.usable_per_node[i]
    text = (
        f"node {i} ({machine.name}) needs {format_bytes(needed)}, may hold {format_bytes(usable)} "
        f"({machine.memory_fraction:.0%} of {format_bytes(machine.memory_bytes)}): "
        f"{format_bytes(needed - usable)} too much"
    )
    if machine.kind == "apple" and (command := wired_limit_command(machine.memory_bytes, needed)):
        fraction = min(0.99, needed / machine.memory_bytes + 0.005)
        text += f"; it fits with --memory-fraction {fraction:.2f} after `{command}`"
    return text


def _advise(
    workload: Workload,
    options: Sequence[Option],
    machines: tuple[Machine, ...],
    link: CatalogLink | None,
) -> str:
    """One or two sentences that say what to do, or not to do."""
    best, p = options[0], options[0].prediction
    if p is None or not p.fits:
        return _advise_against(workload, options, machines)
    speed = f"{p.tok_per_s:.1f} tokens/s"
    if len(machines) == 1:
        return f"{best.machine_names} runs it alone at {speed}; {_describe_bound(p)}."
    if len(best.machines) == 1:
        text = f"One machine is faster: {best.machine_names} alone gives {speed}"
        cluster = next((o for o in options if len(o.machines) > 1 and o.fits), None)
        if cluster is not None and (c := cluster.prediction) is not None:
            text += (
                f", the best of {cluster.machine_names} {c.tok_per_s:.1f}, with "
                f"{c.step_timings['communication'] / c.token_s:.0%} of each token in communication"
            ) + (f" over {link.name}" if link is not None else "")
        return text + ". Do not build this cluster for one user."
    scheme = f"{best.scheme} parallelism"
    if best.scheme == "expert":
        scheme = f"{best.placement} experts" + (
            ", attention sharded" if best.trunk == "sharded" else ""
        )
    text = f"Take {scheme} on {best.machine_names}: {speed}"
    single = next((o for o in options if len(o.machines) == 1 and o.fits), None)
    if single is None or (alone := single.prediction) is None:
        text += "; none of these machines holds the model alone"
    elif (gain := p.tok_per_s / alone.tok_per_s) < MIN_SPEEDUP:
        return (
            f"Do not buy this for speed: {best.machine_names} gives {speed}, "
            f"{single.machine_names} alone {alone.tok_per_s:.1f}: {gain:.2f}x for "
            f"{len(best.machines)} machines."
        )
    else:
        text += f", {gain:.2f}x one machine ({alone.tok_per_s:.1f})"
    if len(best.machines) < len(machines):
        text += f". Use only {len(best.machines)} of the {len(machines)}: more are slower"
    return f"{text}; {_describe_bound(p)}."


def _advise_against(
    workload: Workload, options: Sequence[Option], machines: tuple[Machine, ...]
) -> str:
    possible = [(o, o.prediction) for o in options if o.prediction is not None]
    nearest, p = min(possible, key=lambda pair: pair[1].missing_bytes)
    usable_bytes = sum(m.usable_bytes for m in machines)
    return (
        f"Do not buy this for {workload.shape.name} at {workload.quantization.name} bits: nothing "
        f"fits. Nearest, {nearest.scheme} on {nearest.machine_names}: {_describe_shortage(p)}. "
        f"Take fewer bits, more memory or more machines: the weights alone are "
        f"{format_bytes(workload.total_bytes)}, these machines hold {format_bytes(usable_bytes)}."
    )


def _describe_bound(p: Prediction) -> str:
    """What limits the speed, and what would help."""
    text = f"bound by {p.bound_by}"
    if p.bound_by == "communication" and p.link is not None:
        latency = f"{p.link['latency_us']:.0f} us per all-reduce over {p.link.name}"
        return f"{text} ({latency}: a faster link helps most)"
    if p.bound_by == "overhead":
        return f"{text} (the chip's own time per layer: neither bandwidth nor more machines help)"
    if p.bound_by == "trunk" and len(p.machines) > 1 and p.trunk == "replicated":
        return f"{text} (attention is read in full on every node: more nodes do not help)"
    return f"{text} (memory bandwidth)" if p.bound_by in ("trunk", "experts", "head") else text


# ---- comparison, what-if


@dataclass(frozen=True)
class Comparison:
    """The best option beside another machine's, per dollar. The paper's: 1.15 times 8xH100's."""

    ours: Option
    other: Option

    @property
    def ratio(self) -> float | None:
        """Ours over the other's tokens/s per dollar; None: a price is unknown."""
        a, b = self.ours.prediction, self.other.prediction
        if a is None or b is None or not self.ours.usd or not self.other.usd:
            return None
        return (a.tok_per_s / self.ours.usd) / (b.tok_per_s / self.other.usd)

    def sentence(self) -> str:
        """For people."""
        a, b = self.ours.prediction, self.other.prediction
        if a is None or b is None:
            return f"No comparison: {self.other.reason or self.ours.reason}"
        text = (
            f"{self.ours.machine_names}: {a.tok_per_s:.1f} tokens/s for "
            f"{format_usd(self.ours.usd)}; {self.other.machine_names}: {b.tok_per_s:.1f} for "
            f"{format_usd(self.other.usd)}"
        )
        if not b.fits:
            text += f" (does not fit: {_describe_shortage(b)})"
        if self.ratio is None:
            return text + ". A price is unknown, so there is no comparison per dollar."
        text += f". That is {self.ratio:.2f}x the tokens per dollar."
        unverified = self.ours.has_unverified_price or self.other.has_unverified_price
        return text + (" Some prices are unverified." if unverified else "")


def compare_per_dollar(
    result: PlannerResult,
    machines: Sequence[Machine],
    link: CatalogLink | None,
    constants: PaperConstants,
) -> Comparison:
    """The best option of a result beside the best of other machines.

    Raises:
        PlanError: no option of the result fits.
    """
    if result.best is None:
        raise PlanError(f"nothing to compare: {result.advice}")
    other = evaluate_options(result.workload, machines, link, constants)
    return Comparison(result.options[0], other.options[0])


@dataclass(frozen=True)
class Curve:
    """Tokens/s over a quantity, one line per scheme.

    Args:
        quantity: "nodes", "latency" or "price".
        unit: of x: "", "us" or "USD per machine".
        x: the values.
        series: name -> y for each x (None: does not fit).
        y_label: of the axis.
    """

    quantity: str
    unit: str
    x: tuple[float, ...]
    series: dict[str, tuple[float | None, ...]]
    y_label: str
    log_x: bool = False


CURVE_VARIANTS = {
    "one machine": SINGLE,
    "experts sliced": ("expert", "sliced", "replicated"),
    "experts weighted": ("expert", "weighted", "replicated"),
    "experts sliced, attention sharded": ("expert", "sliced", "sharded"),
    "experts replicated": ("expert", "replicated", "replicated"),
    "experts whole": ("expert", "whole", "replicated"),
    "pipeline": ("pipeline", "whole", "layers"),
}
_UNITS = {
    "nodes": {"": 1.0},
    "latency": {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6, "ns": 1e-3},
    "price": {"": 1.0, "usd": 1.0, "k": 1e3},
}


def what_if_curve(
    text: str,
    workload: Workload,
    machines: Sequence[Machine],
    link: CatalogLink | None,
    constants: PaperConstants,
) -> Curve:
    """The curve over `nodes=1..8`, `latency=3us..1ms` or `price=2000..10000`.

    Nodes are of the first machine's kind. Price is that of one machine; y is then tokens/s per
    1000 dollars.

    Raises:
        InputError: not such a range, or no link to vary.
        PlanError: nothing fits.
    """
    quantity, xs = _parse_range(text)
    machines = tuple(machines)
    if quantity == "nodes" and link is None and xs[-1] > 1:
        raise InputError("link: several machines need a link such as tb5-rdma, got none", "link")
    if quantity == "latency" and (link is None or len(machines) < 2):
        raise InputError("what-if: latency needs a link and several machines", "what-if")

    def cluster_at(x: float) -> tuple[tuple[Machine, ...], CatalogLink | None]:
        if quantity == "nodes":
            return (machines[0],) * int(x), link
        if quantity == "latency":
            assert link is not None
            return machines, link.with_fact("latency_us", x, "what-if")
        return tuple(m.with_fact("usd", x, "what-if") for m in machines), link

    def value_at(variant: tuple[str, str, str], x: float) -> float | None:
        nodes, link_at = cluster_at(x)
        groups = [(m,) for m in _distinct(nodes)] if variant == SINGLE else [nodes]
        options = [_evaluate(workload, variant, tuple(g), link_at, constants) for g in groups]
        values = [
            o.prediction.tok_per_s / ((o.usd or 1) / 1000 if quantity == "price" else 1)
            for o in sorted(options, key=_rank)
            if o.fits and o.prediction is not None
        ]
        return values[0] if values else None

    clustered = [len(cluster_at(x)[0]) > 1 for x in xs]
    series = {}
    for name, variant in CURVE_VARIANTS.items():
        ys = tuple(value_at(variant, x) for x in xs)
        shown = ys if variant == SINGLE else compress(ys, clustered)
        if any(y is not None for y in shown):
            series[name] = ys
    if not series:
        raise PlanError(f"what-if: nothing fits anywhere in {text}")
    unit = {"nodes": "", "latency": "us", "price": "USD per machine"}[quantity]
    y_label = "tokens/s per 1000 USD" if quantity == "price" else "tokens/s, one user"
    return Curve(quantity, unit, xs, series, y_label, log_x=quantity != "nodes")


def _parse_range(text: str) -> tuple[str, tuple[float, ...]]:
    """The quantity, and its values in nodes, microseconds or dollars."""
    match = re.fullmatch(r"\s*(\w+)\s*=\s*([^.]+(?:\.\d+)?\S*?)\s*\.\.\s*(\S+)\s*", text)
    if match is None or match[1] not in _UNITS:
        raise InputError(
            f"what-if: expected nodes=1..8, latency=3us..1ms or price=2000..10000, got {text!r}",
            "what-if",
        )
    quantity = match[1]
    low, high = (_parse_quantity(value, quantity) for value in (match[2], match[3]))
    if not 0 < low <= high:
        raise InputError(f"what-if: expected a range of positive numbers, got {text!r}", "what-if")
    if quantity != "nodes":
        last = CURVE_POINTS - 1
        return quantity, tuple(low * (high / low) ** (i / last) for i in range(CURVE_POINTS))
    if low != int(low) or high != int(high) or high > MAX_CURVE_NODES:
        raise InputError(
            f"what-if: expected whole numbers of nodes up to {MAX_CURVE_NODES}, got {text!r}",
            "what-if",
        )
    return quantity, tuple(float(n) for n in range(int(low), int(high) + 1))


def _parse_quantity(text: str, quantity: str) -> float:
    match = re.fullmatch(r"\$?(\d+(?:\.\d+)?)\s*([a-zA-Zµ]*)\$?", text.strip())
    units = _UNITS[quantity]
    if match is None or match[2].lower() not in units:
        named = [unit for unit in units if unit]
        unit = f" with a unit of {', '.join(named)}" if named else ""
        raise InputError(
            f"what-if: {quantity}: expected a number{unit}, got {text!r}",
            "what-if",
        )
    return float(match[1]) * units[match[2].lower()]


# ---- plan files


def spec_from_workload(workload: Workload, family: str) -> ModelSpec:
    """The spec of a model of which only the shape is known.

    Args:
        family: mlx-lm's module that runs it.

    Raises:
        PlanError: the shape does not say which layers have experts.
    """
    s = workload.shape
    if not s.moe_ids:
        raise PlanError(
            f"save: only the sizes of {s.name} are known, not its layers; give the checkpoint's "
            f"folder or its config.json instead of a name"
        )
    expert, shared = round(workload.expert_bytes), round(workload.shared_bytes)
    bits = workload.quantization
    return ModelSpec(
        family=family,
        layers=s.layers,
        moe=tuple(MoELayer(layer, s.experts, expert, shared) for layer in s.moe_ids),
        top_k=s.top_k,
        trunk_bytes=round(workload.trunk_bytes),
        context_length=None,
        vocab_size=s.vocabulary,
        dtype="bfloat16",
        quantization=None if bits.trunk_bits >= 16 else f"{bits.name} bits",
    )


def best_plan(
    result: PlannerResult, spec: ModelSpec, trace: RoutingTrace | None = None
) -> tuple[Plan, str]:
    """The plan for `serve --plan` of the best option that Cenacle runs, and a remark.

    Args:
        spec: the model's bytes by layer.
        trace: recorded routing: experts that fire together go to different nodes.

    Raises:
        PlanError: nothing that Cenacle runs fits.
    """
    runnable = [o for o in result.options if o.fits and o.scheme in ("single", "expert")]
    if not runnable:
        raise PlanError(f"no plan to save: {result.advice}")
    option = runnable[0]
    n = len(option.machines)
    rates = [m.bytes_per_s for m in option.machines]
    node_weights = None if len(set(rates)) == 1 else rates
    trunk = "sharded" if option.trunk == "sharded" and spec.dense_modules else "replicated"
    remark = ""
    if option.trunk == "sharded" and trunk == "replicated":
        remark = "the trunk is replicated: sharding it needs the checkpoint's folder"
    if n > 1 and option.placement != "whole":
        try:
            if option.placement in ("sliced", "weighted"):
                return Plan.sliced(spec, n, node_weights, trunk), remark
            assert option.prediction is not None
            node_memory_bytes = [round(b) for b in option.prediction.bytes_per_node]
            return Plan.replicated(spec, n, node_memory_bytes, node_weights, trunk), remark
        except PlanError as error:
            remark = (
                f"{option.placement} experts are best, but the plan has whole ones, because "
                f"{error} (a model given by name cannot be sliced: give the checkpoint's folder)"
            )
    plan = Plan.whole(spec, n, node_weights, trunk)
    if n > 1 and trace is not None:
        owners = separate_coactivated(trace, n)
        layers = tuple(
            replace(layer, experts=tuple((WidthSlice(int(rank), 0, 1),) for rank in row))
            for layer, row in zip(plan.layers, owners, strict=True)
        )
        plan = replace(plan, layers=layers)
    return plan, remark


def format_usd(price: float | None) -> str:
    """A price for people."""
    return "an unknown price" if price is None else f"${price:,.0f}"
