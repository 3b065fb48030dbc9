"""What a training step of one layer costs by count: operations and bytes, whatever machine runs it.

A multiplication and an addition are two operations. Bytes are the least that must move: every weight and activation
that a product reads or writes, once per product. T rows, weight ``[M, N]``, m = min(M, N); forward, dx and the gradient
of what trains. A method is a list of products, so that who counts tiles or launches counts the same ones.

A conv's rows overlap: `fold` is how many numbers of its input there are for each number of its rows, 1 for a linear.
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


@dataclass(frozen=True)
class Product:
    """``[rows, inner] @ [inner, columns]``; of a conv's rows, memory holds the share `left`, `right` or `out`."""

    rows: int
    inner: int
    columns: int
    left: float = 1.0
    right: float = 1.0
    out: float = 1.0

    def cost(self, itemsize: int) -> Cost:
        """By count, with all three matrices in one type."""
        read = self.left * self.rows * self.inner + self.right * self.inner * self.columns
        moved = read + self.out * self.rows * self.columns
        return Cost(2.0 * self.rows * self.inner * self.columns, itemsize * moved)


Products = tuple[Product, ...]


def gemm(rows: int, inner: int, columns: int, itemsize: int) -> Cost:
    """``[rows, inner] @ [inner, columns]``."""
    return Product(rows, inner, columns).cost(itemsize)


def total(products: Products, itemsize: int) -> Cost:
    """Of all of them."""
    return sum((product.cost(itemsize) for product in products), Cost(0.0, 0.0))


def frozen_products(M: int, N: int, T: int, fold: float = 1.0) -> Products:
    """y and dx."""
    return Product(T, N, M, left=fold), Product(T, M, N, out=fold)


def factored_products(M: int, N: int, T: int, rank: int | None = None, fold: float = 1.0) -> Products:
    """z, y, dz and dx."""
    r = min(M, N) if rank is None else rank
    return Product(T, N, r, left=fold), Product(T, r, M), Product(T, M, r), Product(T, r, N, out=fold)


def lora_products(M: int, N: int, T: int, rank: int, fold: float = 1.0) -> Products:
    """The frozen layer's, those through A and B, and the gradients of A and B."""
    gradients = Product(rank, T, N, right=fold), Product(M, T, rank)
    return frozen_products(M, N, T, fold) + factored_products(M, N, T, rank, fold) + gradients


def build_products(M: int, N: int) -> Products:
    """``(U * scale) @ Vh``, and dW back to a factor."""
    m = min(M, N)
    return Product(M, m, N), Product(M, N, m)


def svdiff_pytorch_products(M: int, N: int, T: int, fold: float = 1.0) -> Products:
    """The frozen layer's, dW, and ``U @ diag(scale) @ Vh`` with its backward."""
    m = min(M, N)
    dW = Product(M, T, N, right=fold)
    return *frozen_products(M, N, T, fold), dW, *build_products(M, N), Product(M, m, m), Product(m, M, m)


def frozen(M: int, N: int, T: int, itemsize: int, fold: float = 1.0) -> Cost:
    """A dense layer that is passed through: y and dx."""
    return total(frozen_products(M, N, T, fold), itemsize)


def factored(M: int, N: int, T: int, itemsize: int, rank: int | None = None, fold: float = 1.0) -> Cost:
    """``U (scale * (Vh x))``, dz and dx; d_scale is a row sum of z * dz."""
    r = min(M, N) if rank is None else rank
    return total(factored_products(M, N, T, rank, fold), itemsize) + Cost(2.0 * T * r, 0.0)


def residual(M: int, N: int, T: int, itemsize: int, rank: int, fold: float = 1.0) -> Cost:
    """The frozen layer and a factored correction of a lower rank."""
    return frozen(M, N, T, itemsize, fold) + factored(M, N, T, itemsize, rank, fold)


def lora(M: int, N: int, T: int, itemsize: int, rank: int, fold: float = 1.0) -> Cost:
    """The frozen layer, A and B, and their gradients."""
    return total(lora_products(M, N, T, rank, fold), itemsize) + Cost(2.0 * T * rank, 0.0)


def recomposed(M: int, N: int, T: int, itemsize: int, micro_batches: int = 1, fold: float = 1.0) -> Cost:
    """``(U * scale) @ Vh`` once per optimiser step, the layer, dx and dW; d_scale by one more product with a factor."""
    build = total(build_products(M, N), itemsize)
    dW = Product(M, T, N, right=fold).cost(itemsize)
    return frozen(M, N, T, itemsize, fold) + dW + build * (1 / micro_batches)


def svdiff_pytorch(M: int, N: int, T: int, itemsize: int, fold: float = 1.0) -> Cost:
    """``U @ diag(scale) @ Vh`` in every forward, and autograd through both products."""
    return total(svdiff_pytorch_products(M, N, T, fold), itemsize)


def prefers_recomposed(M: int, N: int, T: int, micro_batches: int = 1) -> bool:
    """The cost rule: whether rebuilding the weight takes fewer operations than staying factored."""
    return recomposed(M, N, T, 0, micro_batches).flop < factored(M, N, T, 0).flop
