"""What a training step of one layer costs by count: operations and bytes, whatever machine runs it.

A multiplication and an addition are two operations. Bytes are the least that must move: every weight and activation
that a GEMM reads or writes, once per GEMM. T rows, weight ``[M, N]``, m = min(M, N); forward, dx and the gradient of
what trains.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one call."""

    flop: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, count: float) -> Cost:
        return Cost(self.flop * count, self.bytes * count)

    __rmul__ = __mul__


def gemm(rows: int, inner: int, columns: int, itemsize: int) -> Cost:
    """``[rows, inner] @ [inner, columns]``."""
    return Cost(2.0 * rows * inner * columns, float(itemsize) * (rows * inner + inner * columns + rows * columns))


def frozen(M: int, N: int, T: int, itemsize: int) -> Cost:
    """A dense layer that is passed through: y and dx."""
    return gemm(T, N, M, itemsize) + gemm(T, M, N, itemsize)


def factored(M: int, N: int, T: int, itemsize: int, rank: int | None = None) -> Cost:
    """``U (scale * (Vh x))``, dz and dx; d_scale is a row sum of z * dz."""
    r = min(M, N) if rank is None else rank
    parts = (gemm(T, N, r, itemsize), gemm(T, r, M, itemsize), gemm(T, M, r, itemsize), gemm(T, r, N, itemsize))
    return sum(parts, Cost(2.0 * T * r, 0.0))


def residual(M: int, N: int, T: int, itemsize: int, rank: int) -> Cost:
    """The frozen layer and a factored correction of a lower rank."""
    return frozen(M, N, T, itemsize) + factored(M, N, T, itemsize, rank)


def lora(M: int, N: int, T: int, itemsize: int, rank: int) -> Cost:
    """The frozen layer, A and B, and their gradients."""
    gradients = gemm(rank, T, N, itemsize) + gemm(M, T, rank, itemsize)
    return frozen(M, N, T, itemsize) + factored(M, N, T, itemsize, rank) + gradients


def recomposed(M: int, N: int, T: int, itemsize: int, micro_batches: int = 1) -> Cost:
    """``(U * scale) @ Vh`` once per optimiser step, the layer, dx and dW; d_scale by one more product with a factor."""
    m = min(M, N)
    build = gemm(M, m, N, itemsize) + gemm(M, N, m, itemsize)
    return frozen(M, N, T, itemsize) + gemm(M, T, N, itemsize) + build * (1 / micro_batches)


def svdiff_pytorch(M: int, N: int, T: int, itemsize: int) -> Cost:
    """``U @ diag(scale) @ Vh`` in every forward, and autograd through both products."""
    m = min(M, N)
    diagonal = gemm(M, m, m, itemsize) + gemm(m, M, m, itemsize)
    return recomposed(M, N, T, itemsize) + diagonal


def prefers_recomposed(M: int, N: int, T: int, micro_batches: int = 1) -> bool:
    """The cost rule: whether rebuilding the weight takes fewer operations than staying factored."""
    return recomposed(M, N, T, 0, micro_batches).flop < factored(M, N, T, 0).flop
