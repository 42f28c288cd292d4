"""The ablation as a picture: time per token by row and latency, split into its terms.

Owns: drawing; one PNG and one SVG of the same figure.
Does not know: how the numbers were found (`ablation.py`).
Next: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "experts": "#4477aa",
    "all_reduce": "#ee6677",
    "waiting": "#ccbb44",
    "trunk": "#228833",
    "rest": "#bbbbbb",
}


def save_figure(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write `ablation.png` and `ablation.svg` into `folder`; gives their paths."""
    # The drawing library takes a second to import and has no display here.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows: Sequence[dict[str, Any]] = result["rows"]
    latencies = list(dict.fromkeys(r["latency_ms"] for r in rows))
    figure, axes = plt.subplots(
        1, len(latencies), figsize=(3.2 * len(latencies) + 1, 4.6), sharey=True, squeeze=False
    )
    for ax, latency in zip(axes[0], latencies, strict=True):
        block = [r for r in rows if r["latency_ms"] == latency]
        names = [r["row"].replace("ours, ", "ours,\n") for r in block]
        below = [0.0] * len(block)
        for term, colour in COLOURS.items():
            heights = [r["terms_ms"][term] for r in block]
            ax.bar(names, heights, bottom=below, color=colour, label=term, width=0.7)
            below = [b + h for b, h in zip(below, heights, strict=True)]
        for i, row in enumerate(block):
            ax.text(i, below[i], f"{row['tok_s']:.1f}", ha="center", va="bottom", fontsize=8)
        ax.set_title(f"link: +{latency:g} ms" if latency else "link: this machine's own")
        ax.tick_params(axis="x", labelrotation=55, labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("ms per token, measured inside (above: tok/s, not measured inside)")
    axes[0][0].yaxis.label.set_size(8)
    axes[0][-1].legend(fontsize=8, frameon=False)
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
    plt.close(figure)
    return paths
