"""Cut-mix: two subjects side by side in a training picture, with a caption that says which is where (SVDiff, 3.3)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from svdiff_kernels import SVDiffError

from .data import Half

PROMPTS = (
    "photo of {first} on the left and {second} on the right",
    "photo of {second} on the right and {first} on the left",
    "photo of {first} at the top and {second} at the bottom",
    "photo of {second} at the bottom and {first} at the top",
)
"""Captions by default: first is on the left, or at the top."""

PLAIN, COLUMNS, ROWS = range(3)
"""How a training picture is made: of one picture, of two side by side, of two one above the other."""


class Named(NamedTuple):
    """What captions call what a picture shows, and where that is."""

    phrase: str
    setting: str = ""


@dataclass(frozen=True)
class Mixture:
    """A mixed picture to be made.

    Attributes:
        pictures: two, by number.
        arrangement: COLUMNS or ROWS.
        caption: what the mixture shows.
    """

    pictures: tuple[int, int]
    arrangement: int
    caption: str

    @property
    def halves(self) -> tuple[Half, Half]:
        """Where the pictures are."""
        return _halves(self.arrangement)


class CutMix:
    """Decides which samples are mixtures, and of what.

    Args:
        pictures: of each of two or more concepts, by number; only such of one setting are put together.
        prompts: captions with {first} and {second}, which say "left" or "top", and perhaps {setting}; None for
            `PROMPTS`.
        probability: of a mixture.

    Raises:
        SVDiffError: a prompt does not say where the subjects are, or two concepts have no setting in common.
    """

    def __init__(
        self, pictures: Sequence[Mapping[int, Named]], prompts: Sequence[str] | None, *, probability: float
    ) -> None:
        self._pictures, self._probability = pictures, probability
        self._prompts = [(prompt, _arrangement(prompt)) for prompt in prompts or PROMPTS]
        self._partners = {  # of pictures of the first that have some, by number, those of the second
            (i, j): _partners(pictures[i], pictures[j]) for i, j in itertools.permutations(range(len(pictures)), 2)
        }

    def captions(self) -> dict[str, tuple[int, int]]:
        """Every caption that a mixture may have, with the concepts that are first and second in it."""
        return {
            _caption(prompt, self._pictures[pair[0]][one], self._pictures[pair[1]][other]): pair
            for pair, partners in self._partners.items()
            for one, others in partners.items()
            for other in others
            for prompt, _ in self._prompts
        }

    def pieces(self) -> list[tuple[int, Half]]:
        """All that a mixture may be made of: the picture, and the half that it fills."""
        halves = [half for arrangement in sorted({a for _, a in self._prompts}) for half in _halves(arrangement)]
        return [(picture, half) for group in self._pictures for picture in group for half in halves]

    def draw(self, rng: torch.Generator) -> Mixture | None:
        """A mixture, or None if this sample shall not be one."""
        if torch.rand((), generator=rng) >= self._probability:
            return None
        first, second = torch.randperm(len(self._pictures), generator=rng)[:2].tolist()
        prompt, arrangement = self._prompts[_any(len(self._prompts), rng)]
        partners = self._partners[first, second]
        one = list(partners)[_any(len(partners), rng)]
        other = partners[one][_any(len(partners[one]), rng)]
        caption = _caption(prompt, self._pictures[first][one], self._pictures[second][other])
        return Mixture((one, other), arrangement, caption)


def _partners(pictures: Mapping[int, Named], others: Mapping[int, Named]) -> dict[int, list[int]]:
    found = {
        one: [other for other, there in others.items() if there.setting == named.setting]
        for one, named in pictures.items()
    }
    if not any(found.values()):
        one, other = (sorted({named.setting for named in group.values()}) for group in (pictures, others))
        raise SVDiffError(f"cut-mix finds no two pictures of one setting: of one concept {one}, of another {other}")
    return {one: partners for one, partners in found.items() if partners}


def _caption(prompt: str, first: Named, second: Named) -> str:
    named = prompt.replace("{first}", first.phrase).replace("{second}", second.phrase)
    return named.replace("{setting}", first.setting)


def _halves(arrangement: int) -> tuple[Half, Half]:
    axis = -1 if arrangement == COLUMNS else -2
    return Half(axis, 0), Half(axis, 1)


def _arrangement(prompt: str) -> int:
    words = prompt.lower()
    if "left" in words:
        return COLUMNS
    if "top" in words:
        return ROWS
    raise SVDiffError(f"cut_mix_prompts: {prompt!r} does not say left and right, or top and bottom")


def _any(count: int, rng: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=rng))
