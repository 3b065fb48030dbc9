"""Pictures of result files: `python -m benchmarks.plot benchmarks/results/*.jsonl --output_dir docs/images`.

Draws what the files have lines for: ratios of whole steps; roofline and cost rule from level layer; time against rows
from level sweep, and against the number of deltas from level infer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from . import compare, cost, runner

Line = dict[str, Any]
Subject = list[Line]
"""The lines of one measurement, ours first."""

OURS, RIVAL, FLOOR = "#c2410c", "#64748b", "#94a3b8"
COLOURS = {
    runner.OURS: OURS,
    runner.FROZEN: "#16a34a",
    runner.NAIVE: "#7c3aed",
    runner.BROADCAST: "#2563eb",
    "lora r=16": "#ca8a04",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Draw result files of svdiff bench.")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose lines; default %(default)s")
    options = parser.parse_args(argv)
    try:
        subjects = [list(lines.values()) for file in options.files for lines in compare.read(file).values()]
    except (OSError, ValueError) as error:
        print(f"plot: error: {error}", file=sys.stderr)
        return 2
    subjects = [lines for lines in subjects if lines[0].get("device", "cpu") == options.device]
    drawn = 0
    for name, (level, draw) in FIGURES.items():
        chosen = [subject for subject in subjects if subject[0].get("level") == level and not subject[0].get("failure")]
        if chosen:
            figure = draw(chosen)
            options.output_dir.mkdir(parents=True, exist_ok=True)
            path = options.output_dir / f"{name}.png"
            figure.savefig(path, dpi=120, bbox_inches="tight")
            plt.close(figure)
            print(path)
            drawn += 1
    if not drawn:
        print("plot: error: the files hold nothing that can be drawn", file=sys.stderr)
        return 2
    return 0


def ratios(subjects: list[Subject]) -> Any:
    """Bars of whole steps, one panel per setting; ours is 1."""
    figure, axes = plt.subplots(
        len(subjects), 1, figsize=(7.5, 1.2 + 1.5 * len(subjects)), squeeze=False, layout="constrained"
    )
    for ax, lines in zip(axes[:, 0], subjects, strict=True):
        lines = [line for line in lines if line["name"] != runner.CONTROL]
        values = [line["ratio_p50"] for line in lines]
        reach = [[v - line["ratio_p20"] for v, line in zip(values, lines, strict=True)]]
        reach.append([line["ratio_p80"] - v for v, line in zip(values, lines, strict=True)])
        colours = [OURS if i == 0 else RIVAL for i in range(len(lines))]
        bars = ax.barh([_ours_in(line) for line in lines], values, color=colours, xerr=reach, error_kw={"lw": 0.8})
        ax.bar_label(bars, [f"{v:.2f}" for v in values], padding=6, fontsize=8)
        ax.invert_yaxis()
        ax.axvline(1, color=OURS, lw=0.8, ls=":")
        first = lines[0]
        ax.set_title(f"{first['subject']}, {first['dtype']}, {first['latents']}x{first['latents']} latents", fontsize=9)
        ax.margins(x=0.12)
        _plain(ax)
    axes[-1, 0].set_xlabel("time of a training step, ours = 1 (bars to the median, lines from 20th to 80th percentile)")
    return figure


def roofline(subjects: list[Subject]) -> Any:
    """What each layer reaches, against the machine's two limits."""
    figure, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
    peak, bandwidth = subjects[0][0]["peak_tflop_per_s"], subjects[0][0]["peak_gb_per_s"] / 1e3
    intensities = [line["flop"] / line["bytes"] for lines in subjects for line in lines if line["flop"]]
    low, high = min(intensities) / 2, max(intensities) * 2
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    ax.plot(xs, [min(peak, bandwidth * x) for x in xs], color="black", lw=1)
    ax.set_title(f"measured peak: {peak:.2f} TFLOP/s, {1e3 * bandwidth:.0f} GB/s; a point for each layer of the model")
    for name, colour in COLOURS.items():
        points = [line for lines in subjects for line in lines if line["name"] == name and line["flop"]]
        if points:
            x, y = zip(*[(p["flop"] / p["bytes"], p["tflop_per_s"]) for p in points], strict=True)
            ax.scatter(x, y, s=14, color=colour, alpha=0.75, label=name, lw=0)
    ax.set(xscale="log", yscale="log", xlabel="operations per byte, by count", ylabel="TFLOP/s reached")
    ax.legend(fontsize=8, frameon=False)
    _plain(ax)
    return figure


def cost_rule(subjects: list[Subject]) -> Any:
    """Rebuilding the weight against staying factored: what the count of operations says, and what was measured."""
    figure, ax = plt.subplots(figsize=(5.6, 5.2), layout="constrained")
    layers = right = 0
    for kind, colour in (("linear", OURS), ("conv", "#2563eb")):
        points = []
        for lines in subjects:
            named = {line["name"]: line for line in lines}
            if runner.BROADCAST in named and lines[0]["subject"].split(" x ", 1)[-1].startswith(kind):
                counted = named[runner.BROADCAST]["flop"] / named[runner.OURS]["flop"]
                points.append((counted, named[runner.BROADCAST]["ratio_p50"]))
        if points:
            ax.scatter(*zip(*points, strict=True), s=16, color=colour, alpha=0.8, lw=0, label=kind)
        layers += len(points)
        right += sum((counted < 1) == (measured < 1) for counted, measured in points)
    ax.set_title(f"{right} of {layers} layers lie on the side of 1 that the count says")
    limits = [min(*ax.get_xlim(), *ax.get_ylim(), 0.8), max(*ax.get_xlim(), *ax.get_ylim())]
    limits[0] = max(limits[0], 0.4)
    ax.plot(limits, limits, color="black", lw=0.8)
    for line in (ax.axhline, ax.axvline):
        line(1, color=FLOOR, lw=0.8, ls=":")
    ax.set(xscale="log", yscale="log", xlabel="operations, recomposed / factored", ylabel="time, recomposed / factored")
    ax.legend(fontsize=8, frameon=False)
    _plain(ax)
    return figure


def rows(subjects: list[Subject]) -> Any:
    """Time against T for square layers, with the T from which the cost rule would rebuild the weight."""
    by_side = [
        (side, list(found))
        for side, found in groupby(sorted(subjects, key=lambda s: _shape(s)), lambda s: _shape(s)[0])
    ]
    figure, axes = plt.subplots(1, len(by_side), figsize=(4 * len(by_side), 3.6), squeeze=False, layout="constrained")
    for ax, (side, found) in zip(axes[0], by_side, strict=True):
        for name, colour in COLOURS.items():
            points = [(_shape(s)[1], 1e3 * line["p50"]) for s in found for line in s if line["name"] == name]
            if points:
                ax.plot(*zip(*points, strict=True), marker="o", ms=3, color=colour, label=name)
        crossing = next(T for T in range(1, 10**6) if cost.prefers_recomposed(side, side, T))
        ax.axvline(crossing, color="black", lw=0.8, ls=":")
        ax.set(xscale="log", yscale="log", xlabel="rows T", title=f"linear {side}x{side}")
        _plain(ax)
    axes[0, 0].set_ylabel("ms, forward and backward")
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def deltas(subjects: list[Subject]) -> Any:
    """Time of one batch against how many deltas act in it; the dense batch of the base is 1."""
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for lines in subjects:
        dense = next(line["ratio_p50"] for line in lines if line["name"] == runner.DENSE)
        counts = {_count(line["name"]): line for line in lines if _count(line["name"])}
        xs = sorted(counts)
        label = f"{runner.OURS}, {lines[0]['dtype']}"
        ax.plot(xs, [counts[x]["ratio_p50"] / dense for x in xs], marker="o", label=label, color=OURS)
        for line, colour in zip([x for x in lines if _is_batch_rival(x["name"])], ("#ca8a04", "#2563eb"), strict=False):
            value = line["ratio_p50"] / dense
            ax.axhline(value, color=colour, lw=1.2, label=f"{line['name']}: {value:.2f}")
        ax.axhline(1, color="#16a34a", lw=1.2, label="dense batch of the base: 1")
        ax.set_xticks(xs)
    ax.set(xlabel="deltas that act in a batch of 8", ylabel="time, dense batch = 1", yscale="log", ylim=(0.8, None))
    ax.set_yticks([1, 2, 5, 10], labels=["1", "2", "5", "10"])
    ax.legend(fontsize=8, frameon=False, loc="center right")
    _plain(ax)
    return figure


FIGURES: dict[str, tuple[str, Callable[[list[Subject]], Any]]] = {
    "ratios": ("unet", ratios),
    "roofline": ("layer", roofline),
    "cost_rule": ("layer", cost_rule),
    "rows": ("sweep", rows),
    "deltas": ("infer", deltas),
}


def _ours_in(line: Line) -> str:
    rank = line.get("rank")
    return f"{runner.OURS}, residual r={rank}" if line["name"] == runner.OURS and rank else str(line["name"])


def _shape(subject: Subject) -> tuple[int, int]:
    """Side and rows of "linear 320x320 T=64"."""
    _, sides, rows_ = subject[0]["subject"].split()
    return int(sides.split("x")[0]), int(rows_.removeprefix("T="))


def _count(name: str) -> int:
    words = name.split()
    return int(words[1]) if name.startswith(f"{runner.OURS},") and words[-1].startswith("delta") else 0


def _is_batch_rival(name: str) -> bool:
    return ("batch" in name and name != runner.DENSE) or "rebuilt" in name


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    ax.title.set_fontsize(9)


if __name__ == "__main__":
    sys.exit(main())
