"""A planner's result for people: plots in the terminal, PNG and SVG, and one HTML page.

Owns: how things look. Drawing needs the extra `cenacle[plots]`, which is imported when used.
Does not know: how a number came about.
Invariant: the page makes no request of any kind (no script, font or image from elsewhere), and it
marks every unverified number.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.units import format_bytes
from ..errors import InputError
from ..extras import import_extra
from .catalog import CONFIDENCE_LEVELS
from .perf_model import PAPER_SCHEMES, PHASES, Workload, prediction_inputs
from .planner import Comparison, Curve, Option, PlannerResult, format_usd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colors of Okabe and Ito, which people with color blindness can tell apart.
PHASE_COLORS = {
    "trunk": "#0072B2",
    "experts": "#E69F00",
    "communication": "#D55E00",
    "overhead": "#999999",
    "head": "#56B4E9",
}
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TERMINAL_COLORS = ("blue", "red", "green", "magenta", "yellow", "cyan", "white")
MAX_BARS = 10


def timings_figure(options: Sequence[Option]) -> Figure:
    """Bars: milliseconds of a token by phase, one bar per option that fits."""
    predictions = [(o, o.prediction) for o in options if o.fits and o.prediction is not None]
    shown = [pair for pair in predictions if pair[0].scheme not in PAPER_SCHEMES] or predictions
    shown = shown[:MAX_BARS]
    figure, axes = _make_figure(4.6, 0.7 + 0.34 * max(1, len(shown)))
    left = [0.0] * len(shown)
    for phase in PHASES:
        widths = [1000 * prediction.step_timings[phase] for _, prediction in shown]
        axes.barh(range(len(shown)), widths, left=left, color=PHASE_COLORS[phase], label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(shown)), [_short_name(option) for option, _ in shown])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per token, one user")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, handlelength=1, columnspacing=1)
    return figure


def curve_figure(curve: Curve) -> Figure:
    """Lines: tokens/s over the quantity."""
    figure, axes = _make_figure(4.6, 3.6)
    for (name, ys), color in zip(curve.series.items(), LINE_COLORS, strict=False):
        points = [(x, y) for x, y in zip(curve.x, ys, strict=True) if y is not None]
        marker = "o" if curve.quantity == "nodes" else None
        axes.plot(*zip(*points, strict=True), label=name, color=color, marker=marker, ms=4)
    if curve.log_x:
        axes.set_xscale("log")
    elif len(curve.x) < 20:
        axes.set_xticks(list(curve.x))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_x_label(curve))
    axes.set_ylabel(curve.y_label)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _make_figure(width: float, height: float) -> tuple[Figure, Any]:
    # No pyplot: no window, no global state.
    module = import_extra("matplotlib.figure", "plots")
    figure = module.Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _x_label(curve: Curve) -> str:
    return f"{curve.quantity} ({curve.unit})" if curve.unit else curve.quantity


def _short_name(option: Option) -> str:
    name = option.scheme if option.scheme != "expert" else option.placement
    trunk = "+heads" if option.scheme == "expert" and option.trunk == "sharded" else ""
    return f"{name}{trunk} x{len(option.machines)}"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG or an SVG, by the file's suffix.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"expected a file named .png or .svg, got {path}", "file")
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}", "file") from error


def figure_to_svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales with the page; text stays text."""
    mpl = import_extra("matplotlib", "plots")
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Without a size of its own it has the width of its box.
    tag, _, content = text.partition(">")
    tag = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", tag)
    return f'{tag} role="img">{content}'


def render_terminal(curve: Curve, width: int = 60, height: int = 16) -> str:
    """The curve as text, in braille dots; letters tell the lines apart without colors."""
    figure = import_extra("plotille", "plots").Figure()
    figure.width, figure.height = width, height
    figure.origin = False
    figure.color_mode = "names"
    figure.x_label, figure.y_label = _x_label(curve), "y"
    scale = math.log10 if curve.log_x else float
    figure.register_label_formatter(float, lambda v, **_: f"{v:.3g}")
    figure.x_ticks_fkt = lambda low, _: f"{10**low if curve.log_x else low:.3g}"
    figure.y_ticks_fkt = lambda low, _: f"{low:.3g}"
    lines = zip(curve.series.items(), TERMINAL_COLORS, "abcdefg", strict=False)
    for (name, ys), color, letter in lines:
        points = [(scale(x), y) for x, y in zip(curve.x, ys, strict=True) if y is not None]
        xs, values = zip(*points, strict=True)
        figure.plot(list(xs), list(values), lc=color, label=f"{letter} {name}", marker=letter)
    figure.set_x_limits(min_=scale(curve.x[0]), max_=scale(curve.x[-1]) or 1.0)
    top = max(y for ys in curve.series.values() for y in ys if y is not None)
    figure.set_y_limits(min_=0, max_=1.05 * top)
    return f"{curve.y_label}\n{figure.show(legend=True)}"


def render_html(
    result: PlannerResult, curves: Sequence[Curve] = (), comparison: Comparison | None = None
) -> str:
    """One page that explains a result to the person who pays."""
    workload, best = result.workload, result.options[0]
    name = workload.shape.name
    parts = [
        f"<h1>{escape(name)}: recommended hardware</h1>",
        f'<p class="advice">{escape(result.advice)}</p>',
    ]
    if comparison is not None:
        parts.append(f"<p>{escape(comparison.sentence())}</p>")
    if best.fits:
        parts += [_facts(best, workload), _svg_figure(timings_figure(result.options))]
    parts.append(f"<h2>Workload</h2><p>{escape(describe_workload(workload))}</p>")
    parts.append("<h2>All schemes</h2>")
    cards = [(o, _card(o, i == result.best)) for i, o in enumerate(result.options)]
    aside = [card for o, card in cards if o.scheme in PAPER_SCHEMES or not o.fits]
    parts += [card for o, card in cards if o.scheme not in PAPER_SCHEMES and o.fits]
    if aside:
        parts.append(
            "<details><summary>The paper's schemes, and schemes that do not fit or are not "
            f"possible (crossed out)</summary>{''.join(aside)}</details>"
        )
    titles = {"nodes": "More machines", "latency": "Another link", "price": "Another price"}
    for curve in curves:
        parts.append(f"<h2>{titles[curve.quantity]}</h2>{_svg_figure(curve_figure(curve))}")
    if best.prediction is not None:
        parts.append("<h2>Sources of the numbers</h2><ul class='sources'>")
        for key, fact in prediction_inputs(best.prediction, workload):
            mark = '<b class="warn">unverified</b> ' if fact.confidence == "D" else ""
            parts.append(
                f"<li><b>{escape(key)}</b> {fact.value:g}: {mark}"
                f"{escape(CONFIDENCE_LEVELS[fact.confidence])}; {escape(fact.source)}</li>"
            )
        parts.append("</ul>")
    parts.append(
        "<p class='note'>Predicted, not measured. Over published decoding speeds that were not "
        "used for fitting, the median error of this model is about 11 %, and the worst is much "
        "larger; <code>cenacle validate</code> shows every row. Made by Cenacle.</p>"
    )
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)} on {escape(best.machine_names)}</title><style>{_STYLE}</style>"
        f"</head><body><main>\n{body}\n</main></body></html>\n"
    )


def _facts(option: Option, workload: Workload) -> str:
    p = option.prediction
    assert p is not None
    facts = {
        "tokens per second, one user": f"{p.tok_per_s:.1f}",
        f"tokens per second, {workload.users} users": f"{p.tok_per_s_all_users:.1f}",
        f"first token of a prompt of {workload.prompt_tokens}": f"{p.ttft_s:.1f} s",
        "bound by": p.bound_by,
        "price": _price(option),
        "at full load": f"{p.watts:.0f} W",
    }
    rows = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _svg_figure(figure: Figure) -> str:
    return f"<figure>{figure_to_svg(figure)}</figure>"


def _price(option: Option) -> str:
    return format_usd(option.usd) + (" (unverified)" if option.has_unverified_price else "")


def describe_workload(workload: Workload) -> str:
    """The workload in a sentence."""
    s = workload.shape
    return (
        f"{s.name}: {s.total / 1e9:.1f} billion parameters, {s.active / 1e9:.1f} read per token, "
        f"{s.layers} layers, {s.top_k} of {s.experts} experts per layer; "
        f"{format_bytes(workload.total_bytes)} at {workload.quantization.name} bits. Context "
        f"{workload.context}, {workload.users} user{'s' if workload.users > 1 else ''}, prompt "
        f"{workload.prompt_tokens}."
    )


def _card(option: Option, best: bool) -> str:
    p = option.prediction
    kind = "best" if best else "" if option.fits else "no"
    name = option.scheme
    if name == "expert":
        name = f"{name} / {option.placement} / trunk {option.trunk}"
    numbers = ""
    if p is not None:
        price = _price(option)
        if option.usd is not None:
            price += f", {format_usd(option.usd / p.tok_per_s)} per token/s"
        memory = ", ".join(format_bytes(b) for b in dict.fromkeys(map(round, p.bytes_per_node)))
        numbers = (
            f"<p><b>{p.tok_per_s:.1f} tok/s</b>, all users {p.tok_per_s_all_users:.1f}, "
            f"first token {p.ttft_s:.1f} s, bound by {escape(p.bound_by)}; {escape(memory)} per "
            f"node; {escape(price)}; {p.watts:.0f} W</p>"
        )
    return (
        f"<section class='card {kind}'><h3>{escape(name)} "
        f"<small>{escape(option.machine_names)}</small></h3>"
        f"{numbers}<p class='note'>{escape(option.reason)}</p></section>"
    )


_STYLE = """
:root{color-scheme:light dark;--fg:#1b1b1b;--bg:#fff;--dim:#595959;--line:#d5d5d5;--good:#0a6b3d}
@media(prefers-color-scheme:dark){:root{--fg:#eaeaea;--bg:#161616;--dim:#a8a8a8;--line:#3d3d3d;
--good:#5fd39a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:56rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:0}h3 small{font-weight:400;color:var(--dim)}
.advice{font-size:1.15rem;border-left:.3rem solid var(--good);padding-left:.75rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.5rem;
margin:1rem 0}
.facts div{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .75rem}
.facts dt{font-size:.8rem;color:var(--dim)}.facts dd{margin:0;font-size:1.2rem;font-weight:600;
overflow-wrap:anywhere}
figure{margin:1rem 0;background:#fff;border-radius:.5rem}
figure svg{display:block;width:100%;max-width:40rem;height:auto;margin:0 auto}
.card{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .75rem;margin:.5rem 0}
.card p{margin:.3rem 0 0;overflow-wrap:anywhere}.card.best{border:2px solid var(--good)}
.card.no h3{text-decoration:line-through;color:var(--dim)}
summary{cursor:pointer;margin:.75rem 0}
.note{font-size:.9rem;color:var(--dim)}.sources{font-size:.9rem;padding-left:1.2rem;
overflow-wrap:anywhere}.warn{color:#b34700}
@media(prefers-color-scheme:dark){.warn{color:#ffa766}}
"""
