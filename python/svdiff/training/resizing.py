"""Size augmentation: the subject smaller or larger than in its picture, and a caption that says so (Custom Diffusion).

arXiv 2212.04488 does this where it has few pictures, and has the loss look at nothing but the picture. The paper speaks
of 0.4 to 1.4 times the size; the ranges, their chances and the words here are those of its authors' code: a third of
the samples is enlarged, two thirds shrink, but for those that would shrink little, which stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SMALL = ("a far away ", "very small ")
"""What captions of shrunk pictures begin with, one or the other."""

LARGE = ("zoomed in ", "close up ")
"""What those of enlarged ones begin with."""

SMALLEST, LARGEST = 1 / 3, 1.4
_STAYS_FROM, _LARGE_FROM = 0.6, 1.2
_CHANCE_OF_LARGE = 1 / 3


class Resizing(NamedTuple):
    """What is done to a picture.

    Attributes:
        ratio: of its new size to the old one.
        words: what its caption begins with.
    """

    ratio: float
    words: str


UNCHANGED = Resizing(1.0, "")


def draw_resizing(rng: torch.Generator) -> Resizing:
    """What is done to a sample: 4 in 15 shrink, 5 are enlarged, 6 stay as they are."""
    is_large = bool(torch.rand((), generator=rng) < _CHANCE_OF_LARGE)
    place = float(torch.rand((), generator=rng))
    number = int(torch.randint(2, (), generator=rng))
    if is_large:
        return Resizing(_LARGE_FROM + place * (LARGEST - _LARGE_FROM), LARGE[number])
    ratio = SMALLEST + place * (1 - SMALLEST)
    return Resizing(ratio, SMALL[number]) if ratio < _STAYS_FROM else UNCHANGED


def resized_captions(caption: str) -> list[str]:
    """All that a picture's caption may become, itself left out."""
    return [words + caption for words in (*SMALL, *LARGE)]
