"""`svdiff::frozen_linear` in Triton, where input and weight are of different types."""

from __future__ import annotations

import pytest
import torch
from kernels.cases import BF16, F16, F32
from numerics import EXACT, relative

from svdiff_kernels.triton.frozen import frozen_linear

# Of x, of the weight, of the result.
TYPES = [(F32, F32, F32), (BF16, F16, F16), (BF16, F16, BF16), (BF16, BF16, F32)]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("x_type", "weight_type", "out"), TYPES, ids=str)
@pytest.mark.parametrize("lead", [(0,), (1,), (131,), (2, 5), ()], ids=str)
@pytest.mark.parametrize(("M", "N"), [(29, 17), (1, 70), (67, 150)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_matches_fp64(lead, M, N, transposed, x_type, weight_type, out, device) -> None:
    x, bias = torch.randn(*lead, N, device=device).to(x_type), torch.randn(M, device=device).to(x_type)
    weight = (torch.randn(N, M, device=device).T if transposed else torch.randn(M, N, device=device)).to(weight_type)
    y = frozen_linear(x, weight, bias, out)
    truth = x.double() @ weight.double().T + bias.double()
    rounded = torch.finfo(BF16 if out == BF16 else F16).eps
    assert y.dtype == out and relative(y, truth) <= (EXACT[F32] if out == F32 else rounded)
    assert torch.equal(frozen_linear(x, weight, bias, out), y)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("lead", [(1,), (2, 5)], ids=str)
@pytest.mark.parametrize(("M", "N"), [(29, 17), (67, 150)], ids=str)
@pytest.mark.parametrize(("x_type", "weight_type", "out"), TYPES, ids=str)
def test_alpha_multiplies_before_x_is_rounded(lead, M, N, x_type, weight_type, out, device) -> None:
    x, alpha = (2e6 * torch.randn(*lead, N, device=device)).to(x_type), 2.0**-12
    weight = torch.randn(M, N, device=device).to(weight_type)
    y = frozen_linear(x, weight, None, out, alpha)
    assert relative(y, alpha * x.double() @ weight.double().T) <= (EXACT[F32] if out == F32 else torch.finfo(out).eps)
