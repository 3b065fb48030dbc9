"""What the study says in words: on the side that its figures are on, and only where runs tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.advice import in_short
from benchmarks.study.claims import CLAIMS, figures_of, leads, verdict
from benchmarks.study.runs import Results, Run

_EXPERIMENTS = ("subjects", "words", "styles", "pairs", "cost")


def _found(folder: Path, experiment: str = "", **runs: Mapping[str, Any]) -> dict[str, Results]:
    """Two seeds of each contender, with the same figures."""
    if experiment:
        for name, figures in runs.items():
            for seed in range(2):
                Results(folder, experiment).add(Run(experiment, name, "robot", seed), dict(figures))
    return {name: Results(folder, name) for name in _EXPERIMENTS}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.1, 0.2, 0.15], "holds"),
        ([-0.1, -0.2, -0.15], "does not"),
        ([-0.3, 0.3, 0.2, -0.2], "not told apart"),
        ([0.0, 0.0], "not told apart"),
        ([0.5], "too few runs"),
        ([], "too few runs"),
    ],
)
def test_verdicts(values: list[float], said: str) -> None:
    assert verdict(values) == said


def test_leads_are_of_runs_of_the_same_case_and_seed(tmp_path: Path) -> None:
    for name, case, seed, drift in (
        ("shifts", "robot", 0, 0.1), ("shifts", "fish", 1, 0.2), ("full", "fish", 1, 0.5), ("full", "robot", 1, 9.0),
    ):  # fmt: skip
        Results(tmp_path, "subjects").add(Run("subjects", name, case, seed), {"drift": drift})
    found = _found(tmp_path)
    assert leads(found, "subjects", "shifts", "full", "drift", lower=True) == [pytest.approx(0.3)]
    assert leads(found, "subjects", "shifts", "full", "drift", margin=0.05) == [pytest.approx(-0.25)]
    assert leads(found, "subjects", "shifts", "full", "kid") == []


def test_ends_and_ways_are_found_by_their_names(tmp_path: Path) -> None:
    merged = {"target_error": 0.1, "target_error_added": 0.4}
    found = _found(tmp_path, "pairs", kv_apart={"ends": {"merged": merged, "added": {}}})
    assert figures_of(found["pairs"], "kv_apart/merged") == {("robot", 0): merged, ("robot", 1): merged}
    gained = leads(
        found, "pairs", "kv_apart/merged", "kv_apart/merged", "target_error", against="target_error_added", lower=True
    )
    assert gained == [pytest.approx(0.3)] * 2


def test_every_claim_is_about_what_is_measured(tmp_path: Path) -> None:
    """With figures for all, each has a verdict."""
    mark = dict.fromkeys(
        ("recognised", "unchanged", "drift", "kid", "bytes", "text_alignment", "image_alignment", "both_in_place",
         "both_right", "target_error", "target_error_added", "text_drift", "text_drift_added", "fid"), 0.5,
    )  # fmt: skip
    found = _found(tmp_path, "subjects", shifts=mark, full=mark, lora4=mark, custom=mark, inversion=mark)
    found |= {"pairs": _found(tmp_path, "pairs", joint=mark, unmix=mark, cutmix=mark, custom=mark)["pairs"]}
    ends = {"ends": {"merged": mark, "added": mark}}
    found |= {"pairs": _found(tmp_path, "pairs", mergeable_apart=ends, custom_apart=ends, kv_apart=ends)["pairs"]}
    ways = {"ways": {"plain": mark}}
    found |= {"styles": _found(tmp_path, "styles", svd_inst=ways, inst=ways)["styles"]}
    assert all(len(claim.leads(found)) == 2 for claim in CLAIMS)


@pytest.mark.parametrize(("learnt", "suits"), [(1.0, True), (0.6, False)])
def test_advice_changes_sides_with_its_figures(learnt: float, suits: bool, tmp_path: Path) -> None:
    shifts = {"recognised": learnt, "drift": 0.1, "bytes": 100_000}
    found = _found(tmp_path, "subjects", shifts=shifts, full={"recognised": 0.9, "drift": 0.2, "bytes": 9e6})
    text = in_short(found)
    use, other = text.split("**Something else suits better**")
    sentence = f"it is recognised in {learnt:.0%} of new prompts, with all weights in 90%, of which 9.00 MB are kept"
    assert sentence in (use if suits else other)
    assert ("nothing that was looked at here" in other) == suits


def test_the_smallest_file_counts_only_if_the_subject_is_learnt(tmp_path: Path) -> None:
    shifts = {"recognised": 0.9, "drift": 0.1, "bytes": 100_000}
    small = {"recognised": 0.5, "drift": 0.1, "bytes": 50_000}
    big = {"recognised": 1.0, "drift": 0.1, "bytes": 200_000}
    found = _found(tmp_path, "subjects", shifts=shifts, lora1=small, lora4=big)
    assert "- many small files: 0.10 MB a subject, LoRA r = 4 (0.20 MB) comes next." in in_short(found)
    found = _found(tmp_path, "subjects", lora1={**small, "recognised": 0.85})
    assert "- the smallest file of all: LoRA r = 1 (50.0 kB) recognises the subject in 85%" in in_short(found)
