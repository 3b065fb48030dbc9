"""A mix: how much of each adapter each sample of a batch gets."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import SVDiffError

Weight = float | Mapping[str, float]
"""Of an adapter in all layers; or in each by name, where layers that are not named get none."""

Row = Mapping[str, Weight]
"""What one sample gets, by adapter."""

Key = tuple[str, tuple[float, ...] | None]
"""A term of a mix: an adapter, and the weight of each layer if they differ."""


@dataclass(frozen=True)
class Mix:
    """A checked mix.

    Attributes:
        rows: of each sample its terms, with their weights.
        shared: whether there is one row, for samples of any number.
        repeats: inputs that each sample has in a batch, one after the other.
    """

    rows: tuple[Mapping[Key, float], ...]
    shared: bool
    repeats: int

    @classmethod
    def make(
        cls, weights: Row | Sequence[Row], repeats: int, adapters: Collection[str], layers: Collection[str]
    ) -> Mix:
        """The mix that `weights` describes, for these adapters and layers.

        Raises:
            SVDiffError: an unknown adapter or layer, a weight that is not finite, no sample, or no input of a sample.
        """
        asked = [weights] if isinstance(weights, Mapping) else list(weights)
        if not asked:
            raise SVDiffError("a mix for no samples: give at least one")
        if repeats < 1:
            raise SVDiffError(f"each sample of a mix needs an input at least, not {repeats}")
        rows = tuple(_terms(row, adapters, layers) for row in asked)
        return cls(rows, all(row == rows[0] for row in rows), repeats)

    @property
    def keys(self) -> list[Key]:
        """All terms, each once."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def without(self, adapter: str) -> Mix:
        """The same of all other adapters."""
        rows = tuple({key: w for key, w in row.items() if key[0] != adapter} for row in self.rows)
        return Mix(rows, self.shared, self.repeats)

    def largest(self) -> dict[str, float]:
        """The adapters, each with the largest of its weights, over samples and layers."""
        found: dict[str, float] = {}
        for row in self.rows:
            for (adapter, layers), weight in row.items():
                found[adapter] = max(found.get(adapter, 0.0), *(layers or [weight]), key=abs)
        return found

    def table(self, columns: Sequence[Key | None]) -> list[list[float]]:
        """The weights as ``[S, len(columns)]``, or ``[1, ...]`` if all samples have the same."""
        rows = self.rows[:1] if self.shared else self.rows
        return [[0.0 if key is None else row.get(key, 0.0) for key in columns] for row in rows]


def per_input(table: Tensor, repeats: int, batch: int) -> Tensor:
    """A row for each input of a batch: every sample's `repeats` times, and all of that as often as the batch has it.

    Pipelines put the pictures of a prompt side by side, and under guidance all of them twice.

    Raises:
        SVDiffError: the batch is no multiple of that.
    """
    samples = len(table)
    if batch % (samples * repeats):
        each = f" with {repeats} inputs each" if repeats > 1 else ""
        raise SVDiffError(f"a mix for {samples} samples{each} does not split a batch of {batch} evenly")
    return table.repeat_interleave(repeats, 0).repeat(batch // (samples * repeats), 1)


def _terms(row: Row, adapters: Collection[str], layers: Collection[str]) -> dict[Key, float]:
    terms: dict[Key, float] = {}
    for adapter, weight in row.items():
        if adapter not in adapters:
            raise SVDiffError(f"there is no adapter {adapter!r}; there are: {', '.join(adapters)}")
        if not isinstance(weight, Mapping):
            _check_finite(adapter, [weight])
            terms[adapter, None] = float(weight)
            continue
        if unknown := [name for name in weight if name not in layers]:
            raise SVDiffError(f"the weight of adapter {adapter!r} is for {unknown[0]!r}, which is no spectral layer")
        _check_finite(adapter, weight.values())
        each = tuple(float(weight.get(name, 0.0)) for name in layers)
        if len(set(each)) == 1:
            terms[adapter, None] = each[0]
        else:
            terms[adapter, each] = 1.0
    return {key: weight for key, weight in terms.items() if weight}


def _check_finite(adapter: str, weights: Iterable[float]) -> None:
    for weight in weights:
        if not math.isfinite(weight):
            raise SVDiffError(f"the weight of adapter {adapter!r} is {weight}, not a finite number")
