"""What is claimed of the methods, by their papers and by us, and whether it holds here: run by run, not table by table.

Two contenders are compared where both had the same case and seed, so with the same pictures, prompts and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from svdiff.evaluation import estimate
from svdiff.evaluation.metrics import mean

from .runs import Figures, Results, Run

Found = Mapping[str, Results]
AS_WELL = 0.05
"""A share that is lower by less is as good."""


@dataclass(frozen=True)
class Claim:
    """That one is ahead of another.

    Attributes:
        source: whose claim it is.
        text: in words.
        leads: by how much the claim is right in each pair of runs; negative where it is wrong.
    """

    source: str
    text: str
    leads: Callable[[Found], Sequence[float]]


def verdict(leads: Sequence[float]) -> str:
    """``holds`` or ``does not`` where the mean lead has its 95 % interval (bootstrap over runs) on one side of 0."""
    if len(leads) < 2:
        return "too few runs"
    found = estimate(partial(mean, torch.tensor(list(leads), dtype=torch.float64)), len(leads))
    return "holds" if found.low > 0 else "does not" if found.high < 0 else "not told apart"


def figures_of(results: Results, name: str) -> dict[tuple[str, int], Figures]:
    """By case and seed, what is known of a contender, or of an end or a way of it: ``custom_apart/merged``."""
    contender, _, part = name.partition("/")

    def within(run: Run) -> Figures:
        figures = results.runs[run]
        parts: Mapping[str, Figures] = figures.get("ends") or figures.get("ways") or {}
        return parts.get(part, {}) if part else figures

    return {(run.case, run.seed): within(run) for run in sorted(results.runs) if run.contender == contender}


def leads(
    found: Found,
    experiment: str,
    ahead: str,
    behind: str,
    mark: str,
    *,
    lower: bool = False,
    margin: float = 0.0,
    against: str | None = None,
    cases: Sequence[str] | None = None,
) -> list[float]:
    """By how much a mark of one is above another's, or below it if `lower` is better, and a margin.

    Args:
        found: all results.
        experiment: of both.
        ahead: see `figures_of`.
        behind: see `figures_of`.
        mark: of the one, and of the other unless there is another for it.
        lower: whether less is more.
        margin: by which it may be behind.
        against: the other's mark.
        cases: if not all.
    """
    ours, theirs = figures_of(found[experiment], ahead), figures_of(found[experiment], behind)
    sign = -1 if lower else 1
    return [
        sign * (ours[key][mark] - theirs[key][against or mark]) + margin
        for key in sorted(ours.keys() & theirs.keys())
        if (cases is None or key[0] in cases) and mark in ours[key] and (against or mark) in theirs[key]
    ]


def _claim(source: str, text: str, experiment: str, ahead: str, behind: str, mark: str, **how: object) -> Claim:
    return Claim(
        source,
        text,
        lambda found: leads(found, experiment, ahead, behind, mark, **how),  # type: ignore[arg-type]
    )


_SVDIFF, _CUSTOM, _INST, _OURS = "SVDiff", "Custom Diffusion", "SVD-InST", "this project"
CLAIMS = (
    _claim(
        _SVDIFF, "shifts learn a subject as well as all weights, or miss 5 points",
        "subjects", "shifts", "full", "recognised", margin=AS_WELL,
    ),
    _claim(_SVDIFF, "others drift less than with all weights", "subjects", "shifts", "full", "drift", lower=True),
    _claim(_SVDIFF, "and more of them are still right", "subjects", "shifts", "full", "unchanged"),
    _claim(_SVDIFF, "the file is smaller than that of all weights", "subjects", "shifts", "full", "bytes", lower=True),
    _claim(_SVDIFF, "and than a LoRA's, r = 4", "subjects", "shifts", "lora4", "bytes", lower=True),
    _claim(_SVDIFF, "others drift less than with that LoRA", "subjects", "shifts", "lora4", "drift", lower=True),
    _claim(
        _SVDIFF, "cut-mix-unmix puts two subjects beside each other, which joint training does not",
        "pairs", "unmix", "joint", "both_in_place",
    ),
    _claim(_SVDIFF, "to unmix is better than to cut and mix alone", "pairs", "unmix", "cutmix", "both_in_place"),
    _claim(_CUSTOM, "prompts are followed better than with DreamBooth", "subjects", "custom", "full", "text_alignment"),
    _claim(_CUSTOM, "and others are nearer to real pictures", "subjects", "custom", "full", "kid", lower=True),
    _claim(
        _CUSTOM, "prompts are followed better than with textual inversion",
        "subjects", "custom", "inversion", "text_alignment",
    ),
    _claim(
        _CUSTOM, "which is more like the subject's pictures", "subjects", "inversion", "custom", "image_alignment"
    ),
    _claim(
        _CUSTOM, "concepts merged in closed form are as right as taught together, or miss 5 points",
        "pairs", "mergeable_apart/merged", "custom", "both_right", margin=AS_WELL,
    ),
    _claim(_INST, "shifts bring the style nearer than the network alone", "styles", "svd_inst/plain", "inst/plain",
           "fid", lower=True),
    _claim(
        _OURS, "merged concepts are right more often if the prefix was kept",
        "pairs", "mergeable_apart/merged", "custom_apart/merged", "both_right",
    ),
    _claim(
        _OURS, "merged shifts answer the words of both better than added up",
        "pairs", "kv_apart/merged", "kv_apart/merged", "target_error", against="target_error_added", lower=True,
    ),
    _claim(
        _OURS, "and change captions less",
        "pairs", "kv_apart/merged", "kv_apart/merged", "text_drift", against="text_drift_added", lower=True,
    ),
)  # fmt: skip
