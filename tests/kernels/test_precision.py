"""Small shifts must act: shift error and noise of every form and dtype, as `numerics` defines and bounds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from numerics import NOISE, SHIFT_ERROR
from torch import Tensor

from svdiff_kernels import decompose, spectral_conv2d, spectral_linear

ROWS = 4096


@dataclass(frozen=True)
class Precision:
    """Of a layer, or of the exact y rounded once."""

    shift_error: float
    noise: float

    def assert_within_table(self, form: str, dtype: torch.dtype, rounded_once: Precision) -> None:
        # What y's own rounding costs varies a little with the layer, round the table's figure; nothing can beat it.
        assert self.shift_error <= max(SHIFT_ERROR[form, dtype], 1.03 * rounded_once.shift_error)
        assert self.noise <= NOISE[form, dtype]


def measure(
    form: str,
    dtype: torch.dtype,
    *,
    conv: bool = False,
    rows: int = ROWS,
    linear: Callable[..., Tensor] = spectral_linear,
) -> tuple[Precision, Precision]:
    """A random layer's precision, and that of the exact y rounded once.

    The layer is 320x320, or a 3x3 conv of 96 to 320 channels and 4096 rows.
    """
    shape = (320, 96, 3, 3) if conv else (320, 320)
    W = torch.randn(shape) / 320**0.5
    f = decompose(W, dtype=torch.float64)
    x = torch.randn((16, 96, 18, 18) if conv else (rows, 320)).to(dtype)
    kept = torch.float16 if form == "factors in fp16" else dtype
    sigma, U, Vh = f.sigma.float(), f.U.to(kept), f.Vh.to(kept).view(-1, *shape[1:])
    weight = W.to(dtype) if form == "residual" else None
    delta = 1e-3 * sigma

    def layer(d: Tensor) -> Tensor:  # [rows, M]
        if conv:
            y = spectral_conv2d(x, U, sigma, Vh, d, weight=weight)
            return y.permute(0, 2, 3, 1).reshape(ROWS, -1).double()
        return linear(x, U, sigma, Vh, d, weight=weight).double()

    patches = F.unfold(x.double(), 3).transpose(1, 2).flatten(0, 1) if conv else x.double()
    z = patches @ f.Vh.T  # [rows, r]: what the layer sees of every direction
    # The base of the numbers that are stored, without rounding in between: what y differs from it is what delta did.
    stored = (U.double() * f.sigma) @ Vh.flatten(1).double() if weight is None else weight.flatten(1).double()
    base = patches @ stored.T

    def shift_error(y: Tensor) -> float:
        acted = ((y - base) @ f.U * z).sum(0) / (z * z).sum(0)  # least squares over the rows
        return ((acted - delta).norm() / delta.norm()).item()

    truth = (z * f.sigma) @ f.U.T

    def noise(y: Tensor) -> float:
        return ((y - truth).norm() / truth.norm()).item()

    rounded = (base + (z * delta) @ f.U.T).to(dtype).double()
    return (
        Precision(shift_error(layer(delta)), noise(layer(torch.zeros_like(delta)))),
        Precision(shift_error(rounded), noise(truth.to(dtype).double())),
    )


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize(("form", "dtype"), SHIFT_ERROR, ids=str)
def test_small_shifts_act(form: str, dtype: torch.dtype, conv: bool) -> None:
    precision, rounded_once = measure(form, dtype, conv=conv)
    precision.assert_within_table(form, dtype, rounded_once)
