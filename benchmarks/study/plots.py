"""The pictures of docs/study.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter
from PIL.Image import open as open_image
from svdiff.miniature import world

from .contenders import CONTENDERS, STYLISTS
from .runs import Results, Run
from .subjects import KINDS, cut, kind_of

_KINDS = dict(zip(KINDS, plt.colormaps["tab10"].colors, strict=False))
_BLOCKS = (
    *("text in", "text 0", "text 1", "text 2", "text out", "in", "down 0", "down 1", "down 2"),
    *("mid", "up 0", "up 1", "up 2", "out"),
)
_COLORS = dict(zip(CONTENDERS, plt.colormaps["tab10"].colors, strict=False))


def alignment(found: Results, path: Path) -> None:
    """How well prompts are followed against how like the subject pictures are: a dot a subject and seed."""
    figure, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, contender in CONTENDERS.items():
        runs = found.of(name)
        if not runs:
            continue
        x, y = ([run[mark] for run in runs] for mark in ("image_alignment", "text_alignment"))
        ax.scatter(x, y, s=10, alpha=0.35, color=_COLORS[name], linewidths=0)
        ax.scatter(statistics.fmean(x), statistics.fmean(y), s=80, color=_COLORS[name], label=contender.label)
    ax.set_xlabel("image alignment: like the subject's pictures")
    ax.set_ylabel("text alignment: as the prompt asks")
    _finish(figure, ax, path)


def drift(found: Results, path: Path) -> None:
    """The course over steps: the subject comes, other prompts go."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for ax, mark, title in zip(
        axes, ("recognised", "unchanged"), ("subject recognised", "other prompts right"), strict=True
    ):
        for name, contender in CONTENDERS.items():
            curves = [run["curve"] for run in found.of(name) if run.get("curve")]
            if not curves:
                continue
            steps = sorted(curves[0], key=int)
            values = [statistics.fmean(curve[step][mark] for curve in curves) for step in steps]
            ax.plot(
                [int(step) for step in steps],
                values,
                marker="o",
                markersize=3,
                color=_COLORS[name],
                label=contender.label,
            )
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("steps")
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.spines[["top", "right"]].set_visible(False)
    _finish(figure, axes[1], path)


def scales(found: Results, path: Path) -> None:
    """What the weight of the shifts does."""
    figure, ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    curves = [run["scales"] for run in found.of("shifts") if run.get("scales")]
    for mark, title in (("recognised", "subject recognised"), ("unchanged", "other prompts right")):
        x = sorted(curves[0], key=float)
        values = [[curve[scale][mark] for curve in curves] for scale in x]
        (line,) = ax.plot(
            [float(s) for s in x], [statistics.fmean(v) for v in values], marker="o", markersize=3, label=title
        )
        ax.fill_between([float(s) for s in x], *_quartiles(values), alpha=0.15, color=line.get_color(), linewidth=0)
    ax.set_xlabel("weight of the shifts")
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish(figure, ax, path)


def spectrum(found: Results, path: Path) -> None:
    """How far singular values have moved, from the largest to the smallest, by kind of layer."""
    figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    runs = [run["spectrum"] for run in found.of("shifts") if run.get("spectrum")]
    for kind in sorted(runs[0]):
        groups = [statistics.fmean(run[kind][i] for run in runs) for i in range(len(runs[0][kind]))]
        ax.plot([(i + 0.5) / len(groups) for i in range(len(groups))], groups, marker="o", markersize=3, label=kind)
    ax.set_xlabel("place in the spectrum: 0 the largest singular value, 1 the smallest")
    ax.set_ylabel("mean |delta| / sigma_1")
    ax.set_ylim(bottom=0)
    _finish(figure, ax, path)


def places(found: Results, path: Path) -> None:
    """Where in the network the change sits: the relative change of weights by kind of layer and contender."""
    names = [name for name in CONTENDERS if name != "inversion" and found.of(name)]
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        kinds: dict[str, list[float]] = {}
        for run in found.of(name):
            for layer, change in run.get("changes", {}).items():
                kinds.setdefault(kind_of(layer), []).append(change)
        for kind, changes in kinds.items():
            rows.setdefault(kind, {})[name] = math.sqrt(statistics.fmean(c * c for c in changes))
    kinds_shown = sorted(rows)
    values = [[rows[kind].get(name, math.nan) for name in names] for kind in kinds_shown]
    figure, ax = plt.subplots(figsize=(1.1 * len(names) + 2.6, 0.42 * len(kinds_shown) + 1.8), layout="constrained")
    shown = ax.imshow(values, aspect="auto", cmap="viridis")
    ax.set_xticks(range(len(names)), [CONTENDERS[name].label for name in names], rotation=30, ha="right", fontsize=8)
    ax.set_yticks(range(len(kinds_shown)), kinds_shown, fontsize=8)
    brightest = max(v for row in values for v in row if not math.isnan(v))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = "-" if math.isnan(value) else f"{value:.2f}"
            color = "black" if math.isnan(value) or value > 0.6 * brightest else "white"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(shown, ax=ax, label="|W - W0| / |W0|")
    _save(figure, path)


def layers(found: Results, path: Path) -> None:
    """How much each layer has changed, a dot a layer, in the order in which a picture goes through them."""
    shown = [name for name in ("shifts", "lora16", "full") if found.of(name)]
    figure, axes = plt.subplots(len(shown), 1, figsize=(7.6, 2.2 * len(shown)), sharex=True, layout="constrained")
    for ax, name in zip(np.atleast_1d(axes), shown, strict=True):
        changes: dict[str, list[float]] = {}
        for run in found.of(name):
            for layer, change in run.get("changes", {}).items():
                changes.setdefault(layer, []).append(change)
        for kind in sorted({kind_of(layer) for layer in changes}):
            dots = [(_block_of(layer), statistics.fmean(c)) for layer, c in changes.items() if kind_of(layer) == kind]
            beside = 0.7 * (KINDS.index(kind) / len(KINDS) - 0.5)  # so that kinds do not hide each other
            across = [_BLOCKS.index(block) + beside for block, _ in dots]
            ax.scatter(across, [change for _, change in dots], s=9, label=kind, color=_KINDS[kind])
        ax.set_title(CONTENDERS[name].label, fontsize=9, loc="left")
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    last = np.atleast_1d(axes)[-1]
    last.set_xticks(range(len(_BLOCKS)), _BLOCKS, rotation=45, fontsize=8)
    figure.supylabel("|W - W0| / |W0|", fontsize=9)
    figure.legend(
        *np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False
    )
    _save(figure, path)


def _block_of(layer: str) -> str:
    part, *path = layer.split(".")
    if part == "text_encoder":
        return f"text {path[2]}" if path[0] == "encoder" else "text in" if path[0] == "embeddings" else "text out"
    if path[0] in ("down_blocks", "up_blocks"):
        return f"{path[0].removesuffix('_blocks')} {path[1]}"
    return {"mid_block": "mid", "conv_in": "in", "time_embedding": "in"}.get(path[0], "out")


def subjects_gallery(found: Results, work: Path, path: Path) -> None:
    """What each contender draws of each subject: the first prompt of the first seed."""
    cases = sorted(found.cases())
    sheets = {
        contender.label: [Run("subjects", name, case, 0).folder(work) / "subject.png" for case in cases]
        for name, contender in CONTENDERS.items()
        if found.of(name)
    }
    _gallery({label: [(file, 0) for file in files] for label, files in sheets.items()}, cases, path)


def styles_gallery(found: Results, work: Path, path: Path) -> None:
    """A picture, and how each contender draws it anew; sheets have as many drawings as pictures, after them."""
    cases = sorted(found.cases())
    sheets = {
        contender.label if contender else "not learnt": [
            Run("styles", name, case, 0).folder(work) / "plain.png" for case in cases
        ]
        for name, contender in STYLISTS.items()
        if found.of(name)
    }
    if not sheets:
        return
    rows = {"the picture": [(file, 0) for file in next(iter(sheets.values()))]}
    _gallery(rows | {label: [(file, 0.5) for file in files] for label, files in sheets.items()}, cases, path)


def _gallery(rows: Mapping[str, Sequence[tuple[Path, float]]], columns: Sequence[str], path: Path) -> None:
    """A picture of a sheet for each row and column, if the sheets are there: they are kept as pictures, not results.

    Which, is told by how much of the sheet stands before it.
    """
    if not all(file.exists() for row in rows.values() for file, _ in row):
        return
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(0.85 * len(columns) + 1.9, 0.85 * len(rows) + 0.3), squeeze=False
    )
    for (label, row), line in zip(rows.items(), axes, strict=True):
        for (file, before), ax in zip(row, line, strict=True):
            with open_image(file) as sheet:
                pictures = cut(sheet.convert("RGB"), world.IMAGE_SIZE)
            ax.imshow(pictures[int(before * len(pictures))])
            ax.set_xticks([])
            ax.set_yticks([])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for name, ax in zip(columns, axes[0], strict=True):
        ax.set_title(name, fontsize=8)
    figure.subplots_adjust(
        left=1.8 / figure.get_figwidth(), right=0.995, top=1 - 0.25 / figure.get_figheight(), bottom=0.01
    )
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    _save(figure, path)


def _quartiles(values: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    cuts = [statistics.quantiles(v, n=4) if len(v) > 1 else (v[0],) * 3 for v in values]
    return [cut[0] for cut in cuts], [cut[2] for cut in cuts]


def _finish(figure: Any, ax: Any, path: Path) -> None:
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PLOTS = {
    "alignment": alignment,
    "drift": drift,
    "scales": scales,
    "spectrum": spectrum,
    "places": places,
    "layers": layers,
}
"""Of the experiment `subjects`, by the name of the file."""
