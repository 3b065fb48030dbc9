"""The op behind every spectral layer: its schema, shapes and gradient. No arithmetic lives here.

Implementations register themselves with torch's dispatcher: `reference.py` for every device, ``csrc/cpu`` over it for
CPUs. `backends.py` says which one serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = torch.library.Library("svdiff", "DEF")
library.define("expand(Tensor z, Tensor U, Tensor scale, Tensor? bias) -> Tensor", tags=_TAGS)
library.define(
    "expand_backward(Tensor dy, Tensor? z, Tensor U, Tensor scale, bool need_dz) -> (Tensor, Tensor)", tags=_TAGS
)


def expand(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = (z * scale[sample]) @ U.T + bias``: scale projected rows, and expand them to the output's width.

    The middle of SVDiff's ``y = U (scale * (Vh x)) + b`` (Han et al. 2023, eq. 2) once ``z = Vh x`` is there. With
    ``b = dy @ U`` its gradient is ``dz = scale * b`` and ``dscale = sum over a sample's rows of z * b``; U is frozen.

    Args:
        z: ``[*, r]``, T rows in all. Of a conv in NCHW it is ``[B, P, r]`` with the pixels dense (stride 1): then y is
            laid out like that too, and nothing is copied. The gradient is laid out as dy is.
        U: ``[M, r]``, frozen, in z's dtype, any strides.
        scale: ``[S, r]``, fp32 (fp64 with z in fp64), one row for each of S samples. They split z's first dimension
            evenly, in order; with S = 1 all rows share one scale.
        bias: ``[M]`` in z's dtype, or None.

    Returns:
        ``[*, M]`` in z's dtype. All sums accumulate in fp32 or wider.
    """
    return torch.ops.svdiff.expand.default(z, U, scale, bias)


def columns_dense(z: Tensor) -> bool:
    """Is z ``[B, P, r]`` with neighbouring rows, not columns, next to one another (NCHW)?"""
    return z.dim() == 3 and z.stride(1) == 1 and z.stride(2) != 1


def empty_rows_like(z: Tensor, columns: int) -> Tensor:
    """An uninitialised ``[*, columns]`` laid out as z is: rows dense, or columns dense."""
    if columns_dense(z):
        return z.new_empty(z.shape[0], columns, z.shape[1]).transpose(1, 2)
    return z.new_empty(*z.shape[:-1], columns)


@torch.library.register_fake("svdiff::expand", lib=library)
def _expand_fake(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return empty_rows_like(z, U.shape[0])


@torch.library.register_fake("svdiff::expand_backward", lib=library)
def _expand_backward_fake(
    dy: Tensor, z: Tensor | None, U: Tensor, scale: Tensor, need_dz: bool
) -> tuple[Tensor, Tensor]:
    dz = empty_rows_like(dy, U.shape[1]) if need_dz else dy.new_empty(0)
    return dz, scale.new_empty(scale.shape if z is not None else 0)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    z, U, scale, _ = inputs
    if ctx.needs_input_grad[1]:
        raise ValueError("svdiff::expand: U requires grad, but the factors of a spectral layer are frozen")
    # z is wanted for dscale alone, and it is the only tensor of activation size that is kept.
    ctx.save_for_backward(U, scale, *([z] if ctx.needs_input_grad[2] else []))


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    need_dz, _, need_dscale, need_dbias = ctx.needs_input_grad
    U, scale, *kept = ctx.saved_tensors
    dz, dscale, dbias = None, None, None
    if need_dz or need_dscale:
        z = kept[0] if kept else None
        dz, dscale = torch.ops.svdiff.expand_backward.default(dy, z, U, scale, need_dz)
    if need_dbias:
        dbias = dy.flatten(0, -2).sum(0)
    return dz if need_dz else None, None, dscale if need_dscale else None, dbias


torch.library.register_autograd("svdiff::expand", _backward, setup_context=_setup_context, lib=library)
