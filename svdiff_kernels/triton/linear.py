"""A whole spectral linear layer in Triton, ``y = (alpha * (x @ Vh.T) * scale) @ U.T + bias``, in one launch or two."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops import columns_dense, empty_rows_like
from .expand import expand_backwards
from .product import product
from .tiles import Tiles, as_images, autotuned, bucket, precision, processors, rounded, tile_of

# (rows, columns of y, ranks, inner) of a tile.
_HALF: Tiles = ((64, 64, 64, 64, 4, 3), (64, 128, 64, 64, 8, 3), (32, 64, 64, 64, 4, 3), (16, 64, 64, 128, 4, 3))
_FULL: Tiles = ((32, 64, 32, 32, 8, 3), (16, 32, 32, 64, 4, 3))
_BLOCK = 64
_STEPS = 32
"""Blocks of Vh that a program may go through, one after another, before a second launch would be the cheaper."""


@autotuned(
    "P_bucket",
    "M",
    "N",
    "R",
    "stride_xp",
    sizes=("BLOCK_P", "BLOCK_M", "BLOCK_R", "BLOCK_N"),
    operand="U_ptr",
    half=_HALF,
    full=_FULL,
)
@triton.jit(do_not_specialize=["P_bucket"])
def _linear_kernel(
    x_ptr,
    U_ptr,
    scale_ptr,
    Vh_ptr,
    bias_ptr,
    y_ptr,
    kept_ptr,
    alpha,
    P,
    P_bucket,
    M,
    N,
    R,
    images,
    stride_xb,
    stride_xp,
    stride_xn,
    stride_um,
    stride_ur,
    stride_ss,
    stride_vr,
    stride_vn,
    stride_yb,
    stride_yp,
    stride_ym,
    stride_kb,
    stride_kp,
    stride_kr,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y of one tile. Every column of tiles makes z anew; the first one keeps it."""
    image, p_tile, m_tile = tile_of(tl.program_id(0), P, M, BLOCK_P, BLOCK_M, GROUP)
    o_p = (p_tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    o_m = (m_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_p, m_m = o_p < P, o_m < M
    p_x = x_ptr + image * stride_xb + o_p[:, None] * stride_xp
    p_U = U_ptr + o_m[None, :] * stride_um
    p_kept = kept_ptr + image * stride_kb + o_p[:, None] * stride_kp
    p_scale = scale_ptr + image // images * stride_ss
    KEPT: tl.constexpr = kept_ptr.dtype.element_ty

    b_y = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        b_U = tl.load(p_U + o_r[:, None] * stride_ur, mask=m_r[:, None] & m_m[None, :], other=0.0)  # [BLOCK_R, BLOCK_M]
        b_z = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
        for n in range(0, N, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            p_n = p_x + o_n[None, :] * stride_xn
            b_x = tl.load(p_n, mask=m_p[:, None] & m_n[None, :], other=0.0)  # [BLOCK_P, BLOCK_N]
            p_Vh = Vh_ptr + o_r[None, :] * stride_vr + o_n[:, None] * stride_vn
            b_Vh = tl.load(p_Vh, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
            if HAS_ALPHA:
                b_x = b_x.to(tl.float32) * alpha
            b_z = tl.dot(rounded(b_x, KEPT), b_Vh, b_z, input_precision=PRECISION)
        b_scaled = b_z * tl.load(p_scale + o_r, mask=m_r, other=0.0)[None, :]
        if m_tile == 0:
            b_kept = b_scaled if SCALED else b_z
            tl.store(p_kept + o_r[None, :] * stride_kr, b_kept.to(KEPT), mask=m_p[:, None] & m_r[None, :])
        b_y = tl.dot(b_scaled.to(KEPT), b_U, b_y, input_precision=PRECISION)
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)[None, :]
    p_y = y_ptr + image * stride_yb + o_p[:, None] * stride_yp + o_m[None, :] * stride_ym
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_p[:, None] & m_m[None, :])


def linear(
    x: Tensor, U: Tensor, scale: Tensor, Vh: Tensor, bias: Tensor | None, alpha: float, scaled: bool
) -> tuple[Tensor, Tensor]:
    """See `ops.linear`; not in fp64. x may have its columns dense (`ops.expand`): y and kept are laid out as x is."""
    (S, R), M = scale.shape, U.shape[0]
    xi, kept = as_images(x, S), empty_rows_like(x, R, Vh.dtype)
    ki = as_images(kept, S)
    B, P, N = xi.shape
    if not kept.numel():
        return empty_rows_like(x, M), kept
    if fits_one_launch(B, P, N, R, M, processors(x.device)):
        y = empty_rows_like(x, M)
        _in_one_launch(xi, U, scale, Vh, bias, as_images(y, S), ki, alpha, scaled)
        return y, kept
    vendor = x.dtype == Vh.dtype and not columns_dense(x)
    if scaled:
        product(xi, Vh, ki, scale, None, Vh.dtype, after=True, alpha=alpha)
        if vendor:
            return F.linear(kept, U, bias), kept
    elif vendor and alpha == 1:
        kept = F.linear(x, Vh)
        ki = as_images(kept, S)
    else:
        product(xi, Vh, ki, None, None, Vh.dtype, alpha=alpha)
    y = empty_rows_like(x, M)
    product(ki, U, as_images(y, S), None if scaled else scale, bias, U.dtype)
    return y, kept


def linear_backward(
    dy: Tensor, kept: Tensor | None, U: Tensor, scale: Tensor, Vh: Tensor, alpha: float, scaled: bool, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """See `ops.linear_backward`; not in fp64."""
    given = None if kept is None else [kept]
    (dz,), (dscale,) = expand_backwards([dy], given, [U], [scale], need_dx, scaled=scaled)
    if not need_dx:
        return dz, dscale
    if dy.dtype == Vh.dtype and not columns_dense(dz):
        return F.linear(dz, Vh.T) if alpha == 1 else F.linear(dz, Vh.T).mul_(alpha), dscale
    dx = empty_rows_like(dz, Vh.shape[1])
    if dx.numel():
        product(as_images(dz, len(scale)), Vh.T, as_images(dx, len(scale)), None, None, dx.dtype, alpha=alpha)
    return dx, dscale


def fits_one_launch(B: int, P: int, N: int, R: int, M: int, processors: int) -> bool:
    """Is the layer so small that its second launch would cost more than making z anew in every column of tiles?

    So it is where all tiles run at once, on multiprocessors that would else be idle, and none takes many steps.
    """
    tiles = B * triton.cdiv(P, _BLOCK) * triton.cdiv(M, _BLOCK)
    return tiles <= processors and triton.cdiv(R, _BLOCK) * triton.cdiv(N, _BLOCK) <= _STEPS


def _in_one_launch(
    x: Tensor,
    U: Tensor,
    scale: Tensor,
    Vh: Tensor,
    bias: Tensor | None,
    y: Tensor,
    kept: Tensor,
    alpha: float,
    scaled: bool,
) -> None:
    (B, P, N), (M, R) = x.shape, U.shape
    _linear_kernel[lambda tile: (B * triton.cdiv(P, tile["BLOCK_P"]) * triton.cdiv(M, tile["BLOCK_M"]),)](
        x,
        U,
        scale,
        Vh,
        bias,
        y,
        kept,
        float(alpha),
        P,
        bucket(P),
        M,
        N,
        R,
        B // scale.shape[0],
        *x.stride(),
        *U.stride(),
        scale.stride(0),
        *Vh.stride(),
        *y.stride(),
        *kept.stride(),
        SCALED=scaled,
        HAS_BIAS=bias is not None,
        HAS_ALPHA=alpha != 1,
        PRECISION=precision(),
    )
