"""docs/study.md: tables and prose of what was found. No figure is typed; what the prose claims is checked."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from svdiff.evaluation import estimate
from svdiff.evaluation.metrics import mean

from . import contenders, pairs, papers, plots, styles, subjects
from .advice import in_short, said_size
from .claims import CLAIMS, verdict
from .runs import Figures, Results

Cell = Callable[[Sequence[float]], str]
Columns = Mapping[str, tuple[str, Cell]]


def percent(values: Sequence[float]) -> str:
    """The mean of shares, and where it is with 95 % confidence over runs."""
    return _with_interval(values, lambda value: f"{100 * value:.0f}", " %")


def number(values: Sequence[float], digits: int = 2) -> str:
    """The mean, and its interval."""
    return _with_interval(values, lambda value: f"{round(value, digits) + 0.0:.{digits}f}")  # no -0


def size(values: Sequence[float]) -> str:
    """Bytes, which hardly vary."""
    return said_size(statistics.fmean(values))


def count(values: Sequence[float]) -> str:
    """How many, which hardly varies."""
    return f"{statistics.fmean(values):,.0f}"


def _span(results: Results) -> str:
    """How many runs, and of which seeds; a study that was stopped has not all of the last."""
    seeds = sorted({run.seed for run in results.runs})
    return f"{len(results.runs)} runs, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def table(rows: Mapping[str, Sequence[Figures]], columns: Columns) -> str:
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


def write(results: Path, page: Path, images: Path, work: Path) -> None:
    """Write the page and its plots from the results there are, and galleries from the pictures.

    Where pictures are no longer there, as in a fresh clone, earlier galleries stay.

    Raises:
        SystemExit: there are no results of subjects, which every other table leans on.
    """
    found = {name: Results(results, name) for name in (*_SECTIONS, "cost")}
    if not found["subjects"].runs:
        raise SystemExit(f"no results in {results}: run python -m benchmarks.study first")
    for name, plot in plots.PLOTS.items():
        plot(found["subjects"], images / f"{name}.png")
    plots.subjects_gallery(found["subjects"], work, images / "subjects.png")
    plots.styles_gallery(found["styles"], work, images / "styles.png")
    parts = [_head(found.values()), in_short(found)]
    for name, section in _SECTIONS.items():
        if found[name].runs:
            parts.append(section(found, _relative(images, page.parent)))
    parts += [_claims(found), _papers(found)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n")


def _head(found: Iterable[Results]) -> str:
    known = [one for one in found if one.runs]
    seeds = sorted({run.seed for one in known for run in one.runs})
    commits = sorted({figures["commit"] for one in known for figures in one.runs.values()})
    return f"""# Study

SVDiff beside what it is compared and combined with, on the miniature: {sum(len(one.runs) for one in known)} runs, seeds
{", ".join(map(str, seeds))}, commits {", ".join(commits)}. The recogniser reads pictures by rule; alignment, KID, FID
and drift are of the features of the miniature's own encoder, which stands in for CLIP: they can be compared with each
other, not with figures of CLIP. Figures are means over runs, in brackets where the mean is with 95 % confidence
(bootstrap over runs, which are subjects and seeds).

    python -m benchmarks.study          # makes what is missing, and this page; it may be stopped and goes on

Every figure here is read from `benchmarks/results/study/`."""


def _subjects(found: Mapping[str, Results], images: str) -> str:
    marks = _rows(found["subjects"], contenders.CONTENDERS)
    cost = found["cost"]
    rows = {}
    for name, contender in contenders.CONTENDERS.items():
        if runs := found["subjects"].of(name):
            rows[contender.label] = [*runs, *cost.of(name)]
    return f"""## One subject

Six pictures, {subjects.STEPS} steps of {subjects.BATCH} samples and as many of the class,
{len(found["subjects"].cases())} subjects that the base has never seen, {_span(found["subjects"])}; rates: see below.
Asked are new prompts.

{
        table(
            marks,
            {
                "recognised": ("subject recognised", percent),
                "agreeing": ("all as asked", percent),
                "unchanged": ("other prompts right", percent),
                "leaked": ("subject in plain toys", percent),
                "text_alignment": ("text alignment", number),
                "image_alignment": ("image alignment", number),
                "drift": ("drift of other prompts", partial(number, digits=3)),
                "diversity": ("diversity of toys", number),
            },
        )
    }

{
        table(
            rows,
            {
                "numbers": ("numbers trained", count),
                "bytes": ("file", size),
                "seconds_per_step": ("s a step", partial(number, digits=3)),
                "peak_bytes": ("peak memory", size),
            },
        )
    }

![The same prompt, drawn by each contender: one picture a subject]({images}/subjects.png)

![Text against image alignment, a dot a run, a large one the mean]({images}/alignment.png)

![Over steps]({images}/drift.png)

Where the change sits, and where in the spectrum:

![Relative change of weights by kind of layer]({images}/places.png)

![How much each layer has changed]({images}/layers.png)

![How far singular values move]({images}/spectrum.png)

![What the weight of the shifts does]({images}/scales.png)"""


def _words(found: Mapping[str, Results], images: str) -> str:
    columns: Columns = {
        "recognised": ("thing recognised", percent),
        "agreeing": ("all as asked", percent),
        "unchanged": ("other prompts right", percent),
        "bytes": ("file", size),
    }
    return f"""## A word for what the base can draw

A plain object (a purple star, a green heart, an orange cross) that captions call by a new word only;
{_span(found["words"])}.

{table(_rows(found["words"], contenders.NAMERS), columns)}"""


def _styles(found: Mapping[str, Results], images: str) -> str:
    columns: Columns = {
        "shown": ("style shown", percent),
        "kept": ("shapes kept", percent),
        "both": ("both", percent),
        "fid": ("FID to the exact style", partial(number, digits=1)),
        "content_distance": ("distance to the content", number),
    }
    never_seen = [case for case in found["styles"].cases() if case != styles.KNOWN]
    parts = []
    for title, cases in (
        (f"{len(never_seen)} styles that the base has never seen, at strength 0.8", never_seen),
        ("What the base can draw, a black ground, at strength 0.95", [styles.KNOWN]),
    ):
        for way in ("plain", "stochastic inversion"):
            rows: dict[str, list[Figures]] = {}
            for name, contender in contenders.STYLISTS.items():
                runs = [run["ways"][way] for case in sorted(cases) for run in found["styles"].of(name, case)]
                if runs:
                    rows[contender.label if contender else "not learnt"] = runs
            if rows:
                parts.append(f"{title}, {way}:\n\n{table(rows, columns)}")
    tables = "\n\n".join(parts)
    return f"""## A style

Two dozen pictures in a style; other pictures are drawn anew in it, image to image; {_span(found["styles"])}.

![The same picture, drawn anew by each contender in every style]({images}/styles.png)

{tables}"""


def _pairs(found: Mapping[str, Results], images: str) -> str:
    rows: dict[str, list[Figures]] = {}
    for name in pairs.WAYS:
        for run in found["pairs"].of(name):
            for end, figures in run.get("ends", {"": run}).items():
                rows.setdefault(pairs.LABELS[f"{name}/{end}" if end else name], []).append(figures)
    merged = {label: runs for label, runs in rows.items() if any("merge_seconds" in run for run in runs)}
    columns: Columns = {
        "both_in_place": ("both, each in its place", percent),
        "both_elsewhere": ("on grounds never taught", percent),
        "both_right": ("each right in a picture of its own", percent),
        "agreeing": ("one alone, all as asked", percent),
        "worse": ("the worse of the two", percent),
        "unchanged": ("other prompts right", percent),
    }
    answers: Columns = {
        "merge_seconds": ("s to merge", number),
        "target_error": ("words missed", number),
        "text_drift": ("drift of captions", number),
        "target_error_added": ("words missed, added up", number),
        "text_drift_added": ("drift, added up", number),
    }
    return f"""## Two subjects

{len(found["pairs"].cases())} pairs, taught together or apart, {_span(found["pairs"])}.

{table(rows, columns)}

What is merged in closed form, by the answers of keys and values: of the words of the two how much is missed, and how
far captions of other things have moved, both relative; and the same of the plain sum of changes.

{table(merged, answers)}"""


def _layers(found: Mapping[str, Results], images: str) -> str:
    columns: Columns = {
        "recognised": ("subject recognised", percent),
        "agreeing": ("all as asked", percent),
        "unchanged": ("other prompts right", percent),
        "numbers": ("numbers trained", count),
        "bytes": ("file", size),
    }
    return f"""## Some layers only

Spectral shifts of some layers of the UNet, and of the text encoder but in one row; subjects:
{", ".join(sorted(found["layers"].cases()))}, {_span(found["layers"])}.

{table(_rows_with_the_first(found, "layers", contenders.LAYERS), columns)}"""


def _rates(found: Mapping[str, Results], images: str) -> str:
    columns: Columns = {
        "recognised": ("subject recognised", percent),
        "agreeing": ("all as asked", percent),
        "unchanged": ("other prompts right", percent),
    }
    return f"""## Learning rates

Subjects: {", ".join(sorted(found["rates"].cases()))}, {_span(found["rates"])}.

{table(_rows_with_the_first(found, "rates", contenders.RATES), columns)}"""


def _editing(found: Mapping[str, Results], images: str) -> str:
    rows: dict[str, list[Figures]] = {}
    for name, contender in contenders.EDITORS.items():
        label = contender.label if contender else "not learnt"
        for run in found["editing"].of(name):
            for start, figures in run["starts"].items():
                rows.setdefault(f"{label}, from {start}", []).append(figures)
    columns: Columns = {
        "changed": ("changed as asked", percent),
        "place and ground": ("place and ground kept", percent),
        "both": ("both", percent),
        "rest": ("the rest kept", percent),
    }
    return f"""## One picture, changed by words

Each picture is learnt by itself; then its colour, shape or size is asked for anew, {_span(found["editing"])}.

{table(dict(sorted(rows.items())), columns)}"""


def _claims(found: Mapping[str, Results]) -> str:
    lines = [["whose", "claim", "ahead by", "runs", "here"], ["---"] * 5]
    for claim in CLAIMS:
        leads = claim.leads(found)
        ahead = _with_interval(leads, _said) if leads else "-"
        lines.append([claim.source, claim.text, ahead, f"{len(leads)}", verdict(leads)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""## What is claimed, and what agrees

Runs are compared in pairs, each with the same subjects, pictures, prompts and noise. A claim holds, or does not, where
the 95 % interval of the mean lead (bootstrap over runs) is on one side of 0.

{rows}"""


def _papers(found: Mapping[str, Results]) -> str:
    """Their tables, in their rows and columns, ours beside."""

    def of_subjects(name: str, *marks: str) -> list[float | None]:
        return [_mean(found["subjects"].of(name), mark) for mark in marks]

    def of_styles(name: str) -> list[float | None]:
        runs = [run for case in styles.TAUGHT for run in found["styles"].of(name, case)]
        plain = [run["ways"]["plain"] for run in runs]
        return [_mean(plain, mark) for mark in ("fid", "content_distance")]

    parts = [
        _beside(papers.CUSTOM_DIFFUSION, lambda name: of_subjects(name, "text_alignment", "image_alignment", "kid")),
        _beside(papers.SVD_INST, of_styles),
        _beside(papers.SVDIFF, lambda name: of_subjects(name, "bytes")),
    ]
    return "\n\n".join(
        [
            "## The papers' tables",
            "Theirs are of Stable Diffusion and photos, ours of the miniature, by stand-ins: order can be compared,\n"
            "size cannot. Ours for LPIPS is 1 - cosine of the encoder's features; our KID is of larger features, and\n"
            "not times 1000.",
            *parts,
        ]
    )


def _beside(reported: papers.Reported, ours_of: Callable[[str], Sequence[float | None]]) -> str:
    columns = [f"{column}, {whose}" for column in reported.columns for whose in ("theirs", "ours")]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, (label, *theirs) in reported.rows.items():
        pairs_of = zip(theirs, ours_of(name), strict=True)
        lines.append([label, *(_or_dash(value) for pair in pairs_of for value in pair)])
    return f"{reported.source}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(runs: Sequence[Figures], mark: str) -> float | None:
    values = [run[mark] for run in runs if run.get(mark) is not None]
    return statistics.fmean(values) if values else None


def _or_dash(value: float | None) -> str:
    return "-" if value is None else _said(value)


def _said(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _rows_with_the_first(
    found: Mapping[str, Results], experiment: str, known: Mapping[str, contenders.Contender]
) -> dict[str, list[Figures]]:
    """As `_rows`, with those of the first table that belong here, of the same cases and seeds."""
    asked = {(run.case, run.seed) for run in found[experiment].runs}
    rows = {}
    for name, contender in known.items():
        first = [
            figures
            for run, figures in sorted(found["subjects"].runs.items())
            if run.contender == contenders.ALREADY.get(name) and (run.case, run.seed) in asked
        ]
        if runs := [*found[experiment].of(name), *first]:
            rows[contender.label] = runs
    return rows


def _rows(found: Results, known: Mapping[str, Any]) -> dict[str, list[Figures]]:
    return {contender.label: runs for name, contender in known.items() if (runs := found.of(name))}


def _relative(path: Path, start: Path) -> str:
    return path.resolve().relative_to(start.resolve()).as_posix()


_SECTIONS: dict[str, Callable[[Mapping[str, Results], str], str]] = {
    "subjects": _subjects,
    "words": _words,
    "styles": _styles,
    "pairs": _pairs,
    "layers": _layers,
    "rates": _rates,
    "editing": _editing,
}
