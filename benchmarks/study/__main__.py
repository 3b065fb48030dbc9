"""The command: ``python -m benchmarks.study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import contenders, cost, editing, page, pairs, styles, subjects, words
from .runs import Figures, Run, all_of, make_missing
from .teach import prepare

_SEEDS = 3


class _Experiment(NamedTuple):
    """Who takes part, in what, and what does it."""

    contenders: Iterable[str]
    cases: Sequence[str]
    run: Callable[[Run, Path], Figures]


def _not_yet(known: Iterable[str]) -> list[str]:
    return [name for name in known if name not in contenders.ALREADY]


_EXPERIMENTS = {
    "subjects": _Experiment(contenders.CONTENDERS, subjects.SUBJECTS, subjects.run),
    "words": _Experiment(contenders.NAMERS, list(words.THINGS), words.run),
    "styles": _Experiment(contenders.STYLISTS, list(styles.ALL), styles.run),
    "pairs": _Experiment(pairs.WAYS, list(pairs.PAIRS), pairs.run),
    "layers": _Experiment(_not_yet(contenders.LAYERS), ("robot",), subjects.run),
    "rates": _Experiment(_not_yet(contenders.RATES), ("robot",), subjects.run),
    "editing": _Experiment(contenders.EDITORS, editing.ATTRIBUTES, editing.run),
    "cost": _Experiment(contenders.CONTENDERS, ("robot",), cost.run),
}
"""In the order in which they are made; cost comes last, and alone."""


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description="SVDiff beside its neighbours.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/study"), help="default %(default)s")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"), help="for pictures; default %(default)s")
    parser.add_argument("--page", type=Path, default=Path("docs/study.md"), help="default %(default)s")
    parser.add_argument("--images", type=Path, default=Path("docs/images/study"), help="default %(default)s")
    parser.add_argument("--page_only", action="store_true", help="of the results there are")
    parser.add_argument("--only", nargs="+", choices=_EXPERIMENTS, default=_EXPERIMENTS, help="of the experiments")
    parser.add_argument("--contenders", nargs="+", help="of these experiments; default: all")
    parser.add_argument("--seeds", type=int, default=_SEEDS, help="default %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default %(default)s")
    options = parser.parse_args()
    if options.page_only:
        page.write(options.results, options.page, options.images, options.work)
        return 0
    for several in (False, True):
        prepare(options.work, options.seeds, several=several)
    runs = []
    for name in options.only:
        known = _EXPERIMENTS[name]
        runs += all_of(name, options.contenders or known.contenders, known.cases, options.seeds)
    runs.sort(key=lambda run: run.seed)  # what is stopped has whole seeds
    alone = [run for run in runs if run.experiment == "cost"]
    how = {name: known.run for name, known in _EXPERIMENTS.items()}
    make_missing([run for run in runs if run not in alone], how, options.results, options.work, jobs=options.jobs)
    make_missing(alone, how, options.results, options.work, jobs=1)
    page.write(options.results, options.page, options.images, options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
