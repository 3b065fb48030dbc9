"""`svdiff::expand` and its backward in Triton. Tiles and images are those of `product.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import empty_rows_like
from .product import product
from .tiles import LEAST_ROWS, as_images, autotuned, bucket, precision, tile_of


@autotuned("P_bucket", "M", "R", "stride_dp", sizes=("BLOCK_P", "BLOCK_R", "BLOCK_M"), operand="U_ptr")
@triton.jit(do_not_specialize=["P_bucket"])
def _expand_bwd_kernel(
    dy_ptr,
    z_ptr,
    U_ptr,
    scale_ptr,
    dz_ptr,
    partial_ptr,
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
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """b = dy @ U of one tile; from it dz, and the column sums of z * b over the tile's rows."""
    image, p_tile, r_tile = tile_of(tl.program_id(0), P, R, BLOCK_P, BLOCK_R, GROUP)
    o_p = (p_tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    o_r = (r_tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    m_p, m_r = o_p < P, o_r < R
    p_dy = dy_ptr + image * stride_db + o_p[:, None] * stride_dp + o_m[None, :] * stride_dm
    p_U = U_ptr + o_m[:, None] * stride_um + o_r[None, :] * stride_ur

    b_b = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
    for m in range(0, M, BLOCK_M):
        m_m = o_m < M - m
        b_dy = tl.load(p_dy, mask=m_p[:, None] & m_m[None, :], other=0.0)  # [BLOCK_P, BLOCK_M]
        b_U = tl.load(p_U, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        # Gradients may be too small for fp16: where U is in fp16 and dy in bf16, U is converted.
        b_b = tl.dot(b_dy, b_U.to(b_dy.dtype), b_b, input_precision=PRECISION)
        p_dy += BLOCK_M * stride_dm
        p_U += BLOCK_M * stride_um
    m_pr = m_p[:, None] & m_r[None, :]
    if NEED_DSCALE:
        p_z = z_ptr + image * stride_zb + o_p[:, None] * stride_zp + o_r[None, :] * stride_zr
        b_z = tl.load(p_z, mask=m_pr, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_R]
        row = image * tl.cdiv(P, BLOCK_P) + p_tile
        tl.store(partial_ptr + row * R + o_r, tl.sum(b_z * b_b, axis=0), mask=m_r)
    if NEED_DZ:
        b_scale = tl.load(scale_ptr + image // images * stride_ss + o_r, mask=m_r, other=0.0)
        p_dz = dz_ptr + image * stride_gb + o_p[:, None] * stride_gp + o_r[None, :] * stride_gr
        tl.store(p_dz, (b_b * b_scale[None, :]).to(dz_ptr.dtype.element_ty), mask=m_pr)


def expand(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """See `ops.expand`; not in fp64."""
    y = empty_rows_like(z, U.shape[0], dtype)
    if y.numel():
        S = scale.shape[0]
        product(as_images(z, S), U, as_images(y, S), scale, bias, U.dtype)
    return y


def expand_backward(dy: Tensor, z: Tensor | None, U: Tensor, scale: Tensor, need_dz: bool) -> tuple[Tensor, Tensor]:
    """Gradients of `expand`, see `reference.expand_backward`; the same bits every time with the same tile."""
    S, R = scale.shape
    M = U.shape[0]
    dz = empty_rows_like(dy, R) if need_dz else dy.new_empty(0)
    if dy.numel() == 0:
        return dz, scale.new_zeros(scale.shape if z is not None else 0)
    di = as_images(dy, S)
    B, P, _ = di.shape
    zi = di if z is None else z.reshape(B, P, R)  # a view, unless z is of one layout and dy of the other
    gi = as_images(dz, S) if need_dz else di
    rows = triton.cdiv(P, LEAST_ROWS)  # at most so many tiles to an image
    partial = scale.new_empty(B * rows * R if z is not None else 0)
    _expand_bwd_kernel[lambda tile: (B * triton.cdiv(P, tile["BLOCK_P"]) * triton.cdiv(R, tile["BLOCK_R"]),)](
        di,
        zi,
        U,
        scale,
        gi,
        partial,
        P,
        bucket(P),
        M,
        R,
        B // S,
        *di.stride(),
        *zi.stride(),
        *U.stride(),
        scale.stride(0),
        *gi.stride(),
        NEED_DZ=need_dz,
        NEED_DSCALE=z is not None,
        PRECISION=precision(),
    )
    if z is None:
        return dz, scale.new_empty(0)
    tiles = B * triton.cdiv(P, _expand_bwd_kernel.best_config.kwargs["BLOCK_P"])
    return dz, partial[: tiles * R].view(S, tiles // S, R).sum(1)
