"""The closed forms against solvers that know nothing of them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from svdiff.closed_form import directions, fit_weights, merge_shifts, merge_weights, summary
from torch import Tensor

from svdiff_kernels import SVDiffError


def problem(m: int = 5, d: int = 7, n: int = 3, N: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(m, d), (n, d), (n, m), (N, d)]
    W0, targets, values, captions = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    return W0, targets, values, captions


def drift(W: Tensor, W0: Tensor, captions: Tensor) -> float:
    return float(((W - W0) @ captions.T).square().sum())


def by_kkt(W0: Tensor, targets: Tensor, values: Tensor, captions: Tensor) -> Tensor:
    """The stationary point of the Lagrangian, row by row of W."""
    n, d = targets.shape
    system = torch.zeros(d + n, d + n, dtype=torch.float64)
    system[:d, :d] = 2 * captions.T @ captions
    system[:d, d:], system[d:, :d] = targets.T, targets
    right = torch.cat([2 * captions.T @ captions @ W0.T, values])
    return torch.linalg.solve(system, right)[:d].T


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 6), d=st.integers(1, 9), n=st.integers(1, 9), extra=st.integers(0, 20), seed=st.integers(0, 99))
def test_the_constraint_is_met_and_the_minimum_is_that_of_kkt(m: int, d: int, n: int, extra: int, seed: int) -> None:
    n = min(n, d)
    given_ = problem(m, d, n, d + 2 + extra, seed)
    _, targets, values, _ = given_
    W = merge_weights(*given_)
    assert torch.linalg.norm(W @ targets.T - values.T) <= 1e-6 * torch.linalg.norm(values)
    torch.testing.assert_close(W, by_kkt(*given_), rtol=1e-6, atol=1e-6 * float(W.abs().max()))


def test_the_minimum_is_that_of_a_general_solver() -> None:
    W0, targets, values, captions = given_ = problem(m=3, d=4, n=2)
    found = scipy.optimize.minimize(
        lambda w: drift(torch.from_numpy(w.reshape(3, 4)), W0, captions),
        np.zeros(12),
        constraints={"type": "eq", "fun": lambda w: (w.reshape(3, 4) @ targets.numpy().T - values.numpy().T).ravel()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    W = merge_weights(*given_)
    np.testing.assert_allclose(W.numpy(), found.x.reshape(3, 4), atol=1e-5)
    assert drift(W, W0, captions) <= found.fun * (1 + 1e-9)


@pytest.mark.parametrize("N", [1, 3, 6])
def test_captions_that_leave_directions_free(N: int) -> None:
    W0, targets, values, captions = given_ = problem(N=N)
    W = merge_weights(*given_)
    assert torch.linalg.norm(W @ targets.T - values.T) <= 1e-6 * torch.linalg.norm(values)
    # 3 targets and N captions in 7 dimensions: as long as there is room, captions need not drift at all
    room = N + 3 <= 7
    assert (drift(W, W0, captions) < 1e-12 * float((W0 @ captions.T).square().sum())) == room


def test_one_layer_and_one_word() -> None:
    W0, targets, values, captions = problem(n=1)
    W = merge_weights(W0, targets, values, captions)
    G = torch.linalg.inv(captions.T @ captions)
    expected = W0 + (values.T - W0 @ targets.T) @ (targets @ G) / (targets @ G @ targets.T)
    torch.testing.assert_close(W, expected)
    torch.testing.assert_close(merge_weights(W0, targets, targets @ W0.T, captions), W0)  # it is met already


def test_a_word_asked_for_twice_is_answered_by_the_mean() -> None:
    W0, targets, values, captions = problem()
    targets[1] = targets[0]
    W = merge_weights(W0, targets, values, captions)
    torch.testing.assert_close(W @ targets[0], values[:2].mean(0))
    torch.testing.assert_close(W @ targets[2], values[2])
    once = merge_weights(W0, targets[[0, 2]], torch.stack([values[:2].mean(0), values[2]]), captions)
    torch.testing.assert_close(W, once)


def test_dependent_words_that_agree_are_met() -> None:
    W0, targets, values, captions = problem()
    targets[2], values[2] = targets[0] - 2 * targets[1], values[0] - 2 * values[1]
    W = merge_weights(W0, targets, values, captions)
    torch.testing.assert_close(W @ targets.T, values.T)


def test_a_summary_stands_for_captions() -> None:
    W0, targets, values, captions = problem(N=50)
    short = summary(captions)
    assert short.shape == (7, 7)
    torch.testing.assert_close(short.T @ short / 7, captions.T @ captions / 50)
    torch.testing.assert_close(merge_weights(W0, targets, values, short), merge_weights(W0, targets, values, captions))
    few = summary(captions[:3])  # fewer than numbers in a row
    torch.testing.assert_close(few.T @ few / 7, captions[:3].T @ captions[:3] / 3)
    many = captions.repeat(400, 1)  # more than are looked at at a time
    torch.testing.assert_close(summary(many).abs(), short.abs())


@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_fitted_weights_are_the_least_square(weight: float) -> None:
    rng = torch.Generator().manual_seed(0)
    W0, *weights = (torch.randn(5, 7, generator=rng, dtype=torch.float64) for _ in range(4))
    targets = [torch.randn(n, 7, generator=rng, dtype=torch.float64) for n in (1, 4, 9)]
    captions = torch.randn(20, 7, generator=rng, dtype=torch.float64)
    parts = [*zip(targets, weights, [1.0] * 3, strict=True), (captions, W0, weight)]
    rows = torch.cat([words * (share / len(words)) ** 0.5 for words, _, share in parts])
    wanted = torch.cat([words @ W.T * (share / len(words)) ** 0.5 for words, W, share in parts])
    ridge = 1e-3 * torch.linalg.svdvals(rows)[0] * torch.eye(7, dtype=torch.float64)
    rows, wanted = torch.cat([rows, ridge]), torch.cat([wanted, ridge @ W0.T])
    fitted = fit_weights(W0, weights, targets, captions, weight)
    torch.testing.assert_close(fitted, torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T)
    torch.testing.assert_close(fit_weights(W0, weights, targets, summary(captions), weight), fitted)
    nearly = fit_weights(W0, weights[:1], targets[2:], captions, 1e-9)  # words that span everything
    torch.testing.assert_close(nearly, weights[0], atol=1e-4, rtol=1e-4)
    unseen = torch.eye(7, dtype=torch.float64)[6]
    flat = [one * (1 - unseen) for one in (captions, *targets)]
    assert torch.equal(fit_weights(W0, weights, flat[1:], flat[0]) @ unseen, W0 @ unseen)
    with pytest.raises(SVDiffError, match="do not fit W0"):
        fit_weights(W0, weights, targets[:1], captions)
    with pytest.raises(SVDiffError, match="caption_weight must be above 0"):
        fit_weights(W0, weights, targets, captions, 0.0)
    with pytest.raises(SVDiffError, match="must be"):
        fit_weights(W0, weights, [one[:, :3] for one in targets], captions)


def shift_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    rng = torch.Generator().manual_seed(seed)
    W0 = torch.randn(8, 5, generator=rng, dtype=torch.float64)
    U, sigma, Vh = torch.linalg.svd(W0, full_matrices=False)
    deltas = [torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(3)]
    targets = [torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (1, 2, 4)]
    return U, sigma, Vh, deltas, targets, torch.randn(30, 5, generator=rng, dtype=torch.float64)


def loss(
    shift: Tensor, given_: tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor], weight: float
) -> Tensor:
    """In the answers of the layer, with the weights themselves."""
    U, sigma, Vh, deltas, targets, captions = given_

    def answers(delta: Tensor, words: Tensor) -> Tensor:
        return words @ ((U * torch.relu(sigma + delta)) @ Vh).T

    def mean(difference: Tensor) -> Tensor:
        return difference.square().sum(1).mean()

    wanted = zip(targets, deltas, strict=True)
    missed = sum(mean(answers(shift, words) - answers(delta, words)) for words, delta in wanted)
    base = torch.zeros_like(sigma)
    return missed + weight * mean(answers(shift, captions) - answers(base, captions))


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("clamped", [False, True])
def test_the_merged_shift_is_the_least_square(weight: float, clamped: bool) -> None:
    given_ = shift_problem()
    _, sigma, Vh, deltas, targets, captions = given_
    if clamped:
        for delta in deltas:
            delta[2] = -3 * sigma[2]
    assert any((sigma + delta).min() < 0 for delta in deltas) or not clamped
    merged = merge_shifts(Vh, sigma, deltas, targets, captions, weight)
    assert (merged >= -sigma).all()
    found = scipy.optimize.minimize(
        lambda delta: float(loss(torch.from_numpy(delta), given_, weight)),
        np.zeros(5),
        bounds=[(-float(s), None) for s in sigma],
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-10},
    )
    np.testing.assert_allclose(merged.numpy(), found.x, atol=1e-4)
    assert float(loss(merged, given_, weight)) <= found.fun * (1 + 1e-9)
    torch.testing.assert_close(merge_shifts(Vh, sigma, deltas, targets, summary(captions), weight), merged)


def test_one_concept_without_captions_is_itself() -> None:
    _, sigma, Vh, deltas, targets, captions = shift_problem()
    merged = merge_shifts(Vh, sigma, deltas[:1], targets[1:2], captions, 0.0)
    torch.testing.assert_close(merged, torch.maximum(deltas[0], -sigma))
    nothing = merge_shifts(Vh, sigma, deltas[:1], [torch.zeros(1, 5)], captions, 0.0)
    assert not nothing.any()  # no word looks that way


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(5, 7), (3, 7), (3, 4), (9, 7)], r"values \[3, 4\] do not fit a weight of \[5, 7\]"),
        ([(5, 7), (3, 6), (3, 5), (9, 7)], r"targets \[3, 6\] and values"),
        ([(5, 7), (3, 7), (3, 5), (9, 6)], r"captions \[9, 6\] and targets \[3, 7\] must be"),
        ([(5, 7), (0, 7), (0, 5), (9, 7)], r"targets \[0, 7\] must be"),
        ([(5, 7), (8, 7), (8, 5), (9, 7)], r"8 target words are more than text features have numbers \(7\)"),
    ],
)
def test_what_does_not_fit_is_one_line(shapes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(SVDiffError, match=message) as caught:
        merge_weights(*map(torch.ones, shapes))
    assert "\n" not in str(caught.value)


def test_more_that_does_not_fit() -> None:
    with pytest.raises(SVDiffError, match="features are all zero"):
        directions(torch.ones(2, 3), torch.zeros(4, 3))
    _, sigma, Vh, deltas, targets, captions = shift_problem()
    with pytest.raises(SVDiffError, match=r"merge_shifts: 2 shifts .* and 3 targets"):
        merge_shifts(Vh, sigma, deltas[:2], targets, captions)
    with pytest.raises(SVDiffError, match="do not fit Vh"):
        merge_shifts(Vh, sigma[:3], deltas, targets, captions)
    with pytest.raises(SVDiffError, match="caption_weight must not be negative"):
        merge_shifts(Vh, sigma, deltas, targets, captions, float("nan"))
