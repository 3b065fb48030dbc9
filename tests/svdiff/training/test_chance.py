"""Chance as a function of seed and place."""

from __future__ import annotations

import pytest
import torch
from svdiff.training.chance import Order, generator, seed_of


def test_a_place_has_its_own_chance() -> None:
    places = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "a1"), (0, "a", "1")]
    seeds = [seed_of(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    first = torch.randn(3, generator=generator(0, "a", 1))
    torch.randn(5)  # whatever else is drawn
    assert torch.equal(torch.randn(3, generator=generator(0, "a", 1)), first)


def test_chance_is_the_same_with_every_version() -> None:
    """Or a run could not be gone on with after an update."""
    assert seed_of(0, "instance", 3) == 5714798275321994242
    assert [Order(7, 3, "x")[i] for i in range(7)] == [4, 1, 0, 5, 2, 6, 3]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_an_order_has_each_number_once_a_round(count: int) -> None:
    order = Order(count, 0, "x")
    rounds = [[order[i] for i in range(start, start + count)] for start in range(0, 20 * count, count)]
    assert all(sorted(numbers) == list(range(count)) for numbers in rounds)
    assert len({tuple(numbers) for numbers in rounds}) > (count > 1)  # rounds differ from each other


def test_an_order_does_not_depend_on_what_was_asked_before() -> None:
    places = [17, 3, 0, 16, 9, 3]
    order = Order(5, 0, "x")
    assert [order[i] for i in places] == [Order(5, 0, "x")[i] for i in places]


def test_orders_differ_by_seed_and_name() -> None:
    orders = {tuple(Order(9, seed, name)[i] for i in range(9)) for seed in (0, 1) for name in ("x", "y")}
    assert len(orders) == 4
