"""Intervals: against scipy's bootstrap, and what they must do."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from svdiff.evaluation import Estimate, bootstrap_interval, estimate, fid, kid, mean

from svdiff_kernels import SVDiffError


def test_it_is_scipys_percentile_interval() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=60)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    ours = bootstrap_interval(partial(mean, torch.from_numpy(values)), 60, resamples=20000)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.02 * values.std())


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for i in range(200):
        values = torch.from_numpy(rng.normal(3.0, 1.0, 80))
        low, high = bootstrap_interval(partial(mean, values), 80, confidence=0.8, resamples=400, seed=i)
        inside += low < 3.0 < high
    assert 0.7 < inside / 200 < 0.88


def test_it_holds_the_value_narrows_with_pictures_and_widens_with_confidence() -> None:
    values = torch.from_numpy(np.random.default_rng(2).normal(size=400))
    widths = []
    for count in (25, 100, 400):
        found = estimate(partial(mean, values[:count]), count)
        assert found.low < found.value < found.high
        assert found.value == pytest.approx(values[:count].mean().item())
        assert found.count == count
        widths.append(found.high - found.low)
    assert widths[0] > 1.4 * widths[1] > 1.4**2 * widths[2]
    sure = estimate(partial(mean, values[:25]), 25, confidence=0.99)
    assert sure.low < estimate(partial(mean, values[:25]), 25).low


def test_a_seed_draws_the_same_again() -> None:
    metric = partial(mean, torch.arange(30.0))
    state = torch.get_rng_state()
    assert bootstrap_interval(metric, 30, seed=3) == bootstrap_interval(metric, 30, seed=3)
    assert bootstrap_interval(metric, 30, seed=3) != bootstrap_interval(metric, 30, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_values_are_sure() -> None:
    assert estimate(partial(mean, torch.full((5,), 0.25)), 5) == Estimate(0.25, 0.25, 0.25, 5)


def test_many_pictures_are_resampled_in_parts() -> None:
    values = torch.arange(9000.0)
    low, high = bootstrap_interval(partial(mean, values), 9000, resamples=1000)
    half = 1.96 * values.std().item() / 9000**0.5
    assert (low, high) == pytest.approx((values.mean().item() - half, values.mean().item() + half), rel=0.005)


def test_fid_needs_centring_and_kid_does_not() -> None:
    rng = np.random.default_rng(3)
    x, y = torch.from_numpy(rng.normal(size=(40, 12))), torch.from_numpy(rng.normal(size=(40, 12)))
    plain = estimate(partial(fid, x, y), 40, resamples=200)
    assert plain.value < plain.low
    centred = estimate(partial(fid, x, y), 40, resamples=200, centred=True)
    assert centred.low < centred.value < centred.high
    assert centred.high - centred.low == pytest.approx(plain.high - plain.low)
    assert (found := estimate(partial(kid, x, y), 40)).low < found.value < found.high


def test_a_difference_of_two_models_on_the_same_prompts() -> None:
    rng = np.random.default_rng(4)
    common = rng.normal(0.0, 5.0, 50)  # some prompts are harder than others
    one, other = torch.from_numpy(common + rng.normal(0.5, 0.3, 50)), torch.from_numpy(common)
    found = estimate(lambda w: mean(one, w) - mean(other, w), 50)
    assert 0 < found.low < found.value < found.high < 1
    assert estimate(partial(mean, one), 50).low < estimate(partial(mean, other), 50).high


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"confidence": 1.0}, "confidence must be between 0 and 1"),
        ({"resamples": 0}, "an interval needs resamples and pictures"),
        ({"count": 0}, "an interval needs resamples and pictures, not 1000 of 0"),
    ],
)
def test_mistakes(how: dict[str, float], said: str) -> None:
    with pytest.raises(SVDiffError, match=said):
        bootstrap_interval(partial(mean, torch.ones(3)), **({"count": 3} | how))  # type: ignore[arg-type]
