"""When to use SVDiff and when not: each sentence stands on the side that its figures put it on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from svdiff.miniature import world

from . import contenders, pairs, styles
from .claims import AS_WELL, Found, figures_of, leads, verdict

_KNOWS = 0.8  # of prompts, from which a subject counts as learnt
_HALF = 0.5
_MERGES = ("mergeable_apart/merged", "custom_apart/merged", "kv_apart/merged", "kv_apart/added", "shifts_apart/added")


class Advice(NamedTuple):
    """A sentence, and what it speaks for."""

    for_svdiff: bool
    text: str


def in_short(found: Found) -> str:
    """Two lists; what has no results yet is left out."""
    given = [advice for of in _ALL if (advice := of(found))]
    lists = []
    for for_svdiff, title in ((True, "Shifts of singular values suit"), (False, "Something else suits better")):
        lines = [f"- {advice.text}" for advice in given if advice.for_svdiff == for_svdiff]
        lists.append("\n".join([f"**{title}**\n", *(lines or ["- nothing that was looked at here"])]))
    return "\n\n".join(["## In short", *lists])


def _subject(found: Found) -> Advice | None:
    rates, drifts, sizes = (
        {name: _mean(found, "subjects", name, mark) for name in ("shifts", "full")}
        for mark in ("recognised", "drift", "bytes")
    )
    if None in (*rates.values(), *drifts.values(), *sizes.values()):
        return None
    loses = verdict(leads(found, "subjects", "full", "shifts", "recognised", margin=-AS_WELL)) == "holds"
    return Advice(
        not loses and (rates["shifts"] or 0) >= _KNOWS,
        f"a subject from a few pictures: it is recognised in {rates['shifts']:.0%} of new prompts, with all weights in "
        f"{rates['full']:.0%}, of which {said_size(sizes['full'])} are kept and not {said_size(sizes['shifts'])}; "
        f"other prompts drift by {drifts['shifts']:.3f} and {drifts['full']:.3f}.",
    )


def _class(found: Found) -> Advice | None:
    rates = {
        name: rate
        for name in contenders.CONTENDERS
        if (rate := _mean(found, "subjects", name, "leaked")) is not None
        and (_mean(found, "subjects", name, "recognised") or 0) >= _KNOWS
    }
    if "shifts" not in rates:
        return None
    told = ", ".join(f"{contenders.CONTENDERS[name].label} {rates[name]:.0%}" for name in rates)
    return Advice(
        rates["shifts"] == min(rates.values()),
        f'a class that stays what it was: "a {world.CLASS_NOUN}" shows the subject with {told}. Custom Diffusion '
        "has a new word for it, the others have a rare one.",
    )


def _file(found: Found) -> Advice | None:
    sizes = {
        name: size
        for name in contenders.CONTENDERS
        if (size := _mean(found, "subjects", name, "bytes"))
        and (_mean(found, "subjects", name, "recognised") or 0) >= _KNOWS
    }
    if "shifts" not in sizes:
        return None
    smallest = min(sizes, key=sizes.__getitem__)
    others = {name: size for name, size in sizes.items() if name != "shifts"}
    next_best = min(others, key=others.__getitem__, default="shifts")
    if smallest == "shifts":
        return Advice(
            True, f"many small files: {said_size(sizes['shifts'])} a subject, {_named(next_best, sizes)} comes next."
        )
    rates = [_percent(found, "subjects", name, "recognised") for name in (smallest, "shifts")]
    return Advice(
        False,
        f"the smallest file of all: {_named(smallest, sizes)} recognises the subject in {rates[0]}, shifts with "
        f"{said_size(sizes['shifts'])} in {rates[1]}.",
    )


def _speed(found: Found) -> Advice | None:
    seconds, memory = (
        {name: _mean(found, "cost", name, mark) for name in ("shifts", "lora4", "full")}
        for mark in ("seconds_per_step", "peak_bytes")
    )
    if None in (*seconds.values(), *memory.values()):
        return None
    told = ", ".join(
        f"{contenders.CONTENDERS[name].label} {seconds[name]:.3f} s and {(memory[name] or 0) / 1e6:.0f} MB"
        for name in seconds
    )
    return Advice(
        (seconds["shifts"] or 0) <= (seconds["lora4"] or 0),
        f"the least time a step, alone on the machine and of a model this small: {told}. At real sizes it is another "
        "matter: [performance](performance.md).",
    )


def _style(found: Found) -> Advice | None:
    never_seen = {name: _in_style(found, name) for name in contenders.STYLISTS}
    shares = {name: statistics.fmean(values) for name, values in never_seen.items() if values}
    if not {"svd_inst", "shifts", "lora4"} <= shares.keys():
        return None
    order = sorted(shares, key=shares.__getitem__, reverse=True)[:4]
    told = ", ".join(
        f"{_stylist(name)} ({said_size(_mean(found, 'styles', name, 'bytes'))}) {shares[name]:.0%}" for name in order
    )
    others = [name for name in shares if name not in ("svd_inst", "shifts")]
    ahead = (leads(found, "styles", f"{name}/plain", "svd_inst/plain", "both", cases=styles.TAUGHT) for name in others)
    beaten = "holds" in map(verdict, ahead)
    return Advice(
        not beaten,
        f"a style that the base has never seen, put over other pictures: style shown and shapes kept in {told}.",
    )


def _in_style(found: Found, name: str) -> list[float]:
    known = figures_of(found["styles"], f"{name}/plain")
    return [figures["both"] for (case, _), figures in known.items() if case in styles.TAUGHT]


def _side_by_side(found: Found) -> Advice | None:
    rows = _of_pairs(found, ("joint", "cutmix", "unmix", "lora", "custom"), "both_in_place")
    if "unmix" not in rows:
        return None
    best = max(rows, key=rows.__getitem__)
    return Advice(
        best in ("cutmix", "unmix"),
        f"two subjects beside each other in one picture: {pairs.LABELS[best]} {rows[best]:.0%}; without cut-mix "
        f"{max(rows.get('joint', 0), rows.get('lora', 0), rows.get('custom', 0)):.0%} at most.",
    )


def _merging(found: Found) -> Advice | None:
    rows = _of_pairs(found, _MERGES, "both_right")
    if not rows:
        return None
    best = max(rows, key=rows.__getitem__)
    told = ", ".join(f"{pairs.LABELS[name]} {share:.0%}" for name, share in rows.items())
    return Advice(
        best in ("kv_apart/merged", "kv_apart/added", "shifts_apart/added") and rows[best] >= _HALF,
        f"subjects that were taught apart, from one file: both are right, each in a picture of its own, in: {told}.",
    )


def _word(found: Found) -> Advice | None:
    rates = {name: _mean(found, "words", name, "recognised") for name in ("inversion", "shifts")}
    sizes = {name: _mean(found, "words", name, "bytes") for name in rates}
    if None in (*rates.values(), *sizes.values()):
        return None
    unknown = _mean(found, "subjects", "inversion", "recognised") or 0.0
    return Advice(
        (rates["inversion"] or 0) < _KNOWS,
        f"a word for what the base can draw already: textual inversion needs {said_size(sizes['inversion'])} for "
        f"{rates['inversion']:.0%}, shifts {said_size(sizes['shifts'])} for {rates['shifts']:.0%}. What the base "
        f"cannot draw is not learnt so: {unknown:.0%} of the subjects.",
    )


_ALL: tuple[Callable[[Found], Advice | None], ...] = (
    _subject, _file, _style, _side_by_side, _merging, _class, _word, _speed,
)  # fmt: skip


def _of_pairs(found: Found, names: Iterable[str], mark: str) -> dict[str, float]:
    known = {name: _mean(found, "pairs", name, mark) for name in names}
    return {name: value for name, value in known.items() if value is not None}


def _mean(found: Found, experiment: str, name: str, mark: str) -> float | None:
    values = [figures[mark] for figures in figures_of(found[experiment], name).values() if mark in figures]
    return statistics.fmean(values) if values else None


def _percent(found: Found, experiment: str, name: str, mark: str) -> str:
    return f"{_mean(found, experiment, name, mark) or 0:.0%}"


def _stylist(name: str) -> str:
    contender = contenders.STYLISTS[name]
    return contender.label if contender else "not learnt"


def _named(name: str, sizes: dict[str, float]) -> str:
    return f"{contenders.CONTENDERS[name].label} ({said_size(sizes[name])})"


def said_size(size: float | None) -> str:
    """Bytes, as they are said."""
    known = size or 0
    return f"{known / 1e6:.2f} MB" if known >= 1e5 else f"{known / 1e3:.1f} kB"
