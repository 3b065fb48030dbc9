"""The SVD of frozen weights: exact to fp32, and the same for the same weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .errors import SVDiffError
from .factors import Factors

ALGORITHM_VERSION = 1
"""Part of every cache key: raise it when the same weight would give other factors than before."""

# sigma / sigma_max below which the Gram matrix, whose eigenvalues are squares, needs help. Rounding leaves V orthogonal
# to about eps * (sigma_max / sigma)^2: 2e-8 at the first line, nothing at all at the second.
_NEEDS_QR = 1e-4
_NEEDS_SVD = 1e-6


@overload
def decompose(
    weight: Tensor, rank: int | None = None, *, method: str = "auto", dtype: torch.dtype | None = None
) -> Factors: ...
@overload
def decompose(
    weight: Sequence[Tensor], rank: int | None = None, *, method: str = "auto", dtype: torch.dtype | None = None
) -> list[Factors]: ...
def decompose(
    weight: Tensor | Sequence[Tensor],
    rank: int | None = None,
    *,
    method: str = "auto",
    dtype: torch.dtype | None = None,
) -> Factors | list[Factors]:
    """Thin SVD of a weight, or of each weight of a list.

    All arithmetic is fp64. Signs are fixed: the entry of largest magnitude in each column of U is positive.

    Args:
        weight: ``[M, N]``, or a conv weight ``[C_out, C_in, kh, kw]`` taken as ``[C_out, C_in*kh*kw]``; any float.
        rank: keep this many singular values (at most ``min(M, N)`` exist); None keeps all.
        method: "gram" (eigenvectors of the Gram matrix of the short side; fast, wants ``sigma_min >= 1e-6 sigma_max``),
            "svd" (LAPACK), or "auto": gram, and svd where the spectrum is too wide for it.
        dtype: dtype of U and Vh, and of sigma if that is wider than fp32; fp32 by default.

    Raises:
        SVDiffError: the weight is not a real matrix or conv kernel, is empty, or holds NaN or inf; or ``rank < 1``.
    """
    if not isinstance(weight, Tensor):
        return [decompose(w, rank, method=method, dtype=dtype) for w in weight]
    if method not in ("auto", "gram", "svd"):
        raise SVDiffError(f"decompose: method {method!r} is not one of auto, gram, svd")
    if rank is not None and rank < 1:
        raise SVDiffError(f"decompose: rank must be at least 1, not {rank}")
    factors = _decompose_fp64(as_matrix(weight).detach().to(torch.float64), method)
    if rank is not None:
        factors = factors.truncated(rank)
    return factors.to(dtype=dtype or torch.float32)


def as_matrix(weight: Tensor) -> Tensor:
    """The weight as ``[M, N]``, after checking that it can be decomposed at all."""
    shape = tuple(weight.shape)
    if weight.dim() not in (2, 4):
        raise SVDiffError(f"cannot decompose a weight of shape {shape}: a matrix or a 2-D conv kernel is needed")
    if weight.numel() == 0:
        raise SVDiffError(f"cannot decompose a weight of shape {shape}: it is empty")
    if not weight.is_floating_point():
        raise SVDiffError(f"cannot decompose a weight of dtype {weight.dtype}: a real floating-point one is needed")
    if weight.is_meta:
        raise SVDiffError(f"cannot decompose a weight of shape {shape} on the meta device: load its values first")
    if not torch.isfinite(weight).all():
        raise SVDiffError(f"cannot decompose a weight of shape {shape}: it holds NaN or inf")
    return weight.flatten(1)


def _decompose_fp64(W: Tensor, method: str) -> Factors:
    if method != "svd":
        wide = W.shape[0] <= W.shape[1]
        factors = _gram(W if wide else W.T)
        if not wide:
            factors = Factors(factors.Vh.T, factors.sigma, factors.U.T)
        ratio = (factors.sigma[-1] / factors.sigma[0].clamp_min(1e-300)).item()
        if method == "gram" or ratio >= _NEEDS_SVD:
            return _with_fixed_signs(factors)
    return _with_fixed_signs(Factors(*torch.linalg.svd(W, full_matrices=False)))


def _gram(W: Tensor) -> Factors:
    """From the eigenvectors of ``W W.T``, for M <= N: left vectors first, then ``P = U.T W = diag(sigma) Vh``."""
    U = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)  # eigenvalues ascend
    P = U.T @ W
    sigma = torch.linalg.vector_norm(P, dim=1)
    if sigma.min() >= _NEEDS_QR * sigma.max():
        Vh = P / sigma[:, None]
    else:
        Q, R = torch.linalg.qr(P.T)  # rows of P are orthogonal up to rounding, so R is diagonal up to rounding
        Vh = Q.T * torch.where(R.diagonal() < 0, -1.0, 1.0)[:, None]
        sigma = R.diagonal().abs()
    order = torch.argsort(sigma, descending=True, stable=True)
    return Factors(U[:, order], sigma[order], Vh[order])


def _with_fixed_signs(factors: Factors) -> Factors:
    U = factors.U
    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True))  # [1, r]
    sign = torch.where(peak < 0, -1.0, 1.0).to(U.dtype)
    return Factors((U * sign).contiguous(), factors.sigma, (factors.Vh * sign.T).contiguous())
