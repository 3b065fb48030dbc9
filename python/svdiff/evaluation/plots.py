"""``report.png``: text against image alignment, and every figure as a bar with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas  # not pyplot, which would choose a backend for the whole program

from .table import KINDS, Figure, rows

_COLUMNS = 3
_COLOURS = ("#c2410c", "#2563eb", "#16a34a", "#7c3aed", "#ca8a04", "#0891b2", "#be185d", "#64748b")


def draw(figures: Sequence[Figure]) -> bytes:
    """The PNG."""
    entries = list(dict.fromkeys(figure.entry for figure in figures))
    colours = {entry: _COLOURS[i % len(_COLOURS)] for i, entry in enumerate(entries)}
    table = rows(figures)
    pairs = _alignments(figures)
    count = len(pairs) + len(table)
    columns = min(_COLUMNS, count)
    lines = -(-count // columns)
    canvas = Canvas(figsize=(4.6 * columns, (1.6 + max(1.8, 0.34 * len(entries))) * lines), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(lines, columns, squeeze=False).flat)
    for axis, (texts, images) in zip(axes, pairs, strict=False):
        _scatter(axis, texts, images, colours)
    for axis, (title, row) in zip(axes[len(pairs) :], table.items(), strict=False):
        _bars(axis, title, row, colours)
    for axis in axes[count:]:
        axis.axis("off")
    buffer = BytesIO()
    canvas.savefig(buffer, dpi=120)
    return buffer.getvalue()


def _alignments(figures: Sequence[Figure]) -> list[tuple[dict[str, Figure], dict[str, Figure]]]:
    """Text and image alignment by entry, for each kind of features that image alignment was computed from."""
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for figure in figures:
        found.setdefault((figure.metric, figure.features), {})[figure.entry] = figure
    texts = [group for (metric, _), group in found.items() if metric == "text_alignment"]
    images = [group for (metric, _), group in found.items() if metric == "image_alignment"]
    return [(text, image) for text in texts for image in images]


def _scatter(axis: Any, texts: dict[str, Figure], images: dict[str, Figure], colours: dict[str, str]) -> None:
    for entry in (entry for entry in texts if entry in images):
        x, y = images[entry].estimate, texts[entry].estimate
        axis.errorbar(
            x.value,
            y.value,
            xerr=_reach(x),
            yerr=_reach(y),
            fmt="o",
            markersize=7,
            capsize=3,
            color=colours[entry],
            label=entry,
        )
    axis.set_xlabel(next(iter(images.values())).title)
    axis.set_ylabel(next(iter(texts.values())).title)
    axis.set_title("up and to the right is better", fontsize=10, color="dimgray")
    axis.legend(fontsize=9)
    axis.margins(0.1)
    axis.grid(alpha=0.3)


def _bars(axis: Any, title: str, row: Sequence[Figure], colours: dict[str, str]) -> None:
    kind = KINDS[row[0].metric]
    names = [figure.entry for figure in row]
    values = [kind.scale * figure.estimate.value for figure in row]
    reaches = [_reach(figure.estimate, kind.scale) for figure in row]
    errors = [[reach[side][0] for reach in reaches] for side in (0, 1)]
    axis.barh(names, values, xerr=errors, capsize=3, color=[colours[name] for name in names], alpha=0.85, height=0.6)
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top, and no bar thicker than others of few entries
    axis.axvline(0, color="dimgray", linewidth=0.8)
    if kind.share:
        axis.set_xlim(0, 1.05)
    arrow = "higher" if kind.higher else "lower"
    axis.set_title(f"{title}\n{arrow} is better", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _reach(estimate: Any, scale: float = 1.0) -> list[list[float]]:
    """How far the interval goes to either side, as matplotlib takes it."""
    below, above = estimate.value - estimate.low, estimate.high - estimate.value
    return [[max(0.0, scale * below)], [max(0.0, scale * above)]]
