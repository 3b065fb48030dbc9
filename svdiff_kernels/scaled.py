"""Spectral layers as functions of their gains: ``scaled_*`` is what `functional`'s ``spectral_*`` comes to.

Frozen projections round the one op, `ops.expand`. Modules call them, since a bank computes the gains of a whole model
at once: what the ReLU makes of sigma and delta, see `functional.spectral_gain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .backends import factor_dtype
from .ops import (
    expand,
    expand_backward,
    frozen_conv2d,
    frozen_conv2d_backward,
    frozen_linear,
    is_half,
    linear,
    linear_backward,
    linear_group,
    linear_group_backward,
)
from .recomposed import IntPair, recomposed_conv2d
from .reference import narrowed


def scaled_linear(
    x: Tensor,
    U: Tensor,
    gain: Tensor,
    Vh: Tensor,
    bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """`spectral_linear` with its `spectral_gain` given, with U multiplied by ``1 / alpha``: see `nn.range_shift`."""
    x, U, Vh, bias = _autocast(x, U, Vh, bias)
    fused = backends.fuses(x.device.type)
    if weight is None and not fused and _in_one_call(alpha, bias):
        return torch.ops.svdiff.scaled_linear.default(x, U, gain, Vh, bias)
    half = is_half(x.dtype)
    inner = bias if weight is None else None
    if fused or Vh.dtype != x.dtype:
        y = _Layer.apply(x, U, gain, Vh, inner, alpha, None, fused and weight is None)
    else:
        z = frozen_linear(x, Vh) if half else F.linear(x, Vh)  # torch's own keeps no x either, but sums slowly in half
        y = expand(z, U, _rows(gain), inner)
    if weight is None:
        return y
    if half:
        return (frozen_linear(x, weight, bias, dtype=torch.float32) + y).to(x.dtype)
    return F.linear(x, weight, bias).add_(y)


def scaled_conv2d(
    x: Tensor,
    U: Tensor,
    gain: Tensor,
    Vh: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    weight: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """`spectral_conv2d` with its `spectral_gain` given; alpha as in `scaled_linear`."""
    if x.dim() == 3:
        rest = (bias, stride, padding, dilation, groups)
        return scaled_conv2d(x[None], U, gain, Vh, *rest, weight=weight, alpha=alpha)[0]
    if groups > 1:
        return recomposed_conv2d(x, U, gain, Vh, bias, stride, padding, dilation, groups, weight=weight, alpha=alpha)
    x, U, Vh, bias = _autocast(x, U, Vh, bias)
    stride, dilation = _pair(stride), _pair(dilation)
    x, padding = _resolve_padding(x, padding, dilation, Vh)
    fused = backends.fuses(x.device.type)
    if weight is None and not fused and _in_one_call(alpha, bias):
        return torch.ops.svdiff.scaled_conv2d.default(x, U, gain, Vh, bias, stride, padding, dilation)
    inner = bias if weight is None else None
    if fused or Vh.dtype != x.dtype:
        y = _Layer.apply(x, U, gain, Vh, inner, alpha, (stride, padding, dilation), False)
    else:
        z = frozen_conv2d(x, Vh, None, stride, padding, dilation)
        y = _as_image(expand(_as_rows_of_pixels(z), U, _rows(gain), inner), z.shape[2:])
    if weight is None:
        return y
    if is_half(x.dtype):
        return (frozen_conv2d(x, weight, bias, stride, padding, dilation, dtype=torch.float32) + y).to(x.dtype)
    return frozen_conv2d(x, weight, bias, stride, padding, dilation, exact=True).add_(y)


def scaled_linears(
    x: Tensor,
    U: Sequence[Tensor],
    gain: Sequence[Tensor],
    Vh: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    *,
    alpha: Sequence[float],
) -> list[Tensor]:
    """`scaled_linear` of several layers with one input, in the factored form: in one launch a stage where a GPU serves.

    Without one, or where shapes or types differ, each is called by itself.
    """
    if not backends.fuses(x.device.type) or len({(u.shape, v.shape, u.dtype) for u, v in zip(U, Vh, strict=True)}) > 1:
        layers = zip(U, gain, Vh, bias, alpha, strict=True)
        return [scaled_linear(x, u, g, v, b, alpha=a) for u, g, v, b, a in layers]
    parts = [_autocast(x, u, v, b) for u, v, b in zip(U, Vh, bias, strict=True)]
    x, (U, Vh, bias) = parts[0][0], zip(*(part[1:] for part in parts), strict=True)
    return list(_Group.apply(x, tuple(alpha), *U, *gain, *Vh, *bias))


class _Group(torch.autograd.Function):
    """`scaled_linears` in one node of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(alpha)
        U, gain, Vh, bias = (tensors[i * count : (i + 1) * count] for i in range(4))
        if any(ctx.needs_input_grad[i] for i in (*range(2, 2 + count), *range(2 + 2 * count, 2 + 4 * count))):
            raise ValueError("svdiff: U, Vh or a bias requires grad, but a group of layers has them frozen")
        y, kept = linear_group(x, U, [_rows(g) for g in gain], Vh, bias, alpha=alpha, scaled=True)
        ctx.alpha = alpha
        ctx.save_for_backward(*U, *gain, *Vh, *kept)
        return tuple(y)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.alpha)
        U, gain, Vh, kept = (ctx.saved_tensors[i * count : (i + 1) * count] for i in range(4))
        need_dx = ctx.needs_input_grad[0]
        how: Any = {"alpha": ctx.alpha, "scaled": True, "need_dx": need_dx}
        dx, dgain = linear_group_backward(dy, kept, U, [_rows(g) for g in gain], Vh, **how)
        dgains = (d.view_as(g) for d, g in zip(dgain, gain, strict=True))
        return dx if need_dx else None, None, *(None,) * count, *dgains, *(None,) * (2 * count)


class _Layer(torch.autograd.Function):
    """`scaled_linear`, or with a geometry `scaled_conv2d`, in one node of the graph.

    For x in bf16 and factors in fp16 it must be one: between two, autograd would hand dz on in z's type, and a gradient
    may be too small for fp16. And a backend that fuses keeps ``gain * z`` instead of z if `scaled`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        U: Tensor,
        gain: Tensor,
        Vh: Tensor,
        bias: Tensor | None,
        alpha: float,
        geometry: tuple[tuple[int, int], ...] | None,
        scaled: bool,
    ) -> Tensor:
        _, need_U, need_dgain, need_Vh, *_ = ctx.needs_input_grad
        if need_U or need_Vh:
            raise ValueError("svdiff: U or Vh requires grad, but the factors of a spectral layer are frozen")
        ctx.alpha, ctx.geometry, ctx.scaled, ctx.size = alpha, geometry, scaled, x.shape[2:]
        if geometry is None:
            y, kept = linear(x, U, _rows(gain), Vh, bias, alpha=alpha, scaled=scaled)
        else:
            image = frozen_conv2d(_for_conv(x, Vh.dtype, alpha), Vh, None, *geometry, dtype=Vh.dtype)
            kept = _as_rows_of_pixels(image)
            y = _as_image(expand(kept, U, _rows(gain), bias, dtype=x.dtype), image.shape[2:])
        ctx.save_for_backward(U, gain, Vh, kept if need_dgain else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        U, gain, Vh, kept = ctx.saved_tensors
        need_dx, *_, need_dbias = ctx.needs_input_grad[:5]
        scale, alpha = _rows(gain), ctx.alpha
        if ctx.geometry is None:
            rows = dy
            dx, dgain = linear_backward(dy, kept, U, scale, Vh, alpha=alpha, scaled=ctx.scaled, need_dx=need_dx)
        else:
            rows = _as_rows_of_pixels(dy)
            dx, dgain = expand_backward(rows, kept, U, scale if alpha == 1 else scale * alpha, need_dx)
            if need_dx:
                dx = frozen_conv2d_backward(_as_image(dx, dy.shape[2:]), Vh, ctx.size, *ctx.geometry)
        dbias = rows.flatten(0, -2).sum(0) if need_dbias else None
        return (
            (dx if need_dx else None),
            None,
            (dgain.view_as(gain) if kept is not None else None),
            None,
            dbias,
            *(None,) * 3,
        )


def _for_conv(x: Tensor, dtype: torch.dtype, alpha: float) -> Tensor:
    """``alpha * x``, on a GPU in dtype."""
    if x.is_cuda and x.dtype != dtype:
        return narrowed(x, dtype, alpha)
    return x if alpha == 1 else x * alpha


def scaled_embedding(
    ids: Tensor,
    U: Tensor,
    gain: Tensor,
    Vh: Tensor,
    *,
    padding_idx: int | None = None,
    weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`spectral_embedding` with its `spectral_gain` given; dtype is the result's, U's if not given."""
    with torch.autocast(U.device.type, enabled=False):  # which leaves a plain embedding alone too
        y = expand(F.embedding(ids, U), Vh.T, _rows(gain), dtype=dtype)
    if padding_idx is not None:
        y = torch.where((ids == padding_idx)[..., None], y.detach(), y)
    if weight is None:
        return y
    base = F.embedding(ids, weight)
    return base + y if not is_half(y.dtype) else (base.float() + y).to(y.dtype)


def _in_one_call(alpha: float, bias: Tensor | None) -> bool:
    """Whether ``csrc/layers.cpp`` may stand in for a composition: the same products, in one node of the graph.

    A compiler had better see the parts.
    """
    if backends.extension is None or alpha != 1 or torch.compiler.is_compiling():
        return False
    return bias is None or not bias.requires_grad


def _as_rows_of_pixels(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` as ``[B, H * W, C]``: a view in either memory format, which `expand` keeps."""
    return image.flatten(2).transpose(1, 2)


def _as_image(rows: Tensor, size: torch.Size) -> Tensor:
    return rows.transpose(1, 2).unflatten(2, size)


def _rows(gain: Tensor) -> Tensor:
    return gain if gain.dim() == 2 else gain[None]


def _autocast(x: Tensor, U: Tensor, Vh: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What autocast would do to a plain layer's arguments. The gain is not among them: it stays fp32."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, U, Vh, bias
    dtype = torch.get_autocast_dtype(kind)
    kept = factor_dtype(dtype, x.device)
    return x.to(dtype), U.to(kept), Vh.to(kept), None if bias is None else bias.to(dtype)


def _pair(value: IntPair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _resolve_padding(
    x: Tensor, padding: IntPair | str, dilation: tuple[int, int], kernel: Tensor
) -> tuple[Tensor, tuple[int, int]]:
    """Padding as two numbers; x is padded here where "same" means more on the far side."""
    if not isinstance(padding, str):
        return x, _pair(padding)
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f"padding must be a number, a pair, 'same' or 'valid', not {padding!r}")
    h, w = (d * (k - 1) for d, k in zip(dilation, kernel.shape[2:], strict=True))
    if h % 2 or w % 2:
        x = F.pad(x, (0, w % 2, 0, h % 2))
    return x, (h // 2, w // 2)
