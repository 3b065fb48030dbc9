"""The ops of `ops.py` in plain torch, for any device and dtype: the truth for tests, and the fallback everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from . import ops
from .ops import columns_dense, is_half, library, memory_format_of

_TILE = 2**20
"""Most elements of a half-precision weight that are held in fp32 at a time."""


def _by_sample(z: Tensor, S: int) -> Tensor:
    """``[*, r]`` seen as ``[S, *, r]``: a view, since the samples split the first dimension."""
    return z.unflatten(0, (S, z.shape[0] // S))


def _scaled(z: Tensor, scale: Tensor) -> Tensor:
    """z times its sample's scale, rounded once to z's dtype and laid out as z is."""
    S, r = scale.shape
    if S == 1:
        return (z * scale[0]).to(z.dtype)
    return (_by_sample(z, S) * scale.view(S, *(1,) * (z.dim() - 1), r)).flatten(0, 1).to(z.dtype)


def _product(z: Tensor, W: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``z @ W + bias`` in dtype (z's if None), laid out as z is."""
    dtype = dtype or z.dtype
    if not z.dtype == W.dtype == dtype:  # not a vendor's product: in fp32, with one rounding
        return _product(z.float(), W.float(), None if bias is None else bias.float()).to(dtype)
    if not columns_dense(z):
        return F.linear(z, W.T, bias)
    y = torch.bmm(W.T.expand(z.shape[0], -1, -1), z.transpose(1, 2))  # [B, columns, P]
    return (y if bias is None else y.add_(bias[:, None])).transpose(1, 2)


def expand(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """See `ops.expand`."""
    return _product(_scaled(z, scale), U.T, bias, dtype)


def expand_backward(dy: Tensor, z: Tensor | None, U: Tensor, scale: Tensor, need_dz: bool) -> tuple[Tensor, Tensor]:
    """Gradients of `expand`: ``(dz, dscale)``, each empty where it is not wanted; dscale is wanted if z is given."""
    S, r = scale.shape
    b = _product(dy, U)
    dscale = scale.new_empty(0)
    if z is not None:
        products = z.to(scale.dtype) * b
        dscale = (products if S == 1 else _by_sample(products, S)).reshape(S, z.shape[:-1].numel() // S, r).sum(1)
    return _scaled(b, scale) if need_dz else dy.new_empty(0), dscale


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None, alpha: float = 1.0
) -> Tensor:
    """See `ops.frozen_linear`."""
    dtype = dtype or x.dtype
    x = x if alpha == 1 else x * alpha
    if x.dtype == weight.dtype == dtype:
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.cat([F.linear(x.float(), tile.float()) for tile in _tiles(weight)], dim=-1)
        return (y if bias is None else y.add_(bias)).to(dtype)


def frozen_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype | None = None,
    exact: bool = False,
) -> Tensor:
    """See `ops.frozen_conv2d`."""
    dtype, geometry = dtype or x.dtype, (stride, padding, dilation)
    if x.dtype == weight.dtype == dtype:
        y = F.conv2d(x, weight, bias, *geometry)
    elif x.is_cuda and is_half(x.dtype) and is_half(weight.dtype) and dtype == torch.float32:
        y = _conv2d_by_fp16(x, weight, geometry)
        y = y if bias is None else y.add_(bias[:, None, None])
    else:
        with torch.autocast(x.device.type, enabled=False):
            y = torch.cat([F.conv2d(x.float(), tile.float(), None, *geometry) for tile in _tiles(weight)], dim=1)
            y = (y if bias is None else y.add_(bias[:, None, None])).to(dtype)
    y = y.contiguous(memory_format=memory_format_of(x))
    return y if y.numel() else y.clone()  # torch's is a view of nothing, to which nothing can be added in place


def frozen_conv2d_backward(
    dy: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of `frozen_conv2d`, ``[B, C_in, *size]`` in dy's dtype."""
    shape = (dy.shape[0], weight.shape[1], *size)
    dx = conv2d_input(shape, weight.to(dy.dtype), dy, tuple(stride), tuple(padding), tuple(dilation))
    return dx.contiguous(memory_format=memory_format_of(dy))


def linear(
    x: Tensor, U: Tensor, scale: Tensor, Vh: Tensor, bias: Tensor | None, alpha: float = 1.0, scaled: bool = False
) -> tuple[Tensor, Tensor]:
    """See `ops.linear`: the ops of which it is made, whoever serves them."""
    z = ops.frozen_linear(x, Vh, dtype=Vh.dtype, alpha=alpha)
    return ops.expand(z, U, scale, bias, dtype=x.dtype), _scaled(z, scale) if scaled else z


def linear_backward(
    dy: Tensor, kept: Tensor | None, U: Tensor, scale: Tensor, Vh: Tensor, alpha: float, scaled: bool, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """See `ops.linear_backward`."""
    dz, dscale = ops.expand_backward(dy, kept, U, scale, need_dx)
    if scaled and kept is not None:
        dscale = unscaled(dscale, scale)
    return ops.frozen_linear(dz, Vh.T, alpha=alpha) if need_dx else dz, dscale


def unscaled(sums: Tensor, scale: Tensor) -> Tensor:
    """dscale ``[S, r]`` from the column sums of a scaled z; zero where the scale is not positive: see `ops.linear`."""
    return torch.where(scale > 0, sums / scale, 0)


def linear_group(
    x: Tensor,
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    Vh: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    alpha: Sequence[float],
    scaled: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """See `ops.linear_group`: one layer after another."""
    layers = zip(U, scale, Vh, bias, alpha, strict=True)
    pairs = [ops.linear(x, u, s, v, b, alpha=a, scaled=scaled) for u, s, v, b, a in layers]
    return [y for y, _ in pairs], [kept for _, kept in pairs]


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
    """See `ops.linear_group_backward`."""
    layers = zip(dy, kept, U, scale, Vh, alpha, strict=True)
    pairs = [ops.linear_backward(*parts, alpha=a, scaled=scaled, need_dx=need_dx) for *parts, a in layers]
    dx = pairs[0][0]
    for part, _ in pairs[1:]:
        dx = dx + part
    return dx, [dscale for _, dscale in pairs]


def gains(base: Tensor, floor: Tensor, mix: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `ops.gains`."""
    gain = base
    for a, (matrices, one_dim) in enumerate(zip(deltas[::2], deltas[1::2], strict=True)):
        gain = torch.addcmul(gain, mix[..., a, None], torch.cat([matrices, one_dim]))
    held = gain <= floor
    return torch.where(held, floor, gain), held


def gains_backward(dgain: Tensor, held: Tensor, mix: Tensor, adapters: Sequence[int]) -> Tensor:
    """See `ops.gains_backward`."""
    dgain = dgain.masked_fill(held, 0).view(-1, dgain.shape[-1])
    weights = mix.view(-1, mix.shape[-1])
    grads = [(dgain * weights[:, a, None]).sum(0) for a in adapters]
    return torch.stack(grads) if grads else dgain.new_empty(0, dgain.shape[-1])


def narrowed(x: Tensor, dtype: torch.dtype, alpha: float) -> Tensor:
    """``alpha * x`` in dtype, in one pass, for a vendor's convolution, which does not mix types."""
    return torch.mul(x, alpha, out=torch.empty_like(x, dtype=dtype))


def _conv2d_by_fp16(x: Tensor, weight: Tensor, geometry: Sequence[Sequence[int]]) -> Tensor:
    """A convolution of half precisions with a result in fp32, for GPUs.

    In fp16 it is rounded eight times finer than in bf16, and a power of two keeps larger x in range.
    """
    alpha = 1.0 if x.dtype == torch.float16 else 2.0**-6
    stride, padding, dilation = geometry
    y = F.conv2d(narrowed(x, torch.float16, alpha), weight.half(), None, stride, padding, dilation)
    return y.float().div_(alpha)


def eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.eigh`. On GPUs this is cuSOLVER, batched by torch as suits the size."""
    values, vectors = torch.linalg.eigh(G)
    return values, vectors.contiguous()


def _tiles(weight: Tensor) -> tuple[Tensor, ...]:
    """The weight in blocks of output rows, never more than a quarter of it at a time."""
    rows = min(_TILE // max(1, weight[0].numel()), -(-weight.shape[0] // 4))
    return weight.split(max(1, rows))


for _op in (
    expand,
    expand_backward,
    frozen_linear,
    frozen_conv2d,
    frozen_conv2d_backward,
    linear,
    linear_backward,
    linear_group,
    linear_group_backward,
    gains,
    gains_backward,
    eigh,
):
    library.impl(_op.__name__, _op, "CompositeExplicitAutograd")
