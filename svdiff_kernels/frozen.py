"""Products with frozen weights that keep nothing but the weight for the backward pass.

torch's own linear already behaves so; its conv keeps x even where no weight gradient is wanted. The wide variants give
an fp32 result for half-precision input, which the residual form needs to round its sum once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 2**20
"""Most elements of a half-precision weight that are held in fp32 at a time."""


def linear_wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of half-precision x with an fp32 result; weight and bias are frozen."""
    return _LinearWide.apply(x, weight, bias)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    *,
    wide: bool = False,
) -> Tensor:
    """``F.conv2d`` with a frozen weight and bias; ``wide`` gives an fp32 result."""
    return _Conv2d.apply(x, weight, bias, stride, padding, dilation, wide)


def _tiles(weight: Tensor) -> tuple[Tensor, ...]:
    """The weight in blocks of output rows, never more than a quarter of it at a time."""
    rows = min(_TILE // max(1, weight[0].numel()), -(-weight.shape[0] // 4))
    return weight.split(max(1, rows))


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float32)


class _LinearWide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = _wide(x)
            y = torch.cat([F.linear(x, _wide(tile)) for tile in _tiles(weight)], dim=-1)
            return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return dy.to(ctx.dtype) @ weight.to(ctx.dtype), None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        wide: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.size = x.dtype, x.shape[2:]
        ctx.geometry = stride, padding, dilation
        if not wide:
            return F.conv2d(x, weight, bias, stride, padding, dilation)
        with torch.autocast(x.device.type, enabled=False):
            x = _wide(x)
            tiles = [F.conv2d(x, _wide(tile), None, stride, padding, dilation) for tile in _tiles(weight)]
            y = torch.cat(tiles, dim=1)
            return y if bias is None else y.add_(bias[:, None, None])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        # What the forward's floor division of the size dropped at the far edge.
        extra = [
            n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, m, s, p, d, k in zip(
                ctx.size, dy.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
            )
        ]
        dy = dy.to(ctx.dtype)
        dx = F.conv_transpose2d(dy, weight.to(ctx.dtype), None, stride, padding, extra, 1, dilation)
        return dx, None, None, None, None, None, None
