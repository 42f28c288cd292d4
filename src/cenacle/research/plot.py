"""The ablation as a plot: time per token by row and latency, by phase.

Owns: drawing, as one PNG and one SVG of the same figure; it needs the extra `cenacle[plots]`.
Does not know: how the numbers came about (`schedule_ablation.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..extras import import_extra

COLORS = {
    "experts": "#4477aa",
    "all_reduce": "#ee6677",
    "waiting": "#ccbb44",
    "trunk": "#228833",
    "rest": "#bbbbbb",
}


def save_figure(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write `ablation.png` and `ablation.svg` into `folder`; returns their paths.

    Raises:
        InputError: the extra is not installed.
    """
    figure_module = import_extra("matplotlib.figure", "plots")
    latencies = list(dict.fromkeys(r["latency_ms"] for r in result["rows"]))
    figure = figure_module.Figure(figsize=(3.2 * len(latencies) + 1, 4.6))
    axes = figure.subplots(1, len(latencies), sharey=True, squeeze=False)[0]
    for ax, latency_ms in zip(axes, latencies, strict=True):
        _draw_bars(ax, [r for r in result["rows"] if r["latency_ms"] == latency_ms])
        ax.set_title(f"link: +{latency_ms:g} ms" if latency_ms else "link: this machine's own")
    axes[0].set_ylabel("ms per token, measured inside (above: tok/s, not measured inside)")
    axes[0].yaxis.label.set_size(8)
    axes[-1].legend(fontsize=8, frameon=False)
    conditions = result["conditions"]
    figure.suptitle(
        f"{Path(result['model']).name}, {result['layers']} layers, {conditions['nodes']} nodes of "
        f"{conditions['threads']} thread(s), {conditions['kernels']} kernels",
        fontsize=10,
    )
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "ablation.png", folder / "ablation.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _draw_bars(ax: Any, rows: list[dict[str, Any]]) -> None:
    names = [row["row"].replace("ours, ", "ours,\n") for row in rows]
    bottoms = [0.0] * len(rows)
    for phase, color in COLORS.items():
        heights = [row["step_timings_ms"][phase] for row in rows]
        ax.bar(names, heights, bottom=bottoms, color=color, label=phase, width=0.7)
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    for i, row in enumerate(rows):
        label = f"{row['tok_per_s']:.1f}"
        ax.text(i, bottoms[i], label, ha="center", va="bottom", fontsize=8)
    ax.tick_params(axis="x", labelrotation=55, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
