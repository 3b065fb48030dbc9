"""Two or three spectral linear layers with the same input and the same shapes, in one launch a stage: q, k and v."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops import empty_rows_like
from .expand import expand_backwards
from .product import products
from .tiles import as_images


def linear_group(
    x: Tensor,
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    Vh: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    alpha: Sequence[float],
    scaled: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """See `ops.linear_group`; not in fp64."""
    (S, R), M = scale[0].shape, U[0].shape[0]
    U, scale, Vh = _alike(U), _alike(scale), _alike(Vh)
    y = [empty_rows_like(x, M) for _ in U]
    kept = [empty_rows_like(x, R, Vh[0].dtype) for _ in U]
    if x.numel():
        ki = [as_images(k, S) for k in kept]
        after, before = (scale, None) if scaled else (None, scale)
        products([as_images(x, S)] * len(U), Vh, ki, after, [None] * len(U), Vh[0].dtype, after=True, alphas=alpha)
        products(ki, U, [as_images(t, S) for t in y], before, bias, U[0].dtype, alphas=[1.0] * len(U))
    return y, kept


def linear_group_backward(
    dy: Sequence[Tensor],
    kept: Sequence[Tensor],
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    Vh: Sequence[Tensor],
    alpha: Sequence[float],
    scaled: bool,
    need_dx: bool,
) -> tuple[Tensor, list[Tensor]]:
    """See `ops.linear_group_backward`; not in fp64. dx is rounded once."""
    dy, U, scale, Vh = _alike(dy), _alike(U), _alike(scale), _alike(Vh)
    dz, dscale = expand_backwards(dy, kept, U, scale, need_dx, scaled=scaled)
    if not need_dx:
        return dy[0].new_empty(0), dscale
    dx = empty_rows_like(dy[0], Vh[0].shape[1])
    if dx.numel():
        S = len(scale[0])
        zi, weights = [as_images(d, S) for d in dz], [v.T for v in Vh]
        products(zi, weights, [as_images(dx, S)], None, [None], dx.dtype, alphas=alpha)
    return dx, dscale


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As they are where they are laid out alike, else as dense copies."""
    layouts = {tuple(stride for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1) for t in tensors}
    return list(tensors) if len(layouts) == 1 else [t.contiguous() for t in tensors]
