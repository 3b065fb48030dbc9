"""``y = (x * scale) @ W.T + bias`` in Triton: what `expand` and `frozen_linear` have in common.

A tile never straddles two images, so that it has one row of scale. In a rows-dense layout all rows of a sample are one
image; of a conv in NCHW an image is an image, and its pixels lie next to one another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import autotuned, bucket, precision, tile_of

_SPAN = 128  # a multiple of every tile's inner length, so that splits do not overlap
BLOCK = 1024
"""Numbers of the result that a program of `_sum_kernel` adds up."""
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@autotuned("P_bucket", "M", "K", "stride_xp", "SPLITS", rows="P", columns="M", inner="K", operand="W_ptr", largest=True)
@triton.jit(do_not_specialize=["P_bucket"])
def _product_kernel(
    x_ptr,
    W_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    P,
    P_bucket,
    M,
    K,
    images,
    span,
    stride_xb,
    stride_xp,
    stride_xk,
    stride_wm,
    stride_wk,
    stride_ss,
    stride_yn,
    stride_yb,
    stride_yp,
    stride_ym,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y of one tile; with SPLITS > 1 its sum over one span of K, to be added up by `_sum_kernel`."""
    split = tl.program_id(1)
    image, p_tile, m_tile = tile_of(tl.program_id(0), P, M, BLOCK_P, BLOCK_M, GROUP)
    o_p = (p_tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    o_m = (m_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    first = split * span
    last = min(first + span, K)
    o_k = first + tl.arange(0, BLOCK_K)
    m_p, m_m = o_p < P, o_m < M
    p_x = x_ptr + image * stride_xb + o_p[:, None] * stride_xp + o_k[None, :] * stride_xk
    p_W = W_ptr + o_m[None, :] * stride_wm + o_k[:, None] * stride_wk

    b_y = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    for _ in range(first, last, BLOCK_K):
        m_k = o_k < last
        b_x = tl.load(p_x, mask=m_p[:, None] & m_k[None, :], other=0.0)  # [BLOCK_P, BLOCK_K]
        b_W = tl.load(p_W, mask=m_k[:, None] & m_m[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        if HAS_SCALE:
            b_scale = tl.load(scale_ptr + image // images * stride_ss + o_k, mask=m_k, other=0.0)
            b_x = b_x.to(tl.float32) * b_scale[None, :]
        b_y = tl.dot(b_x.to(COMPUTE), b_W.to(COMPUTE), b_y, input_precision=PRECISION)
        p_x += BLOCK_K * stride_xk
        p_W += BLOCK_K * stride_wk
        o_k += BLOCK_K
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)[None, :]
    p_y = (
        y_ptr + split.to(tl.int64) * stride_yn + image * stride_yb + o_p[:, None] * stride_yp + o_m[None, :] * stride_ym
    )
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_p[:, None] & m_m[None, :])


@triton.jit
def _sum_kernel(
    partial_ptr,
    bias_ptr,
    y_ptr,
    P,
    M,
    count,
    stride_yb,
    stride_yp,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y ``[B, P, M]`` = sum of partial ``[SPLITS, B, P, M]``, in order, plus bias."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    b_y = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        b_y += tl.load(partial_ptr + split * count + o, mask=mask, other=0.0)
    o_m, row = o % M, o // M
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_m, mask=mask, other=0.0).to(tl.float32)
    p_y = y_ptr + row // P * stride_yb + row % P * stride_yp + o_m * stride_ym
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=mask)


def product(
    x: Tensor,
    W: Tensor,
    y: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    compute: torch.dtype,
    splits: int | None = None,
) -> None:
    """Write y.

    Args:
        x: ``[B, P, K]``, any strides.
        W: ``[M, K]``, any strides.
        y: ``[B, P, M]``, any strides.
        scale: ``[S, K]`` in fp32, dense rows; S divides B.
        bias: ``[M]``.
        compute: what x (times scale) and W are rounded to before they are multiplied.
        splits: in how many spans K is summed apart, for few rows that would leave most of a GPU idle; None chooses.
    """
    (B, P, K), M = x.shape, W.shape[0]
    splits = splits or _splits(B, P, M, K, x.device)
    span = triton.cdiv(triton.cdiv(K, splits), _SPAN) * _SPAN
    splits = triton.cdiv(K, span)
    target = y if splits == 1 else x.new_empty(splits, B, P, M, dtype=torch.float32)
    _product_kernel[lambda tile: (B * triton.cdiv(P, tile["BLOCK_P"]) * triton.cdiv(M, tile["BLOCK_M"]), splits)](
        x,
        W,
        scale,
        bias if splits == 1 else None,
        target,
        P,
        bucket(P),
        M,
        K,
        1 if scale is None else B // scale.shape[0],
        span,
        *x.stride(),
        *W.stride(),
        0 if scale is None else scale.stride(0),
        *(target.stride() if splits > 1 else (0, *y.stride())),
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None and splits == 1,
        SPLITS=splits,
        COMPUTE=_TYPES[compute],
        PRECISION=precision(),
    )
    if splits > 1:
        count = B * P * M
        _sum_kernel[(triton.cdiv(count, BLOCK),)](
            target, bias, y, P, M, count, *y.stride(), HAS_BIAS=bias is not None, SPLITS=splits, BLOCK=BLOCK
        )


def _splits(B: int, P: int, M: int, K: int, device: torch.device) -> int:
    """Enough to give every multiprocessor a tile, while a span stays worth a program."""
    if device.type != "cuda":
        return 1
    tiles = B * triton.cdiv(P, 64) * triton.cdiv(M, 64)
    return max(1, min(torch.cuda.get_device_properties(device).multi_processor_count // tiles, K // 256))
