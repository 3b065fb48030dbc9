"""The recomposed form: the shifted weight is rebuilt in every call, the naive way. A grouped convolution has no other.

Gains are those of `functional.spectral_gain`, ``[r]``, or ``[S, r]`` for S samples, whose weights differ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IntPair = int | tuple[int, ...]


def recomposed_weight(
    U: Tensor,
    gain: Tensor,
    Vh: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``alpha U diag(gain) Vh`` (plus weight), built in fp32, with one rounding to dtype, U's if not given.

    It is shaped as the weight is.
    """
    W = (U * (gain * alpha)) @ Vh.flatten(1).to(gain.dtype)
    W = W.view(U.shape[0], *Vh.shape[1:])
    return (W if weight is None else weight + W).to(dtype or U.dtype)


def recomposed_linear(
    x: Tensor,
    U: Tensor,
    gain: Tensor,
    Vh: Tensor,
    bias: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """`scaled.scaled_linear` the naive way: the weight is rebuilt, and autograd keeps x."""
    how: Any = {"alpha": alpha, "dtype": x.dtype}
    parts = _by_sample(x, gain)
    return torch.cat([F.linear(part, recomposed_weight(U, g, Vh, weight, **how), bias) for part, g in parts])


def recomposed_conv2d(
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
    """`scaled.scaled_conv2d` the naive way; the only one for a grouped conv."""
    how: Any = {"alpha": alpha, "dtype": x.dtype}
    outputs = [
        F.conv2d(part, recomposed_weight(U, g, Vh, weight, **how), bias, stride, padding, dilation, groups)
        for part, g in _by_sample(x, gain)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def recomposed_embedding(
    ids: Tensor,
    U: Tensor,
    gain: Tensor,
    Vh: Tensor,
    *,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`scaled.scaled_embedding` the naive way."""
    parts = _by_sample(ids, gain)
    return torch.cat([F.embedding(part, recomposed_weight(U, g, Vh, dtype=dtype), padding_idx) for part, g in parts])


def _by_sample(x: Tensor, gain: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each sample's part of x, with its gain ``[r]``."""
    return [(x, gain)] if gain.dim() == 1 else list(zip(x.chunk(len(gain)), gain, strict=True))
