"""`svdiff::linear_backward` in Triton, against fp64."""

from __future__ import annotations

import pytest
import torch
from numerics import EXACT, relative

from svdiff_kernels.triton.linear import linear_backward

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("scaled", [False, True], ids=["z", "scaled z"])
@pytest.mark.parametrize(("lead", "S"), [((0,), 1), ((1,), 1), ((131,), 1), ((6, 5), 3), ((7,), 7)], ids=str)
@pytest.mark.parametrize(("N", "M", "r"), [(23, 70, 1), (67, 29, 17), (150, 131, 90)])
@pytest.mark.parametrize(("kept", "out"), [(F32, F32), (F16, F16), (BF16, BF16), (F16, BF16)], ids=str)
@pytest.mark.usefixtures("guarded")
def test_matches_fp64(
    kept: torch.dtype,
    out: torch.dtype,
    N: int,
    M: int,
    r: int,
    lead: tuple[int, ...],
    S: int,
    scaled: bool,
    device: str,
) -> None:
    alpha = 0.25 if kept != out else 1.0
    z, dy = torch.randn(*lead, r), torch.randn(*lead, M).to(out)
    U, Vh, scale = torch.randn(M, r).to(kept), torch.randn(r, N).to(kept), torch.rand(S, r) + 0.1
    scale[:, r // 2] = 0
    rows = scale.repeat_interleave(z.shape[:-1].numel() // S, 0).view(z.shape)
    given = (z * rows if scaled else z).to(kept)
    arguments = (dy, given, U, scale, Vh)
    dx, dscale = linear_backward(*(t.to(device) for t in arguments), alpha, scaled, True)
    b = dy.double() @ U.double()
    sums = (given.double() * b).reshape(S, -1, r).sum(1)
    wanted = torch.where(scale > 0, sums / scale, 0) if scaled else sums
    eps = EXACT.get(out, torch.finfo(out).eps)
    assert dx.dtype == out and dscale.dtype == F32
    assert relative(dx.cpu(), alpha * (rows.double() * b) @ Vh.double()) <= 2 * eps
    # Factors in fp16 are rounded to the type of dy.
    assert relative(dscale.cpu(), wanted) <= 2 * (EXACT[F32] if kept == out else eps)
    again = linear_backward(*(t.to(device) for t in arguments), alpha, scaled, False)[1]
    assert torch.equal(again, dscale)
