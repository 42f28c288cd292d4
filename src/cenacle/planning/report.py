"""A plan as people see it: terminal plots, PNG and SVG, one self-contained HTML page.

Owns: how things look. matplotlib and plotext are imported when something is drawn.
Does not know: how a number came about.
Invariant: the page makes no request of any kind (no script, no font, no image from elsewhere), and
every unverified number on it says so.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.units import format_bytes
from ..errors import InputError
from .catalog import CONFIDENCE_LEVELS
from .model_shapes import ModelShape
from .perf_model import PAPER_SCHEMES, PHASES, prediction_inputs
from .planner import Comparison, Curve, Option, PlannerResult, format_usd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by people who see colours differently.
PHASE_COLOURS = {
    "trunk": "#0072B2",
    "experts": "#E69F00",
    "all_reduce": "#D55E00",
    "overhead": "#999999",
    "head": "#56B4E9",
}
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def timings_figure(options: Sequence[Option]) -> Figure:
    """Bars: milliseconds of a token by term, one bar per option that fits."""
    figure_of = _figure()
    shown = [
        o for o in options if o.fits and o.prediction is not None and o.scheme not in PAPER_SCHEMES
    ]
    shown = (shown or [o for o in options if o.fits])[:10]
    figure, axes = figure_of(4.6, 0.7 + 0.34 * max(1, len(shown)))
    left = [0.0] * len(shown)
    for term in PHASES:
        widths = [1000 * o.prediction.terms[term] if o.prediction else 0.0 for o in shown]
        axes.barh(range(len(shown)), widths, left=left, color=PHASE_COLOURS[term], label=term)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(shown)), [_short(o) for o in shown])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per token, one user")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, handlelength=1, columnspacing=1)
    return figure


def curve_figure(curve: Curve) -> Figure:
    """Lines: tokens/s over what is varied."""
    figure, axes = _figure()(4.6, 3.6)
    for (name, ys), colour in zip(curve.series.items(), LINE_COLOURS, strict=False):
        points = [(x, y) for x, y in zip(curve.x, ys, strict=True) if y is not None]
        marker = "o" if curve.what == "nodes" else None
        axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, ms=4)
    if curve.log_x:
        axes.set_xscale("log")
    elif len(curve.x) < 20:
        axes.set_xticks(list(curve.x))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{curve.what} ({curve.unit})" if curve.unit else curve.what)
    axes.set_ylabel(curve.y_label)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _figure() -> Callable[[float, float], tuple[Figure, Any]]:
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    def make(width: float, height: float) -> tuple[Figure, Any]:
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        return figure, axes

    return make


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG or an SVG, by the file's ending.

    Raises:
        InputError: another ending, or the file cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in (".png", ".svg"):
        raise InputError(f"expected a file named .png or .svg, got {path}", "file")
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}", "file") from error


def figure_to_svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales with the page; text stays text."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Without a size of its own it takes the width of its box.
    head, _, rest = text.partition(">")
    head = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", head)
    return f'{head} role="img">{rest}'


def render_terminal(curve: Curve, width: int = 60, height: int = 16) -> str:
    """The curve as text, in braille dots; a letter per line tells them apart without colours."""
    import plotille

    figure = plotille.Figure()
    figure.width, figure.height = width, height
    figure.origin = False
    figure.color_mode = "names"
    figure.x_label, figure.y_label = curve.what + (f" ({curve.unit})" if curve.unit else ""), "y"
    scale = math.log10 if curve.log_x else float
    figure.register_label_formatter(float, lambda v, **_: f"{v:.3g}")
    figure.x_ticks_fkt = lambda low, _: f"{10**low if curve.log_x else low:.3g}"
    figure.y_ticks_fkt = lambda low, _: f"{low:.3g}"
    lines = zip(curve.series.items(), TERMINAL_COLOURS, "abcdefg", strict=False)
    for (name, ys), colour, letter in lines:
        points = [(scale(x), y) for x, y in zip(curve.x, ys, strict=True) if y is not None]
        xs, values = zip(*points, strict=True)
        figure.plot(list(xs), list(values), lc=colour, label=f"{letter} {name}", marker=letter)
    figure.set_x_limits(min_=scale(curve.x[0]), max_=scale(curve.x[-1]) or 1.0)
    top = max(y for ys in curve.series.values() for y in ys if y is not None)
    figure.set_y_limits(min_=0, max_=1.05 * top)
    return f"{curve.y_label}\n{figure.show(legend=True)}"


TERMINAL_COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan", "white")


def _short(option: Option) -> str:
    name = option.scheme if option.scheme != "expert" else option.placement
    trunk = "+heads" if option.scheme == "expert" and option.trunk == "sharded" else ""
    return f"{name}{trunk} x{len(option.machines)}"


def render_html(
    result: PlannerResult,
    curves: Sequence[Curve] = (),
    comparison: Comparison | None = None,
    made: str = "",
) -> str:
    """One page that explains a plan to whoever pays."""
    job, best = result.job, result.options[0]
    s = job.shape
    parts = [
        f"<h1>{escape(s.name)}: what to run it on</h1>",
        f'<p class="advice">{escape(result.advice)}</p>',
    ]
    if comparison is not None:
        parts.append(f"<p>{escape(comparison.sentence())}</p>")
    if best.prediction is not None and best.fits:
        p = best.prediction
        price = format_usd(best.usd) + (" (unverified)" if _unverified_price(best) else "")
        facts = [
            ("tokens per second, one user", f"{p.tok_per_s:.1f}"),
            (f"tokens per second, {job.users} users", f"{p.tok_per_s_all_users:.1f}"),
            (f"first token after {job.prompt} of prompt", f"{p.ttft_s:.1f} s"),
            ("binding", p.binding),
            ("price", price),
            ("at full load", f"{p.watts:.0f} W"),
        ]
        parts.append('<dl class="facts">')
        parts += [f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts]
        parts.append("</dl>")
        parts.append(f"<figure>{figure_to_svg(timings_figure(result.options))}</figure>")
    parts.append("<h2>What was asked</h2>")
    parts.append(f"<p>{escape(describe_workload(s, result))}</p>")
    parts.append("<h2>All schemes</h2>")
    cards = [(o, _card(o, i == result.best)) for i, o in enumerate(result.options)]
    aside = [card for o, card in cards if o.scheme in PAPER_SCHEMES or not o.fits]
    parts += [card for o, card in cards if o.scheme not in PAPER_SCHEMES and o.fits]
    if aside:
        parts.append(
            "<details><summary>The paper's own schemes, and what does not fit or cannot be had "
            f"(crossed out)</summary>{''.join(aside)}</details>"
        )
    for curve in curves:
        title = {"nodes": "More machines", "latency": "Another link", "price": "Another price"}
        parts.append(
            f"<h2>{title[curve.what]}</h2><figure>{figure_to_svg(curve_figure(curve))}</figure>"
        )
    if best.prediction is not None:
        parts.append("<h2>Where the numbers come from</h2><ul class='sources'>")
        for name, fact in prediction_inputs(best.prediction, job):
            mark = '<b class="warn">unverified</b> ' if fact.confidence == "D" else ""
            parts.append(
                f"<li><b>{escape(name)}</b> {fact.value:g}: {mark}"
                f"{escape(CONFIDENCE_LEVELS[fact.confidence])}; {escape(fact.source)}</li>"
            )
        parts.append("</ul>")
    parts.append(
        "<p class='note'>Predicted, not measured: over published decode speeds that were not "
        "fitted, this model's median error is about 11 %, its worst much more; `cenacle validate` "
        f"shows every row. Made by Cenacle{escape(' ' + made if made else '')}.</p>"
    )
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(s.name)} on {escape(best.names)}</title><style>{_STYLE}</style></head>"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _unverified_price(option: Option) -> bool:
    return any(m.facts["usd"].confidence == "D" for m in option.machines)


def describe_workload(s: ModelShape, result: PlannerResult) -> str:
    """The question in a sentence."""
    job = result.job
    return (
        f"{s.name}: {s.total / 1e9:.1f} billion parameters, {s.active / 1e9:.1f} read per token, "
        f"{s.experts} experts a layer of which {s.top_k} are chosen, {s.layers} layers; "
        f"{format_bytes(job.total_bytes)} at {job.quant.name} bits. Context {job.context}, "
        f"{job.users} user{'s' if job.users > 1 else ''}, prompt {job.prompt}."
    )


def _card(o: Option, best: bool) -> str:
    p = o.prediction
    kind = "best" if best else "" if o.fits else "no"
    name = f"{o.scheme} / {o.placement} / trunk {o.trunk}" if o.scheme == "expert" else o.scheme
    price = format_usd(o.usd) + (" (unverified)" if _unverified_price(o) else "")
    numbers = ""
    if p is not None:
        per = f", {format_usd(o.usd / p.tok_per_s)} per token/s" if o.usd is not None else ""
        memory = ", ".join(format_bytes(b) for b in dict.fromkeys(map(round, p.bytes_per_node)))
        numbers = (
            f"<p><b>{p.tok_per_s:.1f} tok/s</b>, all users {p.tok_per_s_all_users:.1f}, "
            f"first token {p.ttft_s:.1f} s, {escape(p.binding)} binds; {escape(memory)} per node; "
            f"{escape(price + per)}; {p.watts:.0f} W</p>"
        )
    return (
        f"<section class='card {kind}'><h3>{escape(name)} <small>{escape(o.names)}</small></h3>"
        f"{numbers}<p class='note'>{escape(o.why)}</p></section>"
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
