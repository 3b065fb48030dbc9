"""Cut-mix: two subjects side by side in a training picture, with a caption that says which is where (SVDiff, 3.3)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        pictures: of each of two or more concepts: by number, what captions call what it shows.
        prompts: captions with {first} and {second}, which say "left" or "top"; None for `PROMPTS`.
        probability: of a mixture.

    Raises:
        SVDiffError: a prompt does not say where the subjects are.
    """

    def __init__(
        self, pictures: Sequence[Mapping[int, str]], prompts: Sequence[str] | None, *, probability: float
    ) -> None:
        self._pictures, self._probability = pictures, probability
        self._prompts = [(prompt, _arrangement(prompt)) for prompt in prompts or PROMPTS]

    def captions(self) -> dict[str, tuple[int, int]]:
        """Every caption that a mixture may have, with the concepts that are first and second in it."""
        named = [dict.fromkeys(group.values()) for group in self._pictures]
        return {
            _caption(prompt, *names): (first, second)
            for first, second in itertools.permutations(range(len(named)), 2)
            for names in itertools.product(named[first], named[second])
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
        groups = [self._pictures[i] for i in torch.randperm(len(self._pictures), generator=rng)[:2].tolist()]
        prompt, arrangement = self._prompts[_any(len(self._prompts), rng)]
        (one, name), (other, other_name) = (list(group.items())[_any(len(group), rng)] for group in groups)
        return Mixture((one, other), arrangement, _caption(prompt, name, other_name))


def _caption(prompt: str, first: str, second: str) -> str:
    return prompt.replace("{first}", first).replace("{second}", second)


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
