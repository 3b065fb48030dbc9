"""Three ways to a thin SVD; `decompose.py` chooses.

A solver sees its weight lying down: ``A [m, X]`` with ``m <= X``, a standing weight transposed. What it finds is
``A = short diag(sigma) long`` with ``short [m, r]`` and ``long [r, X]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops

_COLUMNS = 4096
"""Of A, taken to fp64 at a time."""

# sigma / sigma_max from which eigenvectors of the Gram matrix, whose eigenvalues are squares, need help. Rounding
# leaves `long` orthogonal to about eps * (sigma_max / sigma)^2.
_NEEDS_QR = {torch.float64: 1e-3, torch.float32: 3e-5}
_NEEDS_SVD = 1e-6


class Thin(NamedTuple):
    """``A = short diag(sigma) long``, in memory of its own."""

    short: Tensor
    sigma: Tensor
    long: Tensor


def gram(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Thin | None]:
    """By the eigenvectors of ``A A.T`` in fp64, of several A with the same m at once.

    Args:
        matrices: each ``[m, X]``; one m, any X, on one device.
        dtype: in which the result has to be exact, fp32 or fp64. For fp32 the product ``short.T A`` is one in fp32, but
            for the rows that its rounding would turn.

    Returns:
        The SVDs, in dtype with sigma in fp64; None where the spectrum is too wide (``sigma_min < 1e-6 sigma_max``).
    """
    values, vectors = ops.eigh(torch.stack([_gram_matrix(A) for A in matrices]))
    sigmas = values.flip(1).clamp_min(0).sqrt()
    return [
        _from_short(vectors[i].flip(1), sigma, A.to(dtype)) if too_wide < 1 else None
        for i, (A, sigma, too_wide) in enumerate(zip(matrices, sigmas, _too_wide(sigmas), strict=True))
    ]


def svd(A: Tensor) -> Thin:
    """By LAPACK or cuSOLVER, in fp64: for any spectrum, rank-deficient ones too; slow."""
    return Thin(*torch.linalg.svd(A.to(torch.float64), full_matrices=False))


def randomized(A: Tensor, rank: int, *, tolerance: float = 1e-3, max_iterations: int = 50) -> Thin:
    """The `rank` largest singular values, by block subspace iteration in fp64 (Halko, Martinsson, Tropp 2011, 4.5).

    A block of ``l = rank + max(16, rank / 4)`` columns is multiplied by ``A A.T`` and made orthonormal, until what of A
    is outside of it no longer shrinks by more than `tolerance` of itself (squared, in the Frobenius norm). After q
    iterations the largest singular value outside is, in expectation, at most (their corollary 10.10, with p = l - rank)
    ``(1 + sqrt(rank / (p - 1)) + e sqrt(l) / p sqrt(m - rank)) ^ (1 / (2 q + 1)) sigma[rank]``.

    Args:
        A: ``[m, X]``.
        rank: below m.
        tolerance: see above.
        max_iterations: after which what there is, is taken.

    Returns:
        The SVD, in fp64. The random start is the same for every matrix of one shape.
    """
    m = A.shape[0]
    width = min(m, rank + max(16, rank // 4))
    A = A.to(torch.float64)
    start = torch.randn(m, width, dtype=A.dtype, device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    basis = torch.linalg.qr(start.to(A.device)).Q
    energy, outside = A.square().sum(), float("inf")
    for _ in range(max_iterations):
        basis = torch.linalg.qr(A @ (A.T @ basis)).Q
        projected = basis.T @ A  # [l, X]
        values, vectors = ops.eigh((projected @ projected.T)[None])
        before, outside = outside, (energy - values[0, -rank:].sum()).clamp_min(0).item()
        if before - outside <= tolerance * outside + 1e-14 * energy:
            break
    inner = vectors[0].flip(1)[:, :rank]
    long = inner.T @ projected
    sigma = torch.linalg.vector_norm(long, dim=1)
    return _in_order(basis @ inner, *_orthonormal_rows(long, sigma, _NEEDS_QR[torch.float64]))


def rows_by_product(sigma: Tensor, m: int) -> int:
    """How many leading rows of `long` are right as ``short.T A / sigma`` with everything in fp32.

    Rounding turns row i towards the first by about ``eps sigma[0] / (sqrt(m) sigma[i])``, times a little: at most 3e-6
    here, as measured for m from 64 to 1280.
    """
    return int((sigma >= sigma[0] * (0.25 / m**0.5)).sum()) if sigma[0] > 0 else 0


def by_product(short: Tensor, sigma: Tensor, A: Tensor, out: Tensor | None = None) -> Tensor:
    """``long = short.T A / sigma``, in A's dtype and no less, whatever autocast and TF32 settings say; into `out`."""
    with _full_precision(), torch.autocast(A.device.type, enabled=False):
        return torch.mm(short.T, A, out=out).div_(sigma.to(A.dtype)[:, None])


_switching = Lock()  # the settings are the whole process's: two threads would put back each other's


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of fp32 in fp32, then the settings as they were."""
    with _switching, _ieee_products():
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    if hasattr(torch.backends.mkldnn, "matmul"):
        # By backend: where a user has set one of these, torch refuses to read the older one for all of them.
        switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, precision in zip(switches, before, strict=True):
                switch.fp32_precision = precision
    else:  # torch 2.8
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def _gram_matrix(A: Tensor) -> Tensor:
    """``A A.T`` in fp64, on and below the diagonal."""
    m = A.shape[0]
    step = m if m < 512 else -(-m // 4)  # blocks above the diagonal are left out
    G = torch.zeros(m, m, dtype=torch.float64, device=A.device)
    block = torch.empty(0, dtype=torch.float64, device=A.device)
    for columns in A.split(_COLUMNS, dim=1):
        if block.shape != columns.shape:  # memory that the process has had before is faster than new one
            block = torch.empty_like(columns, dtype=torch.float64)
        block.copy_(columns)
        for i in range(0, m, step):
            G[i : i + step, : i + step].addmm_(block[i : i + step], block[: i + step].T)
    return G


def _too_wide(sigmas: Tensor) -> list[bool]:
    return (~(sigmas[:, -1] >= _NEEDS_SVD * sigmas[:, 0]) | (sigmas[:, 0] == 0)).tolist()


def _from_short(short: Tensor, sigma: Tensor, A: Tensor) -> Thin:
    """The SVD whose `short` ``[m, m]`` and sigma are known, in fp64; A in the dtype of the result."""
    m, dtype = A.shape[0], A.dtype
    if dtype == torch.float64 or sigma[-1] < _NEEDS_QR[dtype] * sigma[0]:
        long = short.T @ A.to(torch.float64)
        sigma = torch.linalg.vector_norm(long, dim=1)
        thin = _in_order(short, *_orthonormal_rows(long, sigma, _NEEDS_QR[dtype]))
        return Thin(thin.short.to(dtype), thin.sigma, thin.long.to(dtype))
    rounded, count = short.to(dtype), rows_by_product(sigma, m)
    long = A.new_empty(A.shape)
    by_product(rounded[:, :count], sigma[:count], A, out=long[:count])
    if count < m:
        for part, columns in zip(long[count:].split(_COLUMNS, 1), A.split(_COLUMNS, 1), strict=True):
            part.copy_(by_product(short[:, count:], sigma[count:], columns.to(torch.float64)))
    return Thin(rounded, sigma, long)


def _orthonormal_rows(long: Tensor, sigma: Tensor, needs_qr: float) -> tuple[Tensor, Tensor]:
    """``(sigma, long)`` from ``diag(sigma) long``, whose rows are orthogonal but for rounding."""
    if 0 < sigma.min() >= needs_qr * sigma.max():
        return sigma, long / sigma[:, None]
    Q, R = torch.linalg.qr(long.T)  # R is diagonal up to rounding
    return R.diagonal().abs(), Q.T * torch.where(R.diagonal() < 0, -1.0, 1.0)[:, None]


def _in_order(short: Tensor, sigma: Tensor, long: Tensor) -> Thin:
    order = torch.argsort(sigma, descending=True, stable=True)
    return Thin(short[:, order], sigma[order], long[order])
