"""Figures against torchmetrics, against formulas written once more in numpy, and against what can be told by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy import linalg
from svdiff.evaluation import (
    cosine_distances,
    diversity,
    drift,
    fid,
    image_alignment,
    kid,
    mean,
    text_alignment,
)
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from svdiff_kernels import SVDiffError


def features(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(shift, 1.0, (count, width)) @ rng.normal(0, 1.0, (width, width))).float()


class Given(nn.Module):
    """Features as torchmetrics takes them: a network, here of what are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def repeated(metric: Callable[[Tensor], Tensor], weights: list[int], x: Tensor) -> Tensor:
    """The metric of pictures that are really there as often as weights say."""
    return metric(x[torch.tensor([i for i, n in enumerate(weights) for _ in range(n)])])


@pytest.mark.parametrize(("n", "m", "width"), [(40, 31, 6), (9, 13, 24), (30, 4, 11)])
def test_fid_is_torchmetrics_fid(n: int, m: int, width: int) -> None:
    x, y = features(n, width, 1), features(m, width, 2, shift=0.7)
    theirs = FrechetInceptionDistance(Given(width)).set_dtype(torch.float64)
    theirs.update(x.double(), real=False)
    theirs.update(y.double(), real=True)
    value = theirs.compute().item()
    assert fid(x, y).item() == pytest.approx(value, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("n", "m", "width"), [(40, 31, 6), (9, 13, 24)])
def test_fid_is_the_formula_with_a_matrix_root(n: int, m: int, width: int) -> None:
    x, y = features(n, width, 3).numpy().astype(float), features(m, width, 4, shift=0.3).numpy().astype(float)
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(cx @ cy + 1e-10 * np.eye(width)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * root)
    ours = fid(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert ours == pytest.approx(expected, rel=1e-4)  # what the root needs to be regular


def test_fid_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # mean (1, 0), variance 2 along the first
    y = torch.tensor([[0.0, 3.0], [4.0, 3.0]])  # mean (2, 3), variance 8 along the first
    assert fid(x, y).item() == pytest.approx(1 + 9 + 2 + 8 - 2 * 4)
    assert fid(x, x).item() == pytest.approx(0, abs=1e-12)
    assert fid(x, x + torch.tensor([3.0, 4.0])).item() == pytest.approx(25)


def test_kid_is_torchmetrics_kid_over_all_pictures() -> None:
    x, y = features(23, 7, 5), features(23, 7, 6, shift=0.4)
    theirs = KernelInceptionDistance(Given(7), subsets=1, subset_size=23).set_dtype(torch.float64)
    theirs.update(x.double(), real=False)
    theirs.update(y.double(), real=True)
    assert kid(x, y).item() == pytest.approx(theirs.compute()[0].item(), rel=1e-5)


def test_kid_is_what_subsets_come_to_on_average() -> None:
    x, y = features(12, 5, 7), features(9, 5, 8, shift=0.4)  # torchmetrics compares sets of one size only
    theirs = KernelInceptionDistance(Given(5), subsets=4000, subset_size=6).set_dtype(torch.float64)
    theirs.update(x.double(), real=False)
    theirs.update(y.double(), real=True)
    average, deviation = (value.item() for value in theirs.compute())
    assert abs(kid(x, y).item() - average) < 5 * deviation / 4000**0.5


def test_kid_by_its_sums() -> None:
    x, y = features(6, 4, 9).numpy().astype(float), features(5, 4, 10).numpy().astype(float)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    within = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 30
    among = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    between = sum(k(a, b) for a in x for b in y) / 30
    assert kid(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(within + among - 2 * between)


def test_kid_is_unbiased_so_negative_at_times_and_symmetric() -> None:
    values = [kid(features(8, 3, 2 * s), features(8, 3, 2 * s)[torch.randperm(8)] + 0.0).item() for s in range(3)]
    draws = np.random.default_rng(0)
    same = [
        kid(torch.from_numpy(draws.normal(size=(10, 3))), torch.from_numpy(draws.normal(size=(10, 3)))).item()
        for _ in range(400)
    ]
    assert all(value < 0 for value in values)  # the same pictures: pairs with themselves count in one sum only
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 4 * np.std(same) / 400**0.5
    x, y = features(7, 3, 1), features(11, 3, 2)
    assert kid(x, y).item() == pytest.approx(kid(y, x).item())
    assert fid(x, y).item() == pytest.approx(fid(y, x).item())


def test_alignments_by_hand() -> None:
    images = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-2.0, -2.0]])
    assert text_alignment(images, texts).item() == pytest.approx((1 + 0 - 1) / 3)
    references = torch.tensor([[5.0, 0.0], [0.0, 7.0]])
    assert image_alignment(images, references).item() == pytest.approx((0.5 + 0.5 + 2**-0.5) / 3)
    assert drift(images, images).item() == pytest.approx(0)
    assert drift(images, texts).item() == pytest.approx(1)


def test_cosines_are_those_of_torch() -> None:
    images, others = features(9, 6, 1), features(5, 6, 2)
    every = torch.nn.functional.cosine_similarity(images[:, None], others[None], dim=-1)
    assert image_alignment(images, others).item() == pytest.approx(every.mean().item(), abs=1e-6)
    paired = torch.nn.functional.cosine_similarity(images[:5], others, dim=-1)
    assert text_alignment(images[:5], others).item() == pytest.approx(paired.mean().item(), abs=1e-6)
    assert drift(images[:5], others).item() == pytest.approx(1 - paired.mean().item(), abs=1e-6)


def test_diversity_is_over_pairs_of_one_prompt() -> None:
    distances = torch.tensor([[0, 1, 9, 9], [1, 0, 9, 9], [9, 9, 0, 4], [9, 9, 4, 0]], dtype=torch.float32)
    assert diversity(distances, ["a", "a", "b", "b"]).item() == pytest.approx(2.5)
    assert diversity(distances, ["a", "b", "b", "a"]).item() == pytest.approx(9)
    assert diversity(distances, [None, None, "b", "c"]).item() == pytest.approx(1)
    x = features(5, 3, 1)
    by_hand = [1 - torch.nn.functional.cosine_similarity(x[i], x[j], dim=0) for i in range(5) for j in range(i)]
    assert diversity(cosine_distances(x), [0] * 5).item() == pytest.approx(torch.stack(by_hand).mean().item(), abs=1e-6)
    assert diversity(cosine_distances(x[:1].repeat(3, 1)), "aaa").item() == pytest.approx(0, abs=1e-7)


WEIGHTED: dict[str, Callable[..., Tensor]] = {
    "mean": lambda x, w=None: mean(x[:, 0], w),
    "image_alignment": lambda x, w=None: image_alignment(x, features(3, 4, 20), w),
    "fid": lambda x, w=None: fid(x, features(6, 4, 20), w),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_are_numbers_of_pictures(name: str) -> None:
    x, counts = features(5, 4, 11), [2, 0, 1, 3, 1]
    metric = WEIGHTED[name]
    weights = torch.tensor([counts, [1] * 5])
    twice, once = metric(x, weights).tolist()
    assert twice == pytest.approx(repeated(metric, counts, x).item())
    assert once == pytest.approx(metric(x).item())


def test_paired_metrics_weigh_pairs() -> None:
    x, y, weights = features(4, 3, 1), features(4, 3, 2), torch.tensor([2, 0, 1, 1])
    chosen = torch.tensor([0, 0, 2, 3])
    for metric in (text_alignment, drift):
        assert metric(x, y, weights).item() == pytest.approx(metric(x[chosen], y[chosen]).item())


def test_a_picture_drawn_twice_is_no_pair_with_itself() -> None:
    """Else a resample, where pictures repeat, would be less diverse and farther away than the pictures it is from."""
    x, y = features(8, 4, 12), features(6, 4, 13)
    draws = np.random.default_rng(0).multinomial(8, [1 / 8] * 8, size=4000)
    weights = torch.from_numpy(draws).double()
    for metric in (partial(kid, x, y), partial(diversity, cosine_distances(x), "aaaabbbb")):
        values = metric(weights=weights)
        assert abs(values.nanmean() - metric()) < 0.1 * (values[values.isfinite()].std())
    spread = weights[0]
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    d = cosine_distances(x)
    over = sum(spread[i] * spread[j] * d[i, j] for i, j in pairs) / sum(spread[i] * spread[j] for i, j in pairs)
    assert diversity(d, "a" * 8, spread).item() == pytest.approx(over.item())


X = features(4, 3, 1)
MISTAKES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "nothing": (lambda: mean(torch.zeros(0)), "there is no picture"),
    "other numbers": (lambda: text_alignment(X, X[:3]), "4 pictures cannot be paired with 3 of prompts"),
    "other widths": (lambda: image_alignment(X, features(4, 5, 1)), "features of 3 numbers cannot be compared with"),
    "no references": (lambda: image_alignment(X, X[:0]), "at least 1 pictures to compare with, not 0"),
    "one picture": (lambda: kid(X[:1], X), "KID needs at least 2 pictures, not 1"),
    "one reference": (lambda: fid(X, X[:1]), "FID needs at least 2 pictures to compare with, not 1"),
    "no pair": (lambda: diversity(cosine_distances(X), "abcd"), "at least two pictures of a prompt"),
    "prompts": (lambda: diversity(cosine_distances(X), "abc"), "4 pictures, 3 prompts"),
    "shape": (lambda: kid(X[0], X), "must be [pictures, numbers]"),
    "weights": (lambda: mean(X[:, 0], torch.ones(2, 3)), "weights are of 3 pictures, not of 4"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    call, said = MISTAKES[name]
    with pytest.raises(SVDiffError) as error:
        call()
    assert said in str(error.value)
