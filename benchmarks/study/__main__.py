"""The command: ``python -m benchmarks.study``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from . import pairs, subjects
from .runs import Run, all_of, commit, make_missing
from .teach import prepare

_SEEDS = 3
_EXPERIMENTS = ("subjects", "layers", "rates", "pairs")


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description="SVDiff beside its neighbours.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/study"), help="default %(default)s")
    parser.add_argument("--work", type=Path, default=Path("outputs/study"), help="for pictures; default %(default)s")
    parser.add_argument("--only", nargs="+", choices=_EXPERIMENTS, default=_EXPERIMENTS, help="of the experiments")
    parser.add_argument("--contenders", nargs="+", help="of these experiments; default: all")
    parser.add_argument("--seeds", type=int, default=_SEEDS, help="default %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default %(default)s")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)  # in the child
    options = parser.parse_args()
    if options.run:
        experiment, contender, case, seed = options.run
        module = pairs if experiment == "pairs" else subjects
        figures = module.run(Run(experiment, contender, case, int(seed)), options.work)
        print(json.dumps({**figures, "commit": commit()}))
        return 0
    for several in (False, True):
        prepare(options.work, options.seeds, several=several)
    cases = {"subjects": subjects.SUBJECTS, "layers": ("mushroom", "robot"), "rates": ("robot",), "pairs": pairs.PAIRS}
    contenders: dict[str, Iterable[str]] = {**subjects.CASES, "pairs": pairs.WAYS}
    runs = []
    for name in options.only:
        runs += all_of(name, options.contenders or contenders[name], list(cases[name]), options.seeds)
    make_missing(runs, options.results, options.work, jobs=options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
