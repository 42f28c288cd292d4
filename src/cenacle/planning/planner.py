"""Which scheme to take, what to buy, and when not to.

Owns: every scheme on the given machines, their order, why each is not the best, the advice in one
sentence, the comparison with another machine, and what-if curves.
Does not know: files, terminals, MLX.
Invariant: options that fit come first, fastest first; `best` is the index of the first, or None.
Next: `report.py` draws it; `cli.plan` prints it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np

from ..core.model_spec import ModelSpec, MoELayer
from ..core.plan import Plan, WidthSlice
from ..core.units import format_bytes
from ..errors import InputError, PlanError
from .catalog import Catalog, Link, Machine
from .perf_model import (
    PAPER_SCHEMES,
    PHASES,
    PaperConstants,
    Prediction,
    Workload,
    predict,
    wired_limit_command,
)
from .routing_stats import RoutingTrace, separate_coactivated

VARIANTS = (
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
# A cluster that is less than this much faster than one of its machines is not bought for speed: the
# model's own error is some 10 %, and the price at least doubles.
MIN_SPEEDUP = 1.3


@dataclass(frozen=True)
class Option:
    """A scheme with its verdict. `prediction` is None where the scheme cannot be had at all."""

    scheme: str
    placement: str
    trunk: str
    machines: tuple[Machine, ...]
    prediction: Prediction | None
    why: str

    @property
    def fits(self) -> bool:
        """Whether it can be run."""
        return self.prediction is not None and self.prediction.fits

    @property
    def usd(self) -> float | None:
        """Price of the machines."""
        prices = [m.usd for m in self.machines]
        return None if None in prices else sum(p for p in prices if p is not None)

    @property
    def names(self) -> str:
        """2x m3-ultra-512, 1x dgx-spark."""
        counts: dict[str, int] = {}
        for m in self.machines:
            counts[m.name] = counts.get(m.name, 0) + 1
        return ", ".join(f"{n}x {name}" for name, n in counts.items())

    def to_json(self) -> dict[str, Any]:
        """A JSON object; numbers are null where the scheme cannot be had."""
        p, format_usd = self.prediction, self.usd
        return {
            "scheme": self.scheme,
            "placement": self.placement,
            "trunk": self.trunk,
            "nodes": len(self.machines),
            "fits": self.fits,
            "tok_per_s": p.tok_per_s if p else None,
            "tok_per_s_all_users": p.tok_per_s_all_users if p else None,
            "ttft_s": p.ttft_s if p else None,
            "terms_ms": {t: 1000 * p.terms[t] if p else None for t in PHASES},
            "binding": p.binding if p else None,
            "bytes_per_node": [round(b) for b in p.bytes_per_node] if p else [],
            "usd": format_usd,
            "usd_per_tok_per_s": format_usd / p.tok_per_s if p and format_usd is not None else None,
            "watts": sum(m["watts"] for m in self.machines),
            "why": self.why,
        }


@dataclass(frozen=True)
class PlannerResult:
    """A plan: options in order, the best one, and a sentence of advice."""

    model: str
    job: Workload
    options: tuple[Option, ...]
    advice: str

    @property
    def best(self) -> int | None:
        """Index of the best option; None: nothing fits."""
        return 0 if self.options and self.options[0].fits else None

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints."""
        return {
            "model": self.model,
            "options": [o.to_json() for o in self.options],
            "best": self.best,
            "advice": self.advice,
        }


def evaluate_options(
    job: Workload, machines: Sequence[Machine], link: Link | None, study: PaperConstants
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
            f"link: {len(machines)} machines need one, such as tb5-rdma or 10gbe", "link"
        )
    kinds = _kinds(machines)
    tried = [_try(job, "single", "whole", "replicated", (m,), None, study) for m in kinds]
    alike = len(kinds) == 1
    even = "sliced" if alike else "weighted"
    for variant in VARIANTS if len(machines) > 1 else ():
        if variant[1] not in ("sliced", "weighted") or variant[1] == even or variant[0] == "tensor":
            tried.append(_try(job, *variant, machines, link, study))
    for n in range(2, len(machines)) if alike else ():
        fewer = [_try(job, *v, machines[:n], link, study) for v in VARIANTS if v[0] == "expert"]
        tried += sorted((o for o in fewer if o.fits), key=_order)[:1]
    options = sorted(tried, key=_order)
    options = [replace(o, why=_why(o, options)) for o in options]
    return PlannerResult(job.shape.name, job, tuple(options), _advice(job, options, machines, link))


def _kinds(machines: Sequence[Machine]) -> list[Machine]:
    seen: dict[str, Machine] = {}
    for m in machines:
        seen.setdefault(m.name, m)
    return list(seen.values())


def _try(
    job: Workload,
    scheme: str,
    placement: str,
    trunk: str,
    machines: tuple[Machine, ...],
    link: Link | None,
    study: PaperConstants,
) -> Option:
    try:
        cut = "sharded" if trunk == "sharded" else "replicated"
        p = predict(job, scheme, machines, link, study, placement=placement, trunk=cut)
    except PlanError as error:
        return Option(scheme, placement, trunk, machines, None, str(error))
    return Option(p.scheme, p.placement, p.trunk, machines, p, "")


def _order(option: Option) -> tuple[int, float, float]:
    p = option.prediction
    if p is not None and not p.fits:
        return (1, p.missing_bytes, 0)
    speed = p.tok_per_s if p else 0.0
    # What is equally fast: ours before a peer's, then the fewer machines.
    variant = (option.scheme, option.placement, option.trunk)
    rank = VARIANTS.index(variant) if variant in VARIANTS else 0
    return (0 if p else 2, -round(speed, 6), rank + 100 * len(option.machines))


def _why(option: Option, options: Sequence[Option]) -> str:
    """Why an option is the best, or is not."""
    p = option.prediction
    if p is None:
        return f"cannot be had: {option.why}"
    if not p.fits:
        return f"does not fit: {_shortage(p)}"
    best = options[0].prediction
    assert best is not None
    terms = ", ".join(f"{t} {1000 * p.terms[t]:.1f} ms" for t in PHASES if p.terms[t] > 0)
    if option is options[0]:
        whole = next((o.prediction for o in options if _is(o, "whole", option)), None)
        less = (
            f"; each node reads {p.fair_share:.2f} experts a layer, where the busiest of whole "
            f"ones runs {whole.executed:.2f}"
            if option.placement == "sliced" and whole is not None
            else ""
        )
        return f"the fastest: {terms}{less}"
    worst = max(PHASES, key=lambda t: p.terms[t] - best.terms[t])
    excess = 1000 * (p.terms[worst] - best.terms[worst])
    slower = p.seconds / best.seconds
    if slower < 1.005:
        more = sum(p.bytes_per_node) > 1.01 * sum(best.bytes_per_node)
        return "as fast as the best" + (", with more memory" if more else "")
    reason = f"{slower:.2f}x slower than the best: {worst} takes {excess:.1f} ms more"
    if (
        option.scheme in ("expert", *PAPER_SCHEMES)
        and worst == "experts"
        and p.executed > p.fair_share
    ):
        reason += (
            f" (the busiest node runs {p.executed:.2f} experts a layer, a fair share is "
            f"{p.fair_share:.2f})"
        )
    if option.scheme in PAPER_SCHEMES:
        reason += "; the paper's program, for study"
    return reason


def _is(option: Option, placement: str, like: Option) -> bool:
    same = option.scheme == "expert" and len(option.machines) == len(like.machines)
    return same and option.placement == placement and option.trunk == like.trunk


def _shortage(p: Prediction) -> str:
    i = max(range(len(p.machines)), key=lambda i: p.bytes_per_node[i] - p.usable_per_node[i])
    machine, need, room = p.machines[i], p.bytes_per_node[i], p.usable_per_node[i]
    text = (
        f"node {i} ({machine.name}) needs {format_bytes(need)}, may hold {format_bytes(room)} "
        f"({machine.wired:.0%} of {format_bytes(machine.memory_bytes)}): "
        f"{format_bytes(need - room)} too much"
    )
    setting = wired_limit_command(machine.memory_bytes, need) if machine.kind == "apple" else None
    if setting is not None:
        share = min(0.99, need / machine.memory_bytes + 0.005)
        text += f"; it fits with --memory-fraction {share:.2f} after `{setting}`"
    return text


def _advice(
    job: Workload, options: Sequence[Option], machines: tuple[Machine, ...], link: Link | None
) -> str:
    """One or two sentences that say what to do, or not to do."""
    best = options[0]
    if not best.fits or best.prediction is None:
        near = min(
            (o for o in options if o.prediction is not None),
            key=lambda o: o.prediction.missing_bytes if o.prediction else 0.0,
        )
        assert near.prediction is not None
        return (
            f"Do not buy this for {job.shape.name} at {job.quant.name} bits: nothing fits. "
            f"Nearest, {near.scheme} on {near.names}: {_shortage(near.prediction)}. Take fewer "
            f"bits, more memory or more machines: the weights alone are "
            f"{format_bytes(job.total_bytes)}, these machines hold "
            f"{format_bytes(sum(m.usable_bytes for m in machines))}."
        )
    p = best.prediction
    singles = [o for o in options if len(o.machines) == 1 and o.fits]
    if len(machines) == 1:
        return (
            f"{best.names} runs it alone at {p.tok_per_s:.1f} tokens/s; {p.binding} binds"
            f"{_what_helps(p)}."
        )
    if len(best.machines) == 1:
        cluster = next((o for o in options if len(o.machines) > 1 and o.fits), None)
        text = f"One machine is faster: {best.names} alone gives {p.tok_per_s:.1f} tokens/s"
        if cluster is not None and cluster.prediction is not None:
            c = cluster.prediction
            text += (
                f", the best of {cluster.names} {c.tok_per_s:.1f}, of whose token "
                f"{c.terms['all_reduce'] / c.seconds:.0%} is exchange"
            )
            if link is not None:
                text += f" over {link.name}"
        return text + ". Do not build this cluster for one user."
    if singles and singles[0].prediction is not None:
        alone = singles[0].prediction
        gain = p.tok_per_s / alone.tok_per_s
        if gain < MIN_SPEEDUP:
            return (
                f"Do not buy this for speed: {best.names} gives {p.tok_per_s:.1f} tokens/s, "
                f"{singles[0].names} alone {alone.tok_per_s:.1f}: {gain:.2f}x for "
                f"{len(best.machines)} machines."
            )
        text = (
            f"Take {_called(best)} on {best.names}: {p.tok_per_s:.1f} tokens/s, {gain:.2f}x one "
            f"machine ({alone.tok_per_s:.1f})"
        )
    else:
        text = (
            f"Take {_called(best)} on {best.names}: {p.tok_per_s:.1f} tokens/s; no single machine "
            f"of these holds the model"
        )
    if len(best.machines) < len(machines):
        text += f". Use only {len(best.machines)} of the {len(machines)}: more are slower"
    return f"{text}; {p.binding} binds{_what_helps(p)}."


def _called(option: Option) -> str:
    if option.scheme != "expert":
        return f"{option.scheme} parallelism"
    trunk = ", attention sharded" if option.trunk == "sharded" else ""
    return f"{option.placement} experts{trunk}"


def _what_helps(p: Prediction) -> str:
    if p.binding == "all_reduce" and p.link is not None:
        each = f"{p.link['latency_us']:.0f} us an exchange over {p.link.name}"
        return f" ({each}: a quicker link helps most)"
    if p.binding == "overhead":
        return " (the chip's own time per layer: neither bandwidth nor more machines help)"
    if p.binding == "trunk" and len(p.machines) > 1 and p.trunk == "replicated":
        return " (attention is read whole on every node: more nodes do not help)"
    return " (memory bandwidth)" if p.binding in ("trunk", "experts", "head") else ""


# ---- comparison, what-if


@dataclass(frozen=True)
class Comparison:
    """The best plan beside another machine, per dollar. The paper's: 1.15 times 8xH100's."""

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
            return f"No comparison: {self.other.why or self.ours.why}"
        text = (
            f"{self.ours.names}: {a.tok_per_s:.1f} tokens/s for {format_usd(self.ours.usd)}; "
            f"{self.other.names}: {b.tok_per_s:.1f} for {format_usd(self.other.usd)}"
        )
        if not b.fits:
            text += f" (does not fit: {_shortage(b)})"
        if self.ratio is None:
            return text + ". A price is unknown, so nothing can be said per dollar."
        verdict = "more" if self.ratio > 1 else "less"
        facts = [m.facts["usd"].confidence for o in (self.ours, self.other) for m in o.machines]
        mark = " Prices partly unverified." if "D" in facts else ""
        return (
            f"{text}. Per dollar that is {self.ratio:.2f}x the tokens: {verdict} for the money."
            f"{mark}"
        )


def compare_per_dollar(
    result: PlannerResult, other: Sequence[Machine], link: Link | None, study: PaperConstants
) -> Comparison:
    """The best option of a plan beside the best of other machines.

    Raises:
        PlanError: nothing of the plan fits.
    """
    if result.best is None:
        raise PlanError(f"nothing to compare: {result.advice}")
    there = evaluate_options(result.job, other, link, study)
    return Comparison(result.options[0], there.options[0])


@dataclass(frozen=True)
class Curve:
    """What-if: one line of tokens/s over a quantity.

    Args:
        what: "nodes", "latency" or "price".
        unit: of x: "", "us" or "USD per machine".
        x: the values.
        series: name -> y for each x (None: does not fit).
        y_label: what y is.
    """

    what: str
    unit: str
    x: tuple[float, ...]
    series: dict[str, tuple[float | None, ...]]
    y_label: str
    log_x: bool = False


def what_if_curve(
    text: str,
    job: Workload,
    machines: Sequence[Machine],
    link: Link | None,
    study: PaperConstants,
) -> Curve:
    """Curves over `nodes=1..8`, `latency=3us..1ms` or `price=2000..10000`.

    Nodes are of the first machine's kind. Price is that of one machine; the curve is tokens/s per
    1000 dollars.

    Raises:
        InputError: what is to vary, or its range, is not understood.
    """
    found = re.fullmatch(r"\s*(\w+)\s*=\s*([^.]+(?:\.\d+)?\S*?)\s*\.\.\s*(\S+)\s*", text)
    if found is None or found[1] not in ("nodes", "latency", "price"):
        raise InputError(
            f"what-if: expected nodes=1..8, latency=3us..1ms or price=2000..10000, got {text!r}",
            "what-if",
        )
    what = found[1]
    low, high = (_quantity(v, what) for v in (found[2], found[3]))
    if not 0 < low <= high:
        raise InputError(f"what-if: expected a range of positive numbers, got {text!r}", "what-if")
    machines = tuple(machines)
    if what == "nodes":
        if low != int(low) or high != int(high) or high > 64:
            raise InputError(f"what-if: nodes must be whole numbers up to 64: {text!r}", "what-if")
        xs: tuple[float, ...] = tuple(float(n) for n in range(int(low), int(high) + 1))
        if link is None and high > 1:
            raise InputError("link: several machines need one, such as tb5-rdma", "link")
    else:
        steps = 25
        xs = tuple(low * (high / low) ** (i / (steps - 1)) for i in range(steps))
        if what == "latency" and (link is None or len(machines) < 2):
            raise InputError("what-if: latency needs a link and several machines", "what-if")

    def at(x: float) -> tuple[tuple[Machine, ...], Link | None]:
        if what == "nodes":
            return (machines[0],) * int(x), link
        if what == "latency":
            assert link is not None
            return machines, link.with_fact("latency_us", x, "what-if")
        return tuple(m.with_fact("usd", x, "what-if") for m in machines), link

    def speed(variant: tuple[str, str, str]) -> Callable[[float], float | None]:
        def of(x: float) -> float | None:
            ms, li = at(x)
            if variant[0] == "single":
                options = [_try(job, *variant, (m,), None, study) for m in _kinds(ms)]
            elif len(ms) == 1:
                options = [_try(job, "single", "whole", "replicated", ms, None, study)]
            else:
                options = [_try(job, *variant, ms, li, study)]
            good = [o for o in options if o.fits and o.prediction is not None]
            if not good:
                return None
            best = max(good, key=lambda o: o.prediction.tok_per_s if o.prediction else 0.0)
            assert best.prediction is not None
            if what != "price":
                return best.prediction.tok_per_s
            return best.prediction.tok_per_s / (best.usd or 1) * 1000

        return of

    variants = {
        "one machine": ("single", "whole", "replicated"),
        "experts sliced": ("expert", "sliced", "replicated"),
        "experts weighted": ("expert", "weighted", "replicated"),
        "experts sliced, attention sharded": ("expert", "sliced", "sharded"),
        "experts replicated": ("expert", "replicated", "replicated"),
        "experts whole": ("expert", "whole", "replicated"),
        "pipeline": ("pipeline", "whole", "layers"),
    }
    series = {name: tuple(map(speed(v), xs)) for name, v in variants.items()}
    several = [len(at(x)[0]) > 1 for x in xs]
    series = {
        name: ys
        for name, ys in series.items()
        if any(y is not None for y in (ys if name == "one machine" else compress(ys, several)))
    }
    if not series:
        raise PlanError(f"what-if: nothing fits anywhere in {text}")
    units = {"nodes": "", "latency": "us", "price": "USD per machine"}
    label = "tokens/s per 1000 USD" if what == "price" else "tokens/s, one user"
    return Curve(what, units[what], xs, series, label, log_x=what != "nodes")


def _quantity(text: str, what: str) -> float:
    """A number with its unit, in nodes, microseconds or dollars."""
    found = re.fullmatch(r"\$?(\d+(?:\.\d+)?)\s*([a-zA-Zµ]*)\$?", text.strip())
    scale = {
        "nodes": {"": 1.0},
        "latency": {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6, "ns": 1e-3},
        "price": {"": 1.0, "usd": 1.0, "k": 1e3},
    }[what]
    if found is None or found[2].lower() not in scale:
        raise InputError(
            f"what-if: {what}: expected a number with a unit of "
            f"{', '.join(u or 'none' for u in scale)}, got {text!r}",
            "what-if",
        )
    return float(found[1]) * scale[found[2].lower()]


# ---- a plan file


def spec_from_workload(job: Workload, family: str) -> ModelSpec:
    """A `ModelSpec` of a model that is known by its shape only, so that a plan can be dealt.

    Args:
        family: mlx-lm's module that runs it.

    Raises:
        PlanError: the shape does not say which layers have experts.
    """
    s = job.shape
    if not s.moe_ids:
        raise PlanError(
            f"save: of {s.name} only sizes are known, not its layers; give the checkpoint's folder "
            f"or its config.json instead of a name"
        )
    expert, shared = round(job.expert_bytes), round(job.shared_bytes)
    return ModelSpec(
        family=family,
        layers=s.layers,
        moe=tuple(MoELayer(layer, s.experts, expert, shared) for layer in s.moe_ids),
        top_k=s.top_k,
        trunk_bytes=round(job.trunk_bytes),
        context_length=None,
        vocab_size=s.vocabulary,
        dtype="bfloat16",
        quantization=None if job.quant.trunk_bits >= 16 else f"{job.quant.name} bits",
    )


def best_plan(
    result: PlannerResult, spec: ModelSpec, trace: RoutingTrace | None = None
) -> tuple[Plan, str]:
    """The plan that `serve --plan` takes, of the best option that this version runs; and a note.

    Args:
        spec: the model's bytes by layer.
        trace: recorded routing: experts that fire together go to different nodes.

    Raises:
        PlanError: nothing that can be run fits.
    """
    ours = [o for o in result.options if o.fits and o.scheme in ("single", "expert")]
    if not ours:
        raise PlanError(f"no plan to save: {result.advice}")
    option = ours[0]
    n = len(option.machines)
    rates = [m.bytes_per_s for m in option.machines]
    shares = None if len(set(rates)) == 1 else rates
    trunk = "sharded" if option.trunk == "sharded" and spec.dense_modules else "replicated"
    note = ""
    if option.trunk == "sharded" and trunk == "replicated":
        note = "which layers can be divided is known from a checkpoint's folder only: give that"
    if n > 1 and option.placement != "whole":
        try:
            if option.placement in ("sliced", "weighted"):
                return Plan.sliced(spec, n, shares, trunk), note
            assert option.prediction is not None
            budgets = [round(b) for b in option.prediction.bytes_per_node]
            return Plan.replicated(spec, n, budgets, shares, trunk), note
        except PlanError as error:
            note = (
                f"{option.placement} experts are best; the file deals whole ones, because {error} "
                f"(what is known by name only cannot be cut: give the checkpoint's folder)"
            )
    dealt = Plan.whole(spec, n, shares, trunk)
    if n > 1 and trace is not None:
        dealt = _apart(dealt, separate_coactivated(trace, n))
    return dealt, note


def _apart(plan: Plan, owner: np.ndarray) -> Plan:
    """The same plan with each layer's experts at the owners of `separate`: counts stay."""
    layers = tuple(
        replace(layer, experts=tuple((WidthSlice(int(r), 0, 1),) for r in row))
        for layer, row in zip(plan.layers, owner, strict=True)
    )
    return replace(plan, layers=layers)


def format_usd(price: float | None) -> str:
    """A price for people."""
    return "an unknown price" if price is None else f"${price:,.0f}"


def resolve_cluster(
    catalogue: Catalog, machines: str, link: str | None, wired: float | None
) -> tuple[tuple[Machine, ...], Link | None, PaperConstants]:
    """Machines, link and constants by name.

    Raises:
        InputError: an unknown name.
    """
    found = catalogue.machines_of(machines, wired)
    return found, catalogue.link(link) if link else None, PaperConstants.of(catalogue.fits["study"])
