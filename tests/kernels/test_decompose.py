"""decompose and Factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdiff_kernels import Factors, SVDiffError, decompose

METHODS = ["auto", "gram", "svd"]


def spectrum(M: int, N: int, sigma: Tensor) -> Tensor:
    """A random [M, N] matrix with these singular values."""
    r = len(sigma)
    U = torch.linalg.qr(torch.randn(M, r, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(N, r, dtype=torch.float64)).Q
    return (U * sigma) @ V.T


def check(W: Tensor, f: Factors, tolerance: float) -> None:
    r = f.rank
    U, sigma, Vh = f.U.double(), f.sigma.double(), f.Vh.double()
    eye = torch.eye(r, dtype=torch.float64)
    assert (U.T @ U - eye).abs().max() <= tolerance
    assert (Vh @ Vh.T - eye).abs().max() <= tolerance
    assert torch.linalg.vector_norm((U * sigma) @ Vh - W) <= tolerance * torch.linalg.vector_norm(W)
    assert (sigma >= 0).all() and (sigma[:-1] >= sigma[1:]).all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) >= 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("M", "N"), [(31, 47), (47, 31), (1, 9), (9, 1), (23, 23)])
def test_exact_to_fp32(method: str, M: int, N: int) -> None:
    W = torch.randn(M, N)
    f = decompose(W, method=method)
    assert f.U.dtype == f.sigma.dtype == f.Vh.dtype == torch.float32
    assert f.shape == (M, N) and f.rank == min(M, N)
    assert f.U.is_contiguous() and f.Vh.is_contiguous()
    check(W.double(), f, 2e-6)
    assert torch.allclose(f.sigma.double(), torch.linalg.svdvals(W.double()), rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("low", [-3, -5, -8, -14])
def test_wide_spectra_stay_orthogonal(low: int, transposed: bool) -> None:
    sigma = torch.logspace(0, low, 29, dtype=torch.float64)
    W = spectrum(29, 53, sigma)
    W = W.T if transposed else W
    f = decompose(W, dtype=torch.float64)
    check(W, f, 1e-9)
    assert torch.allclose(f.sigma, sigma, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize(
    "W", [spectrum(29, 53, torch.rand(7, dtype=torch.float64)), torch.ones(13, 7), torch.zeros(5, 8)]
)
def test_rank_deficient(W: Tensor) -> None:
    check(W.double(), decompose(W), 2e-6)


def test_equal_singular_values() -> None:
    check(torch.eye(17).double(), decompose(torch.eye(17)), 1e-6)


@settings(max_examples=30, deadline=None)
@given(M=st.integers(1, 24), N=st.integers(1, 24), seed=st.integers(0, 2**31))
def test_signs_and_values_do_not_depend_on_the_method(M: int, N: int, seed: int) -> None:
    W = torch.randn(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram, svd = (decompose(W, method=m, dtype=torch.float64) for m in ("auto", "svd"))
    assert torch.allclose(gram.sigma, svd.sigma, rtol=1e-7, atol=1e-9)
    check(W, gram, 1e-7)
    check(W, svd, 1e-12)


def test_same_weight_same_factors() -> None:
    W = torch.randn(31, 47)
    a, b = decompose(W), decompose(W.clone())
    assert torch.equal(a.U, b.U) and torch.equal(a.sigma, b.sigma) and torch.equal(a.Vh, b.Vh)


def test_truncation_is_the_best_approximation() -> None:
    W = torch.randn(31, 47)
    f, full = decompose(W, 5), decompose(W)
    assert f.rank == 5 and f.U.shape == (31, 5) and f.Vh.shape == (5, 47)
    error = torch.linalg.matrix_norm(W - f.reconstruct(), 2)
    assert torch.allclose(error, full.sigma[5], rtol=1e-4)
    assert decompose(W, 1000).rank == 31


def test_conv_weight_and_lists() -> None:
    W = torch.randn(9, 4, 3, 2)
    f, g = decompose([W, W.half()], dtype=torch.float16)
    assert f.shape == (9, 24) and f.U.dtype == torch.float16 and f.sigma.dtype == torch.float32
    assert torch.allclose(decompose(W).reconstruct(), W.flatten(1), atol=1e-5)
    assert g.rank == 9


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN or inf"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or inf"),
        (torch.randn(5), "shape"),
        (torch.randn(0, 5), "empty"),
        (torch.ones(3, 4, dtype=torch.long), "dtype"),
        (torch.ones(3, 4, dtype=torch.complex64), "dtype"),
        (torch.ones(3, 4, device="meta"), "meta"),
    ],
)
def test_bad_weights_are_refused_in_one_line(weight: Tensor, message: str) -> None:
    with pytest.raises(SVDiffError, match=message) as error:
        decompose(weight)
    assert "\n" not in str(error.value)


def test_bad_arguments_are_refused() -> None:
    W = torch.randn(3, 4)
    with pytest.raises(SVDiffError, match="rank"):
        decompose(W, 0)
    with pytest.raises(SVDiffError, match="rank"):
        decompose(W).truncated(0)
    with pytest.raises(SVDiffError, match="method"):
        decompose(W, method="qr")
    with pytest.raises(SVDiffError, match="do not fit"):
        Factors(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 4))


def test_factors_move_and_cast() -> None:
    f = decompose(torch.randn(5, 7))
    assert f.to(dtype=torch.bfloat16).sigma.dtype == torch.float32
    assert f.to(dtype=torch.float64).sigma.dtype == torch.float64
    assert f.to("meta").U.is_meta
