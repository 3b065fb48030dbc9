"""The gains of a whole model from its bank in Triton, and their gradients: see `bank._Gains` for what they are.

Adapters lie in allocations of their own. A kernel takes them as a tuple of pointers and is compiled for their number:
nothing is stacked, copied or sent to the GPU when adapters come and go, so that a graph may capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of the bank that a program handles."""
_MOST = 8
"""Adapters that one launch adds up; each number of them is compiled once."""


@triton.jit
def _gains_kernel(
    base_ptr,
    floor_ptr,
    mix_ptr,
    matrices_ptrs,
    one_dim_ptrs,
    gain_ptr,
    held_ptr,
    R,
    split,
    stride_bs,
    stride_ms,
    stride_ma,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """base plus every adapter's share, for one block of one sample; what is LAST also meets the floor."""
    sample = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, first = o < R, o < split
    b_gain = tl.load(base_ptr + sample * stride_bs + o, mask=inside)
    for a in tl.static_range(len(matrices_ptrs)):
        weight = tl.load(mix_ptr + sample * stride_ms + a * stride_ma)
        b_delta = tl.load(matrices_ptrs[a] + o, mask=first, other=0.0)
        b_delta += tl.load(one_dim_ptrs[a] + (o - split), mask=inside & ~first, other=0.0)
        b_gain += weight * b_delta
    if LAST:
        b_floor = tl.load(floor_ptr + o, mask=inside)
        b_held = b_gain <= b_floor
        tl.store(held_ptr + sample * R + o, b_held, mask=inside)
        b_gain = tl.where(b_held, b_floor, b_gain)
    tl.store(gain_ptr + sample * R + o, b_gain, mask=inside)


@triton.jit
def _gains_bwd_kernel(
    dgain_ptr,
    held_ptr,
    mix_ptr,
    grad_ptr,
    S,
    R,
    stride_ds,
    stride_dr,
    stride_ms,
    BLOCK: tl.constexpr,
):
    """The gradient of one adapter: the samples' shares, added up in order."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = o < R
    b_grad = tl.zeros((BLOCK,), dtype=tl.float32)
    for sample in range(S):
        b_dgain = tl.load(dgain_ptr + sample * stride_ds + o * stride_dr, mask=inside, other=0.0)
        b_held = tl.load(held_ptr + sample * R + o, mask=inside, other=1)
        b_grad += tl.where(b_held, 0.0, b_dgain * tl.load(mix_ptr + sample * stride_ms))
    tl.store(grad_ptr + o, b_grad, mask=inside)


def gains(base: Tensor, floor: Tensor, mix: Tensor, deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `ops.gains`, of dense fp32 tensors.

    Args:
        base: ``[R]``.
        floor: ``[R]``.
        mix: ``[A]``, or ``[S, A]`` for S samples, and then the results are ``[S, R]``.
        deltas: of each adapter its shifts of matrices, all of one length, and of 1-D weights, which make up R.
    """
    R, shape = base.shape[0], (*mix.shape[:-1], base.shape[0])
    gain, held = base.new_empty(shape), base.new_empty(shape, dtype=torch.bool)
    rows = mix.view(-1, mix.shape[-1])
    matrices, one_dim = deltas[::2], deltas[1::2]
    starts = range(0, len(matrices), _MOST)
    grid = (triton.cdiv(R, BLOCK), rows.shape[0])
    for start in starts:
        here = slice(start, start + _MOST)
        _gains_kernel[grid](
            base if start == 0 else gain,
            floor,
            rows[:, here],
            tuple(matrices[here]),
            tuple(one_dim[here]),
            gain,
            held,
            R,
            matrices[0].shape[0],
            0 if start == 0 else R,
            *rows.stride(),
            LAST=start == starts[-1],
            BLOCK=BLOCK,
        )
    return gain, held


def gains_backward(dgain: Tensor, held: Tensor, mix: Tensor, adapters: Sequence[int]) -> Tensor:
    """See `ops.gains_backward`; in fp32."""
    R = dgain.shape[-1]
    d, rows = dgain.view(-1, R) if dgain.dim() == 1 else dgain, mix.view(-1, mix.shape[-1])
    grads = dgain.new_empty(len(adapters), R)
    for grad, a in zip(grads, adapters, strict=True):
        _gains_bwd_kernel[(triton.cdiv(R, BLOCK),)](
            d, held, rows[:, a], grad, len(rows), R, *d.stride(), rows.stride(0), BLOCK=BLOCK
        )
    return grads
