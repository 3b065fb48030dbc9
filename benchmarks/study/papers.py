"""What the papers report, to stand beside what is found here; the same rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """A table of a paper.

    Attributes:
        source: where it stands.
        columns: what is in them.
        rows: by contender of the study a label, and a figure for each column; None where there is none.
    """

    source: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, *tuple[float | None, ...]]]


CUSTOM_DIFFUSION = Reported(
    "Custom Diffusion (arXiv 2212.04488), one concept; features of CLIP, KID of class pictures against real ones",
    ("text alignment", "image alignment", "KID x 1000"),
    {
        "custom": ("Custom Diffusion", 0.795, 0.775, 20.96),
        "full": ("DreamBooth", 0.781, 0.776, 32.53),
        "inversion": ("Textual Inversion", 0.670, 0.827, 22.27),
    },
)
SVD_INST = Reported(
    "SVD-InST (a course report)",
    ("FID", "LPIPS"),
    {
        "inst": ("InST", 127.5, 0.53),
        "svd_inst": ("SVD-InST", 125.1, 0.54),
        "cyclegan": ("CycleGAN", 178.3, None),
        "stytr2": ("StyTr2", 171.3, None),
    },
)
SVDIFF = Reported(
    "SVDiff (arXiv 2303.11305), Stable Diffusion 1.5",
    ("bytes",),
    {"shifts": ("SVDiff", 1.7e6), "full": ("DreamBooth", 3.66e9)},
)
