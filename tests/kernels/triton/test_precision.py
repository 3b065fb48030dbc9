"""Small shifts act through the Triton kernels as well: the same table as for every other implementation."""

from __future__ import annotations

import pytest
import torch
from kernels.test_precision import measure
from torch import Tensor

from svdiff_kernels.triton import linear as module
from svdiff_kernels.triton.expand import expand
from svdiff_kernels.triton.frozen import frozen_linear
from svdiff_kernels.triton.linear import linear

FP16, MIXED = ("factored", torch.float16), ("factors in fp16", torch.bfloat16)
ROWS = 1024  # the 4096 that the table is made of take minutes in the interpreter


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "form", "dtype"),
    [
        ("by its ops", *MIXED),
        ("one launch", *MIXED),
        ("two launches", *MIXED),
        ("two launches, scaled", *MIXED),
        ("two launches, scaled", *FP16),
    ],
    ids=str,
)
def test_small_shifts_act(
    way: str, form: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fits_one_launch", lambda *sizes: way == "one launch")

    def layer(x: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor, delta: Tensor, weight: None) -> Tensor:
        x, U, Vh, scale = (t.to(device) for t in (x, U, Vh, torch.relu(sigma + delta)[None]))
        if way == "by its ops":
            return expand(frozen_linear(x, Vh, None, Vh.dtype), U, scale, None, x.dtype).cpu()
        return linear(x, U, scale, Vh, None, 1.0, scaled="scaled" in way)[0].cpu()

    precision, rounded_once = measure(form, dtype, rows=ROWS, linear=layer)
    precision.assert_within_table(form, dtype, rounded_once)
