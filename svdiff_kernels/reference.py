"""`ops.expand` in plain torch, for any device and dtype: the truth for tests, and the fallback everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import columns_dense, library


def _by_sample(z: Tensor, S: int) -> Tensor:
    """``[*, r]`` seen as ``[S, *, r]``: a view, since the samples split the first dimension."""
    return z.unflatten(0, (S, z.shape[0] // S))


def _scaled(z: Tensor, scale: Tensor) -> Tensor:
    """z times its sample's scale, rounded once to z's dtype and laid out as z is."""
    S, r = scale.shape
    if S == 1:
        return (z * scale[0]).to(z.dtype)
    return (_by_sample(z, S) * scale.view(S, *(1,) * (z.dim() - 1), r)).flatten(0, 1).to(z.dtype)


def _product(z: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """``z @ W + bias``, laid out as z is."""
    if not columns_dense(z):
        return F.linear(z, W.T, bias)
    y = torch.bmm(W.T.expand(z.shape[0], -1, -1), z.transpose(1, 2))  # [B, columns, P]
    return (y if bias is None else y.add_(bias[:, None])).transpose(1, 2)


def expand(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `ops.expand`."""
    return _product(_scaled(z, scale), U.T, bias)


def expand_backward(dy: Tensor, z: Tensor | None, U: Tensor, scale: Tensor, need_dz: bool) -> tuple[Tensor, Tensor]:
    """Gradients of `expand`: ``(dz, dscale)``, each empty where it is not wanted; dscale is wanted if z is given."""
    S, r = scale.shape
    b = _product(dy, U)
    dscale = scale.new_empty(0)
    if z is not None:
        products = z.to(scale.dtype) * b
        dscale = (products if S == 1 else _by_sample(products, S)).reshape(S, z.shape[:-1].numel() // S, r).sum(1)
    return _scaled(b, scale) if need_dz else dy.new_empty(0), dscale


library.impl("expand", expand, "CompositeExplicitAutograd")
library.impl("expand_backward", expand_backward, "CompositeExplicitAutograd")
