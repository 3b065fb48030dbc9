"""Products with frozen weights that keep nothing but the weight for the backward pass.

torch's own linear already behaves so; its conv keeps x even where no weight gradient is wanted. The wide variants give
an fp32 result for half-precision input, which the residual form needs to round its sum once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 2**20
"""Most elements of a half-precision weight that are held in fp32 at a time."""

_FEW_PIXELS = 128
"""Up to here a conv on a CPU runs as one GEMM over unfolded patches.

oneDNN reorders the whole weight in every call, which few pixels do not pay back.
"""


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
    unfold: bool = True,
) -> Tensor:
    """``F.conv2d`` with a frozen weight and bias.

    ``wide`` gives an fp32 result; ``unfold`` allows a GEMM over unfolded patches, which sums in another order.
    """
    return _Conv2d.apply(x, weight, bias, stride, padding, dilation, wide, unfold)


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


def _is_few(t: Tensor, size: Sequence[int]) -> bool:
    """Whether a conv of t's kind with output images of this size is quicker unfolded."""
    full = t.dtype in (torch.float32, torch.float64)
    return full and t.device.type == "cpu" and 0 < t.shape[0] * size[0] * size[1] <= _FEW_PIXELS


def _unfolded_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: list[int],
) -> Tensor:
    """The convolution as ``weight @ patches``, all images at once: the weight is read a single time."""
    patches = F.unfold(x, weight.shape[2:], dilation, padding, stride)  # [B, C_in * kh * kw, P]
    y = weight.flatten(1) @ patches.transpose(0, 1).flatten(1)  # [C_out, B * P]
    if bias is not None:
        y.add_(bias[:, None])
    y = y.view(-1, x.shape[0], *size).transpose(0, 1)
    return y.contiguous(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


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
        unfold: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.size = x.dtype, x.shape[2:]
        ctx.geometry = stride, padding, dilation
        if not wide:
            size = [
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
            ]
            if unfold and _is_few(x, size):
                return _unfolded_conv2d(x, weight, bias, stride, padding, dilation, size)
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
        dy, weight = dy.to(ctx.dtype), weight.to(ctx.dtype)
        if _is_few(dy, dy.shape[2:]):
            rows = dy.flatten(2).transpose(1, 2).reshape(-1, dy.shape[1])  # [B * P, C_out]
            patches = (rows @ weight.flatten(1)).view(dy.shape[0], -1, weight[0].numel()).transpose(1, 2)
            dx = F.fold(patches, ctx.size, weight.shape[2:], dilation, padding, stride)
            return dx, *(None,) * 7
        # What the forward's floor division of the size dropped at the far edge.
        extra = [
            n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, m, s, p, d, k in zip(
                ctx.size, dy.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
            )
        ]
        dx = F.conv_transpose2d(dy, weight, None, stride, padding, extra, 1, dilation)
        return dx, *(None,) * 7
