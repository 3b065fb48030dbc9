"""Chance as a function: what a run draws depends on its seed and on where it is, not on what it has drawn before.

So a resumed run draws what an uninterrupted one would have drawn, and several processes what one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *where: int | str) -> torch.Generator:
    """A source of chance of its own for each place, on the CPU."""
    return torch.Generator().manual_seed(seed_of(seed, *where))


def seed_of(seed: int, *where: int | str) -> int:
    """A seed for a place, 63 bits."""
    digest = hashlib.blake2b(repr((seed, *where)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Order:
    """Numbers from 0 to `count - 1` without end, each once a round and each round in another order.

    Args:
        count: how many.
        seed: of the run.
        name: of this order, so that two of a run differ.
    """

    def __init__(self, count: int, seed: int, name: str) -> None:
        self._count, self._seed, self._name = count, seed, name
        self._round, self._numbers = -1, [0] * count

    def __getitem__(self, place: int) -> int:
        number, i = divmod(place, self._count)
        if number != self._round:
            rng = generator(self._seed, self._name, number)
            self._round, self._numbers = number, torch.randperm(self._count, generator=rng).tolist()
        return self._numbers[i]
