"""`svdiff::expand` and its backward in Triton. Tiles and images are those of `product.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import empty_rows_like
from .product import product
from .tiles import LEAST_ROWS, as_images, autotuned, bucket, of_member, precision, rounded, tile_of, types_of

SUM_BLOCK = (32, 64)
"""Tiles and columns that a program of `_sum_tiles_kernel` adds up at a time."""


@autotuned("P_bucket", "M", "R", "stride_dp", "TYPES", sizes=("BLOCK_P", "BLOCK_R", "BLOCK_M"), operand="U_ptrs")
@triton.jit(do_not_specialize=["P_bucket"])
def _expand_bwd_kernel(
    dy_ptrs,
    z_ptrs,
    U_ptrs,
    scale_ptrs,
    dz_ptrs,
    partial_ptrs,
    P,
    P_bucket,
    M,
    R,
    images,
    stride_db,
    stride_dp,
    stride_dm,
    stride_zb,
    stride_zp,
    stride_zr,
    stride_um,
    stride_ur,
    stride_ss,
    stride_gb,
    stride_gp,
    stride_gr,
    NEED_DZ: tl.constexpr,
    NEED_DSCALE: tl.constexpr,
    TYPES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """b = dy @ U of one tile of one layer; from it dz, and the column sums of z * b over the tile's rows."""
    member = tl.program_id(1)
    image, p_tile, r_tile = tile_of(tl.program_id(0), P, R, BLOCK_P, BLOCK_R, GROUP)
    o_p = (p_tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    o_r = (r_tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    m_p, m_r = o_p < P, o_r < R
    p_dy = of_member(dy_ptrs, member) + image * stride_db + o_p[:, None] * stride_dp + o_m[None, :] * stride_dm
    p_U = of_member(U_ptrs, member) + o_m[:, None] * stride_um + o_r[None, :] * stride_ur

    b_b = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    for m in range(0, M, BLOCK_M):
        m_m = o_m < M - m
        b_dy = tl.load(p_dy, mask=m_p[:, None] & m_m[None, :], other=0.0)  # [BLOCK_P, BLOCK_M]
        b_U = tl.load(p_U, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        # Gradients may be too small for fp16: where U is in fp16 and dy in bf16, U is converted. wgmma wants it back in
        # shared memory for that. The transposed product would take it from registers; but ptxas makes its wgmma wait
        # for one another, and Blackwell reads U in single words, so that it is not used.
        b_b = tl.dot(b_dy, rounded(b_U, b_dy.dtype), b_b, input_precision=PRECISION)
        p_dy += BLOCK_M * stride_dm
        p_U += BLOCK_M * stride_um
    m_pr = m_p[:, None] & m_r[None, :]
    if NEED_DSCALE:
        p_z = of_member(z_ptrs, member) + image * stride_zb + o_p[:, None] * stride_zp + o_r[None, :] * stride_zr
        b_z = tl.load(p_z, mask=m_pr, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_R]
        row = image * tl.cdiv(P, BLOCK_P) + p_tile
        tl.store(of_member(partial_ptrs, member) + row * R + o_r, tl.sum(b_z * b_b, axis=0), mask=m_r)
    if NEED_DZ:
        p_scale = of_member(scale_ptrs, member) + image // images * stride_ss
        b_scale = tl.load(p_scale + o_r, mask=m_r, other=0.0)
        p_dz = of_member(dz_ptrs, member) + image * stride_gb + o_p[:, None] * stride_gp + o_r[None, :] * stride_gr
        tl.store(p_dz, (b_b * b_scale[None, :]).to(p_dz.dtype.element_ty), mask=m_pr)


@triton.jit
def _sum_tiles_kernel(
    partial_ptrs,
    scale_ptrs,
    dscale_ptr,
    S,
    tiles,
    R,
    stride_ss,
    UNSCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dscale ``[layers, S, R]``: partial ``[S, tiles, R]`` of each layer summed over its tiles, in a fixed order."""
    member, sample = tl.program_id(2), tl.program_id(1).to(tl.int64)
    o_r, o_t = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_T)
    m_r = o_r < R
    p_partial = of_member(partial_ptrs, member) + (sample * tiles + o_t[:, None]) * R + o_r[None, :]
    b_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for t in range(0, tiles, BLOCK_T):
        b_sum += tl.sum(tl.load(p_partial, mask=(o_t < tiles - t)[:, None] & m_r[None, :], other=0.0), axis=0)
        p_partial += BLOCK_T * R
    if UNSCALE:
        b_scale = tl.load(of_member(scale_ptrs, member) + sample * stride_ss + o_r, mask=m_r, other=0.0)
        b_sum = tl.where(b_scale > 0, b_sum / tl.where(b_scale > 0, b_scale, 1.0), 0.0)
    tl.store(dscale_ptr + (member * S + sample) * R + o_r, b_sum, mask=m_r)


def expand(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """See `ops.expand`; not in fp64."""
    y = empty_rows_like(z, U.shape[0], dtype)
    if y.numel():
        S = scale.shape[0]
        product(as_images(z, S), U, as_images(y, S), scale, bias, U.dtype)
    return y


def expand_backward(dy: Tensor, z: Tensor | None, U: Tensor, scale: Tensor, need_dz: bool) -> tuple[Tensor, Tensor]:
    """Gradients of `expand`, see `reference.expand_backward`; the same bits every time with the same tile."""
    dz, dscale = expand_backwards([dy], None if z is None else [z], [U], [scale], need_dz)
    return dz[0], dscale[0]


def expand_backwards(
    dy: Sequence[Tensor],
    z: Sequence[Tensor] | None,
    U: Sequence[Tensor],
    scale: Sequence[Tensor],
    need_dz: bool,
    *,
    scaled: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """`expand_backward` of every layer of a group, whose shapes, strides and types agree: ``(dz, dscale)`` of each.

    With `scaled` what came as z is ``scale * z``: see `ops.linear`.
    """
    S, R = scale[0].shape
    M = U[0].shape[0]
    dz = [empty_rows_like(d, R) if need_dz else d.new_empty(0) for d in dy]
    if dy[0].numel() == 0:
        return dz, [s.new_zeros(s.shape if z is not None else 0) for s in scale]
    di = [as_images(d, S) for d in dy]
    B, P, _ = di[0].shape
    zi = di if z is None else [z_.reshape(B, P, R) for z_ in z]  # views, unless z is of one layout and dy of the other
    gi = [as_images(d, S) for d in dz] if need_dz else di
    rows = triton.cdiv(P, LEAST_ROWS)  # at most so many tiles to an image
    partial = scale[0].new_empty(len(dy), B * rows * R if z is not None else 0)
    _expand_bwd_kernel[lambda tile: (B * triton.cdiv(P, tile["BLOCK_P"]) * triton.cdiv(R, tile["BLOCK_R"]), len(dy))](
        tuple(di),
        tuple(zi),
        tuple(U),
        tuple(scale),
        tuple(gi),
        tuple(partial.unbind()),
        P,
        bucket(P),
        M,
        R,
        B // S,
        *di[0].stride(),
        *zi[0].stride(),
        *U[0].stride(),
        scale[0].stride(0),
        *gi[0].stride(),
        NEED_DZ=need_dz,
        NEED_DSCALE=z is not None,
        TYPES=types_of(di[0], zi[0], U[0]),
        PRECISION=precision(),
    )
    if z is None:
        return dz, [s.new_empty(0) for s in scale]
    tiles = B * triton.cdiv(P, _expand_bwd_kernel.best_config.kwargs["BLOCK_P"])
    dscale = scale[0].new_empty(len(dy), S, R)
    _sum_tiles_kernel[(triton.cdiv(R, SUM_BLOCK[1]), S, len(dy))](
        tuple(partial.unbind()),
        tuple(scale),
        dscale,
        S,
        tiles // S,
        R,
        scale[0].stride(0),
        UNSCALE=scaled,
        BLOCK_T=SUM_BLOCK[0],
        BLOCK_R=SUM_BLOCK[1],
    )
    return dz, list(dscale.unbind())
