"""Factors: the thin SVD of one weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SVDiffError


@dataclass(frozen=True, eq=False)
class Factors:
    """``W = U diag(sigma) Vh`` of one weight, seen as a matrix ``[M, N]``.

    Attributes:
        U: ``[M, r]``, orthonormal columns.
        sigma: ``[r]``, non-increasing, never below fp32.
        Vh: ``[r, N]``, orthonormal rows; of a conv, ``N = C_in * kh * kw``.

    Example:
        >>> import torch
        >>> from svdiff_kernels import decompose
        >>> f = decompose(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> f.sigma
        tensor([3., 2., 1.])
        >>> f.truncated(2).to(dtype=torch.float16).reconstruct().diag()  # the best of rank 2
        tensor([3., 2., 0.], dtype=torch.float16)
    """

    U: Tensor
    sigma: Tensor
    Vh: Tensor

    def __post_init__(self) -> None:
        r = self.sigma.shape[0] if self.sigma.dim() == 1 else -1
        if self.U.dim() != 2 or self.Vh.dim() != 2 or self.U.shape[1] != r or self.Vh.shape[0] != r:
            raise SVDiffError(
                f"factors do not fit: U {tuple(self.U.shape)}, sigma {tuple(self.sigma.shape)}, "
                f"Vh {tuple(self.Vh.shape)}; expected [M, r], [r], [r, N]"
            )

    @property
    def rank(self) -> int:
        """How many singular values are kept."""
        return self.sigma.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(M, N)`` of the weight."""
        return self.U.shape[0], self.Vh.shape[1]

    def reconstruct(self) -> Tensor:
        """The weight ``[M, N]`` again (its best approximation of this rank), in the dtype of U."""
        return ((self.U * self.sigma) @ self.Vh.to(self.sigma.dtype)).to(self.U.dtype)

    def truncated(self, rank: int) -> Factors:
        """The ``rank`` largest singular values; ``self`` if there are no more than that."""
        if rank < 1:
            raise SVDiffError(f"rank must be at least 1, not {rank}")
        if rank >= self.rank:
            return self
        return Factors(self.U[:, :rank].contiguous(), self.sigma[:rank].clone(), self.Vh[:rank].contiguous())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """Moved, and U and Vh cast. sigma follows to fp64 only: half precision would eat small shifts.

        A copy from a CPU to a GPU is queued on the current stream, and the CPU goes on.
        """
        wide = None if dtype is None else torch.promote_types(dtype, torch.float32)
        return Factors(_moved(self.U, device, dtype), _moved(self.sigma, device, wide), _moved(self.Vh, device, dtype))


def _moved(t: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    if t.is_meta:
        return t.to(dtype=dtype)
    if device is None or not t.is_cpu or torch.device(device).type != "cuda":
        return t.to(device=device, dtype=dtype)
    return t.pin_memory().to(device, non_blocking=True).to(dtype)  # what is not pinned is waited for
