"""docs/study.md: tables and prose of what was found. No figure is typed; what the prose claims is checked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from svdiff.evaluation import estimate
from svdiff.evaluation.metrics import mean

from .runs import Figures

Cell = Callable[[Sequence[float]], str]


def percent(values: Sequence[float]) -> str:
    """The mean of shares, and where it is with 95 % confidence over runs."""
    return _with_interval(values, lambda value: f"{100 * value:.0f}", " %")


def number(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and its interval."""
    return _with_interval(values, lambda value: f"{value:.{digits}f}")


def size(values: Sequence[float]) -> str:
    """Bytes, which hardly vary."""
    value = statistics.fmean(values)
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def count(values: Sequence[float]) -> str:
    """How many, which hardly varies."""
    return f"{statistics.fmean(values):,.0f}"


def table(rows: Mapping[str, Sequence[Figures]], columns: Mapping[str, tuple[str, Cell]]) -> str:
    """Markdown: a row for each label, a column for each figure ``name: (title, how to say it)``; a dash for none."""
    lines = [["", *(title for title, _ in columns.values())], ["---"] * (len(columns) + 1)]
    for label, runs in rows.items():
        cells = []
        for name, (_, said) in columns.items():
            values = [run[name] for run in runs if run.get(name) is not None]
            cells.append(said(values) if values else "-")
        lines.append([label, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_interval(values: Sequence[float], said: Callable[[float], str], unit: str = "") -> str:
    if len(values) < 2:
        return f"{said(values[0])}{unit}"
    found = estimate(partial(mean, torch.tensor(list(values), dtype=torch.float64)), len(values))
    return f"{said(found.value)}{unit} ({said(found.low)} to {said(found.high)})"
