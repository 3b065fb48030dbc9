"""``y = (alpha * x * scale) @ W.T + bias`` in Triton: what `expand`, `frozen_linear` and whole layers have in common.

A tile never straddles two images, so that it has one row of scale. In a rows-dense layout all rows of a sample are one
image; of a conv in NCHW an image is an image, and its pixels lie next to one another.

A group is a few layers of the same shapes, the q, k and v of an attention. Its tensors come to a kernel as tuples, so
that no weight is copied, and each program works for one layer of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import HALF, autotuned, bucket, of_member, precision, processors, rounded, tile_of, types_of

_SPAN = 128  # a multiple of every tile's inner length, so that splits do not overlap
BLOCK = 1024
"""Numbers of the result that a program of `_sum_kernel` adds up."""
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@autotuned(
    "P_bucket",
    "M",
    "K",
    "stride_xp",
    "SCALES_X",
    "SUMMED",
    "SPLITS",
    "TYPES",
    sizes=("BLOCK_P", "BLOCK_M", "BLOCK_K"),
    operand="W_ptrs",
    half=(*HALF, (128, 256, 64, 8, 3)),
)
@triton.jit(do_not_specialize=["P_bucket"])
def _product_kernel(
    x_ptrs,
    W_ptrs,
    scale_ptrs,
    bias_ptrs,
    y_ptrs,
    alphas,
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
    SCALES_X: tl.constexpr,
    SCALES_Y: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    SUMMED: tl.constexpr,
    SPLITS: tl.constexpr,
    TYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y of one tile of one layer; with SPLITS > 1 its sum over one span of K, to be added up by `_sum_kernel`.

    scale multiplies x, along K, or y, along M, before the bias. SUMMED: one y for all layers.
    """
    split, member = tl.program_id(1), tl.program_id(2)
    image, p_tile, m_tile = tile_of(tl.program_id(0), P, M, BLOCK_P, BLOCK_M, GROUP)
    o_p = (p_tile * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    o_m = (m_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    m_p, m_m = o_p < P, o_m < M
    first = split * span
    last = min(first + span, K)
    steps = tl.cdiv(last - first, BLOCK_K)
    o_k = tl.arange(0, BLOCK_K)
    o_x = image * stride_xb + o_p[:, None] * stride_xp + o_k[None, :] * stride_xk
    o_W = o_m[None, :] * stride_wm + o_k[:, None] * stride_wk
    p_scale = None
    if SCALES_X or SCALES_Y:
        p_scale = of_member(scale_ptrs, member) + image // images * stride_ss

    b_y = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    for step in range(0, steps * len(x_ptrs) if SUMMED else steps):
        source, block = (step // steps, step % steps) if SUMMED else (member, step)
        k = first + block * BLOCK_K
        m_k = o_k < last - k
        p_x = of_member(x_ptrs, source) + k.to(tl.int64) * stride_xk + o_x
        b_x = tl.load(p_x, mask=m_p[:, None] & m_k[None, :], other=0.0)  # [BLOCK_P, BLOCK_K]
        p_W = of_member(W_ptrs, source) + k.to(tl.int64) * stride_wk + o_W
        b_W = tl.load(p_W, mask=m_k[:, None] & m_m[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        if SCALES_X:
            b_x = b_x.to(tl.float32) * tl.load(p_scale + k + o_k, mask=m_k, other=0.0)[None, :]
        if HAS_ALPHA:  # before x is rounded: bf16 reaches further than fp16
            b_x = b_x.to(tl.float32) * of_member(alphas, source)
        b_y = tl.dot(rounded(b_x, COMPUTE), rounded(b_W, COMPUTE), b_y, input_precision=PRECISION)
    if SCALES_Y:
        b_y *= tl.load(p_scale + o_m, mask=m_m, other=0.0)[None, :]
    if HAS_BIAS:
        b_y += tl.load(of_member(bias_ptrs, member) + o_m, mask=m_m, other=0.0).to(tl.float32)[None, :]
    p_y = of_member(y_ptrs, member) + split.to(tl.int64) * stride_yn + image * stride_yb
    p_y += o_p[:, None] * stride_yp + o_m[None, :] * stride_ym
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_p[:, None] & m_m[None, :])


@triton.jit
def _sum_kernel(
    partial_ptrs,
    bias_ptrs,
    y_ptrs,
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
    """y ``[B, P, M]`` of one layer = sum of its partial ``[SPLITS, B, P, M]``, in order, plus bias."""
    member = tl.program_id(1)
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    p_partial = of_member(partial_ptrs, member) + o
    b_y = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        b_y += tl.load(p_partial + split * count, mask=mask, other=0.0)
    o_m, row = o % M, o // M
    if HAS_BIAS:
        b_y += tl.load(of_member(bias_ptrs, member) + o_m, mask=mask, other=0.0).to(tl.float32)
    p_y = of_member(y_ptrs, member) + row // P * stride_yb + row % P * stride_yp + o_m * stride_ym
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=mask)


def product(
    x: Tensor,
    W: Tensor,
    y: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    compute: torch.dtype,
    splits: int | None = None,
    *,
    after: bool = False,
    alpha: float = 1.0,
) -> None:
    """`products` of one layer."""
    scales = None if scale is None else [scale]
    products([x], [W], [y], scales, [bias], compute, splits, after=after, alphas=[alpha])


def products(
    x: Sequence[Tensor],
    W: Sequence[Tensor],
    y: Sequence[Tensor],
    scale: Sequence[Tensor] | None,
    bias: Sequence[Tensor | None],
    compute: torch.dtype,
    splits: int | None = None,
    *,
    after: bool = False,
    alphas: Sequence[float],
) -> None:
    """Write y, of every layer of a group; or where there are several x and one y, the sum of all.

    Layers agree in shapes, strides and types.

    Args:
        x: ``[B, P, K]``, any strides.
        W: ``[M, K]``, any strides.
        y: ``[B, P, M]``, any strides.
        scale: ``[S, K]`` in fp32, dense rows; S divides B.
        bias: ``[M]``.
        compute: what x (times scale and alpha) and W are rounded to before they are multiplied.
        splits: in how many spans K is summed apart, for few rows that would leave most of a GPU idle; None chooses.
        after: scale is ``[S, M]``, and multiplies the product instead of x.
        alphas: multiply x before it is rounded.
    """
    (B, P, K), M = x[0].shape, W[0].shape[0]
    splits = splits or _splits(len(y) * B, P, M, K, x[0].device)
    span = triton.cdiv(triton.cdiv(K, splits), _SPAN) * _SPAN
    splits = triton.cdiv(K, span)
    bias = _all_or_none(bias)
    target = y if splits == 1 else [x[0].new_empty(splits, B, P, M, dtype=torch.float32) for _ in y]

    def grid(tile: dict[str, int]) -> tuple[int, int, int]:
        return B * triton.cdiv(P, tile["BLOCK_P"]) * triton.cdiv(M, tile["BLOCK_M"]), splits, len(y)

    _product_kernel[grid](
        tuple(x),
        tuple(W),
        scale and tuple(scale),
        tuple(bias),
        tuple(target),
        tuple(map(float, alphas)),
        P,
        bucket(P),
        M,
        K,
        B // scale[0].shape[0] if scale else 1,
        span,
        *x[0].stride(),
        *W[0].stride(),
        scale[0].stride(0) if scale else 0,
        *(target[0].stride() if splits > 1 else (0, *y[0].stride())),
        SCALES_X=scale is not None and not after,
        SCALES_Y=scale is not None and after,
        HAS_BIAS=bias[0] is not None and splits == 1,
        HAS_ALPHA=any(alpha != 1 for alpha in alphas),
        SUMMED=len(x) > len(y),
        SPLITS=splits,
        TYPES=types_of(x[0], W[0], y[0]),
        COMPUTE=_TYPES[compute],
        PRECISION=precision(),
    )
    if splits > 1:
        count = B * P * M
        _sum_kernel[(triton.cdiv(count, BLOCK), len(y))](
            tuple(target),
            tuple(bias),
            tuple(y),
            P,
            M,
            count,
            *y[0].stride(),
            HAS_BIAS=bias[0] is not None,
            SPLITS=splits,
            BLOCK=BLOCK,
        )


def _all_or_none(bias: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Zeros for the layers without a bias, where others have one."""
    given = next((b for b in bias if b is not None), None)
    return bias if given is None else [torch.zeros_like(given) if b is None else b for b in bias]


def _splits(B: int, P: int, M: int, K: int, device: torch.device) -> int:
    """Enough to give every multiprocessor a tile, while a span stays worth a program."""
    tiles = B * triton.cdiv(P, 64) * triton.cdiv(M, 64)
    return max(1, min(processors(device) // tiles, K // 256))
