"""The ops by the extension's CUDA kernels, ``torch.ops.svdiff_cuda`` (csrc/cuda), and which calls they can serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fastest import tensors_of
from .ops import columns_dense
from .reference import unscaled


def can_serve(op: str, arguments: Sequence[Any]) -> bool:
    """Whether there are kernels for this call: one type for rows and factors, no fp64."""
    kernels = torch.ops.svdiff_cuda
    if op == "expand":
        z, U, _, _, dtype = arguments
        return bool(kernels.serves_expand(z, U, dtype))
    if op == "expand_backward":
        dy, z, U, *_ = arguments
        return bool(kernels.serves_expand_backward(dy, z, U))
    if op == "linear":
        x, U, *_ = arguments
        return bool(kernels.serves_expand(x, U, None)) and not columns_dense(x)
    if op == "linear_backward":
        dy, kept, U, *_ = arguments
        return bool(kernels.serves_expand_backward(dy, kept, U)) and not columns_dense(dy)
    return all(t.dtype in (torch.float32, torch.bool) for t in tensors_of(arguments))  # the bank


def expand(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """See `ops.expand`."""
    y: Tensor = torch.ops.svdiff_cuda.expand.default(z, U, scale, bias, dtype)
    return y


def expand_backward(dy: Tensor, z: Tensor | None, U: Tensor, scale: Tensor, need_dz: bool) -> tuple[Tensor, Tensor]:
    """See `ops.expand_backward`."""
    dz, dscale = torch.ops.svdiff_cuda.expand_backward.default(dy, z, U, scale, need_dz)
    return dz, dscale


def linear(
    x: Tensor, U: Tensor, scale: Tensor, Vh: Tensor, bias: Tensor | None, alpha: float, scaled: bool
) -> tuple[Tensor, Tensor]:
    """See `ops.linear`: scaled by the projection's epilogue, and then a vendor's product, or the other way round."""
    if scaled:
        kept: Tensor = torch.ops.svdiff_cuda.project.default(x, Vh, scale, None, alpha)
        return F.linear(kept, U, bias), kept
    z = F.linear(x if alpha == 1 else x * alpha, Vh)
    return expand(z, U, scale, bias, None), z


def linear_backward(
    dy: Tensor, kept: Tensor | None, U: Tensor, scale: Tensor, Vh: Tensor, alpha: float, scaled: bool, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """See `ops.linear_backward`."""
    dz, dscale = expand_backward(dy, kept, U, scale, need_dx)
    if scaled and kept is not None:
        dscale = unscaled(dscale, scale)
    if not need_dx:
        return dz, dscale
    dx = F.linear(dz, Vh.T)
    return dx if alpha == 1 else dx.mul_(alpha), dscale


def gains(base: Tensor, floor: Tensor, mix: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `ops.gains`."""
    gain, held = torch.ops.svdiff_cuda.gains.default(base, floor, mix, deltas)
    return gain, held


def gains_backward(dgain: Tensor, held: Tensor, mix: Tensor, adapters: Sequence[int]) -> Tensor:
    """See `ops.gains_backward`."""
    grads: Tensor = torch.ops.svdiff_cuda.gains_backward.default(dgain, held, mix, adapters)
    return grads
