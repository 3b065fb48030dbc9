"""The SVD of frozen weights: exact to fp32, and the same for the same weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor
from tqdm import tqdm

from . import solvers
from .errors import SVDiffError
from .factors import Factors

ALGORITHM_VERSION = 2
"""Part of every cache key: raise it when the same weight would give other factors than before."""

METHODS = ("auto", "gram", "svd", "randomized")

_RANDOMIZED_FROM = 64
"""The short side as a multiple of the rank from where subspace iteration takes less time than the Gram matrix."""
_BATCH_BYTES = 2**28
"""Of the Gram matrices of a batch."""


@overload
def decompose(
    weight: Tensor, rank: int | None = None, *, method: str = "auto", dtype: torch.dtype | None = None
) -> Factors: ...
@overload
def decompose(
    weight: Sequence[Tensor],
    rank: int | None = None,
    *,
    method: str = "auto",
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> list[Factors]: ...
def decompose(
    weight: Tensor | Sequence[Tensor],
    rank: int | None = None,
    *,
    method: str = "auto",
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> Factors | list[Factors]:
    """Thin SVD of a weight, or of each weight of a list; those of one short side are solved together.

    Signs are fixed: the entry of largest magnitude in each column of U is positive.

    Args:
        weight: ``[M, N]``, or a conv weight ``[C_out, C_in, kh, kw]`` taken as ``[C_out, C_in*kh*kw]``; any float.
        rank: keep this many singular values (at most ``min(M, N)`` exist); None keeps all.
        method: "gram" (eigenvectors of the Gram matrix of the short side; fast, wants ``sigma_min >= 1e-6 sigma_max``),
            "svd" (LAPACK or cuSOLVER), "randomized" (block subspace iteration, for a small rank; see
            `solvers.randomized` for its error), or "auto": randomized for a rank up to a 64th of the short side,
            else gram, and svd where the spectrum is too wide for it or the weight lacks full rank.
        dtype: dtype of U and Vh, and of sigma if that is wider than fp32; fp32 by default.
        names: of the weights of a list, for errors.
        progress: show a bar, with the time left.

    Raises:
        SVDiffError: the weight is not a real matrix or conv kernel, is empty, or holds NaN or inf; ``rank < 1``; the
            spectrum is too wide for "gram"; or the solver did not converge.

    Example:
        >>> import torch
        >>> from svdiff_kernels import decompose
        >>> weight = torch.randn(5, 3)
        >>> f = decompose(weight)
        >>> f.rank, f.shape
        (3, (5, 3))
        >>> torch.allclose(f.reconstruct(), weight, atol=1e-5)
        True
        >>> [g.rank for g in decompose([weight, torch.randn(8, 4, 3, 3)], rank=2)]
        [2, 2]
    """
    if isinstance(weight, Tensor):
        return next(factors for _, factors in decomposed([weight], rank, method=method, dtype=dtype))
    names = names or [f"weight {i} of {len(weight)}" for i in range(len(weight))]
    bar = tqdm(total=sum(cost(w) for w in weight), desc="SVD", disable=not progress, bar_format=BAR_FORMAT)
    found: dict[int, Factors] = {}
    with bar:
        for i, factors in decomposed(weight, rank, method=method, dtype=dtype, names=names):
            found[i] = factors
            bar.update(cost(weight[i]))
    return [found[i] for i in range(len(weight))]


BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
"""Of bars that count arithmetic, for which an even rate tells the time left; the numbers would mean nothing."""


def decomposed(
    weights: Sequence[Tensor],
    rank: int | None = None,
    *,
    method: str = "auto",
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[tuple[int, Factors]]:
    """`decompose` for each weight as it is found, with its number: not all are held, and not in order."""
    if method not in METHODS:
        raise SVDiffError(f"decompose: method {method!r} is not one of {', '.join(METHODS)}")
    if rank is not None and rank < 1:
        raise SVDiffError(f"decompose: rank must be at least 1, not {rank}")
    dtype = dtype or torch.float32
    for batch in batches(weights):
        told = [_told(weights[i], names[i] if names else None) for i in batch]
        matrices = [as_matrix(weights[i], names[i] if names else None).detach() for i in batch]
        yield from zip(batch, _solve(matrices, rank, method, dtype, told), strict=True)


def batches(weights: Sequence[Tensor]) -> list[list[int]]:
    """The weights by number, in batches to be solved together: of one short side and one device, the largest first."""
    groups: dict[tuple[int, torch.device], list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault((_short_side(weight), weight.device), []).append(i)
    found = []
    for (m, device), members in sorted(groups.items(), key=lambda item: item[0][0], reverse=True):
        size = max(1, _BATCH_BYTES // (8 * max(m, 1) ** 2))
        if device.type == "cpu":  # more than that the cores would not gain by
            size = min(size, 4 * torch.get_num_threads())
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return found


def cost(weight: Tensor) -> float:
    """About how much arithmetic a full decomposition takes: what a bar counts, where a weight is no good measure."""
    m = _short_side(weight)
    return 4.0 * m * weight.numel() + 40.0 * m**3  # of eigenvectors, which wait for memory, more than their count


def as_matrix(weight: Tensor, name: str | None = None, *, check_values: bool = True) -> Tensor:
    """The weight as ``[M, N]``, after checking that it can be decomposed at all; an error tells its name."""
    what = _told(weight, name)
    if weight.dim() not in (2, 4):
        raise SVDiffError(f"{what}: a matrix or a 2-D conv kernel is needed")
    if weight.numel() == 0:
        raise SVDiffError(f"{what}: it is empty")
    if not weight.is_floating_point():
        raise SVDiffError(f"{what} and dtype {weight.dtype}: a real floating-point one is needed")
    if weight.is_meta:
        raise SVDiffError(f"{what} on the meta device: load its values first")
    if check_values and not is_finite(weight):
        raise SVDiffError(f"{what}: it holds NaN or inf")
    return weight.flatten(1)


def _told(weight: Tensor, name: str | None) -> str:
    return f"{name + ': ' if name else ''}cannot decompose a weight of shape {tuple(weight.shape)}"


def is_finite(weight: Tensor) -> bool:
    """Whether all values are finite; as fast as memory where they are."""
    # A finite sum has finite terms. The sum may overflow where they are too: then one looks.
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


def _short_side(weight: Tensor) -> int:
    rows = weight.shape[0] if weight.dim() else 0
    return min(rows, weight.numel() // rows) if rows else 0


def _solve(
    matrices: Sequence[Tensor], rank: int | None, method: str, dtype: torch.dtype, told: Sequence[str]
) -> list[Factors]:
    """Of matrices with one short side, on one device; `told` is how errors begin."""
    standing = [W.shape[0] > W.shape[1] for W in matrices]
    lying = [W.T if tall else W for W, tall in zip(matrices, standing, strict=True)]
    m = lying[0].shape[0]
    rank = m if rank is None else min(rank, m)
    if method == "auto" and rank * _RANDOMIZED_FROM <= m:
        method = "randomized"
    try:
        thins = _thins(lying, rank, method, dtype)
    except torch.linalg.LinAlgError as error:
        raise SVDiffError(f"{' or '.join(told)}: {str(error).splitlines()[0]}") from error
    if None in thins:
        raise SVDiffError(f'{told[thins.index(None)]}: its spectrum is too wide for method "gram", take "auto"')
    return [_factors(thin, tall, rank, dtype) for thin, tall in zip(thins, standing, strict=True) if thin is not None]


def _thins(lying: Sequence[Tensor], rank: int, method: str, dtype: torch.dtype) -> list[solvers.Thin | None]:
    """None where the Gram matrix was insisted on, but will not do."""
    if method == "svd":
        return [solvers.svd(A) for A in lying]
    if method == "randomized" and rank < lying[0].shape[0]:
        return [solvers.randomized(A, rank) for A in lying]
    exact = torch.promote_types(dtype, torch.float32)
    found = solvers.gram([A.to(torch.promote_types(A.dtype, torch.float32)) for A in lying], exact)
    if method == "gram":
        return found
    return [solvers.svd(A) if thin is None else thin for thin, A in zip(found, lying, strict=True)]


def _factors(thin: solvers.Thin, tall: bool, rank: int, dtype: torch.dtype) -> Factors:
    short, sigma, long = thin.short[:, :rank], thin.sigma[:rank], thin.long[:rank]
    U, Vh = (long.T, short.T) if tall else (short, long)
    low, high = U.aminmax(dim=0)
    sign = torch.where(-low > high, -1.0, 1.0).to(U.dtype)
    U.mul_(sign)
    Vh.mul_(sign[:, None])
    wide = torch.promote_types(dtype, torch.float32)
    return Factors(U.to(dtype).contiguous(), sigma.to(wide).contiguous(), Vh.to(dtype).contiguous())
