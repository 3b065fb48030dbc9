"""Runs: each a process of its own, which leaves pictures in a folder, and a line of figures in the results."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

Figures = dict[str, Any]


@dataclass(frozen=True, order=True)
class Run:
    """One thing to do.

    Attributes:
        experiment: which module knows how.
        contender: of the experiment's.
        case: what is taught, such as a subject.
        seed: of pictures, training and noise.
    """

    experiment: str
    contender: str
    case: str
    seed: int

    def folder(self, work: Path) -> Path:
        """Where it keeps pictures and facts."""
        return work / self.experiment / self.contender / f"{self.case}_{self.seed}"


class Results:
    """The figures of an experiment's runs, one JSON line each, in a file that is committed."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self._file = folder / f"{experiment}.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self.runs: dict[Run, Figures] = dict(map(_parsed, lines))

    def cases(self) -> set[str]:
        """All that there are."""
        return {run.case for run in self.runs}

    def add(self, run: Run, figures: Figures) -> None:
        """Keep a run's figures; the file is whole at any moment."""
        self.runs[run] = figures
        partial = self._file.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({**asdict(run), **self.runs[run]}) for run in sorted(self.runs)]
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(self._file)

    def of(self, contender: str, case: str | None = None) -> list[Figures]:
        """What is known of a contender, in all its cases or in one."""
        return [f for r, f in sorted(self.runs.items()) if r.contender == contender and case in (None, r.case)]


def make_missing(
    runs: Sequence[Run], how: Mapping[str, Callable[[Run, Path], Figures]], results: Path, work: Path, *, jobs: int
) -> None:
    """Run what has no figures yet, so many at a time, each on its share of the cores.

    Args:
        runs: what there is to do.
        how: by experiment, a function that can be pickled.
        results: where figures are kept.
        work: for pictures and logs.
        jobs: runs at a time.

    Raises:
        SystemExit: some failed; what the others have found is kept.
    """
    known = {experiment: Results(results, experiment) for experiment in {run.experiment for run in runs}}
    missing = [run for run in runs if run not in known[run.experiment].runs]
    failed: list[Run] = []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("forkserver")  # a process each, without the seconds that imports take
    context.set_forkserver_preload([*{function.__module__ for function in how.values()}])
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(_in_a_child, how[run.experiment], run, work, threads): run for run in missing}
        for done in tqdm(as_completed(running), desc="runs", total=len(missing)):
            run = running[done]
            try:
                known[run.experiment].add(run, done.result())
            except Exception:  # which the log tells
                failed.append(run)
    if failed:
        raise SystemExit("\n".join(f"failed: {run.folder(work) / 'log.txt'}" for run in failed))


def _in_a_child(function: Callable[[Run, Path], Figures], run: Run, work: Path, threads: int) -> Figures:
    log = run.folder(work) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as told:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(told.fileno(), stream.fileno())
        torch.set_num_threads(threads)
        try:
            return {**function(run, work), "commit": commit()}
        except BaseException:
            traceback.print_exc(file=told)
            raise


def _parsed(line: str) -> tuple[Run, Figures]:
    found = json.loads(line)
    run = Run(*(found.pop(name) for name in ("experiment", "contender", "case", "seed")))
    return run, found


def commit() -> str:
    """Of the repository, with a plus if something in it has been changed since."""
    here = Path(__file__).parent
    told = subprocess.run(
        ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"],
        cwd=here, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return told.stdout.strip()


def all_of(experiment: str, contenders: Iterable[str], cases: Sequence[str], seeds: int) -> list[Run]:
    """Every contender in every case, seed by seed, so that a study that is stopped has whole seeds."""
    contenders = list(contenders)
    return [Run(experiment, c, case, seed) for seed in range(seeds) for case in cases for c in contenders]
