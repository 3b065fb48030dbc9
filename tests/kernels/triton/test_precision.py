"""Small shifts act through the Triton kernels as well: the same table as for every other implementation."""

from __future__ import annotations

import pytest
import torch
from kernels.test_precision import measure
from torch import Tensor

from svdiff_kernels.triton.expand import expand
from svdiff_kernels.triton.frozen import frozen_linear


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "dtype"),
    [("factored", torch.float16), ("factors in fp16", torch.bfloat16)],
    ids=str,
)
def test_small_shifts_act(form: str, dtype: torch.dtype, device: str) -> None:
    def linear(x: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor, delta: Tensor, weight: None) -> Tensor:
        x, U, Vh, scale = (t.to(device) for t in (x, U, Vh, torch.relu(sigma + delta)[None]))
        return expand(frozen_linear(x, Vh, None, Vh.dtype), U, scale, None, x.dtype).cpu()

    precision, rounded_once = measure(form, dtype, linear=linear)
    precision.assert_within_table(form, dtype, rounded_once)
