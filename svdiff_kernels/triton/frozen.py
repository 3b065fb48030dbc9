"""`svdiff::frozen_linear` in Triton, for an input and a weight of different half precision.

A bf16 model keeps its factors in fp16, and no vendor multiplies the two. Where the types are one, the vendor does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import is_half
from .product import product


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None, alpha: float = 1.0
) -> Tensor:
    """See `ops.frozen_linear`, of ``alpha * x``; not in fp64.

    Products are taken in the result's type: z in fp16, like the factors; dx in bf16, since a gradient may be too small
    for fp16. alpha, a power of two, multiplies x before it is rounded to that type, whose range x may exceed.
    """
    dtype = dtype or x.dtype
    y = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=dtype)
    if y.numel():
        rows = x.reshape(1, -1, x.shape[-1])
        compute = dtype if is_half(dtype) else weight.dtype
        product(rows, weight, y.view(1, -1, weight.shape[0]), None, bias, compute, alpha=alpha)
    return y
