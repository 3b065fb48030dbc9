"""`svdiff::linear`, the whole layer as one op, as the reference composes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import EXACT, relative

from svdiff_kernels import ops, reference

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize("scaled", [False, True], ids=["z", "scaled z"])
@pytest.mark.parametrize(("lead", "S"), [((0,), 1), ((1,), 1), ((6, 5), 3), ((7,), 7)], ids=str)
@pytest.mark.parametrize(("dtype", "kept"), [(F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (BF16, F16)], ids=str)
def test_matches_fp64(dtype: torch.dtype, kept: torch.dtype, lead: tuple[int, ...], S: int, scaled: bool) -> None:
    N, M, r, alpha = 23, 29, 17, 0.25
    x, U, Vh = torch.randn(*lead, N).to(dtype), torch.randn(M, r).to(kept), torch.randn(r, N).to(kept)
    scale = torch.rand(S, r, dtype=F64 if dtype == F64 else F32)
    bias = torch.randn(M).to(dtype)
    y, z = ops.linear(x, U, scale, Vh, bias, alpha=alpha, scaled=scaled)
    z64 = alpha * x.double() @ Vh.double().T
    rows = scale.double().repeat_interleave(z64.shape[:-1].numel() // S, 0).view(z64.shape)
    assert (y.dtype, z.dtype) == (dtype, kept)
    assert relative(z, z64 * rows if scaled else z64) <= 2 * EXACT.get(kept, torch.finfo(kept).eps)
    assert relative(y, (z64 * rows) @ U.double().T + bias.double()) <= 2 * EXACT.get(dtype, torch.finfo(dtype).eps)

    dy = torch.randn(*lead, M).to(dtype)
    dx, dscale = ops.linear_backward(dy, z, U, scale, Vh, alpha=alpha, scaled=scaled)
    b = dy.double() @ U.double()
    assert relative(dx, alpha * (rows * b) @ Vh.double()) <= 4 * EXACT.get(dtype, torch.finfo(dtype).eps)
    sums = (z64 * b).reshape(S, -1, r).sum(1)
    assert relative(dscale, sums) <= 4 * EXACT.get(kept, torch.finfo(kept).eps)
    none, alone = ops.linear_backward(dy, z, U, scale, Vh, alpha=alpha, scaled=scaled, need_dx=False)
    assert none.numel() == 0 and torch.equal(alone, dscale)
    assert ops.linear_backward(dy, None, U, scale, Vh, alpha=alpha, scaled=scaled)[1].numel() == 0


def test_where_scale_is_zero_so_is_its_gradient() -> None:
    x, U, Vh, scale = torch.randn(4, 5), torch.randn(7, 3), torch.randn(3, 5), torch.tensor([[1.0, 0.0, 2.0]])
    _, kept = ops.linear(x, U, scale, Vh, None, scaled=True)
    dscale = ops.linear_backward(torch.randn(4, 7), kept, U, scale, Vh, scaled=True)[1]
    assert dscale[0, 1] == 0 and (dscale[0, ::2] != 0).all()


def test_a_convolution_by_way_of_fp16() -> None:
    x, weight = torch.randn(2, 5, 6, 7).bfloat16() * 1e5, torch.randn(9, 5, 3, 3).bfloat16()
    y = reference._conv2d_by_fp16(x, weight, ((1, 1), (1, 1), (1, 1)))
    assert y.dtype == F32
    assert relative(y, F.conv2d(x.double(), weight.double(), padding=1)) <= torch.finfo(F16).eps


@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck(scaled: bool) -> None:
    x, U, Vh, scale = torch.randn(4, 5), torch.randn(7, 3).half(), torch.randn(3, 5).half(), torch.rand(2, 3)
    torch.library.opcheck(torch.ops.svdiff.linear.default, (x.bfloat16(), U, scale, Vh, None, 0.5, scaled))
    arguments = (torch.randn(4, 7).bfloat16(), torch.randn(4, 3).half(), U, scale, Vh, 0.5, scaled, True)
    torch.library.opcheck(torch.ops.svdiff.linear_backward.default, arguments)
