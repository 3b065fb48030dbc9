"""Whole layers in Triton, in one launch and in two, against fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernels.cases import BF16, F16, TYPES, bound, by_rows, cases, in_nan, random_rows, random_scale
from numerics import relative
from torch import Tensor

from svdiff_kernels import ops
from svdiff_kernels.triton import linear as module
from svdiff_kernels.triton import product
from svdiff_kernels.triton.linear import fits_one_launch, linear

SIZES = [(70, 1, 13), (1, 9, 67), (29, 17, 23), (67, 40, 150)]  # (M, r, N)


@dataclass
class Layer:
    """Arguments of the launcher, and what fp64 makes of them."""

    x: Tensor
    U: Tensor
    scale: Tensor
    Vh: Tensor
    bias: Tensor | None
    alpha: float

    @classmethod
    def make(cls, lead, S, columns, M, R, N, kept, out, device, alpha: float = 1.0) -> Layer:
        U, Vh = (torch.randn(M, R) * R**-0.5).to(kept), (torch.randn(R, N) * N**-0.5).to(kept)
        tensors = random_rows(lead, N, out, columns), U, random_scale(S, R), Vh, torch.randn(M).to(out)
        return cls(*(in_nan(t, device) for t in tensors), alpha)

    def run(self, scaled: bool) -> tuple[Tensor, Tensor]:
        return linear(self.x, self.U, self.scale, self.Vh, self.bias, self.alpha, scaled)

    def truth(self, scaled: bool) -> tuple[Tensor, Tensor]:
        x, U, scale, Vh = (t.double() for t in (self.x, self.U, self.scale, self.Vh))
        z = self.alpha * x @ Vh.T
        bias = 0 if self.bias is None else self.bias.double()
        return (z * by_rows(scale, z)) @ U.T + bias, z * by_rows(scale, z) if scaled else z

    def check(self, scaled: bool) -> None:
        y, kept = self.run(scaled)
        true_y, true_kept = self.truth(scaled)
        assert y.dtype == self.x.dtype and kept.dtype == self.Vh.dtype
        assert ops.columns_dense(y) == ops.columns_dense(self.x)
        assert relative(y, true_y) <= bound(y.dtype)
        assert relative(kept, true_kept) <= bound(kept.dtype)


@pytest.fixture(params=[True, False], ids=["one launch", "two launches"])
def one_launch(request, monkeypatch) -> bool:
    monkeypatch.setattr(module, "fits_one_launch", lambda *sizes: request.param)
    return request.param


@pytest.mark.usefixtures("guarded", "one_launch")
@cases("M R N", SIZES, every=2)
def test_matches_fp64(lead, S, columns, M, R, N, kept, out, device) -> None:
    layer = Layer.make(lead, S, columns, M, R, N, kept, out, device)
    layer.check(scaled=(len(lead) + M + (kept == out)) % 2 == 0)


@pytest.mark.usefixtures("guarded", "one_launch")
@pytest.mark.parametrize(("kept", "out"), TYPES, ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_every_way(scaled, kept, out, device) -> None:
    layer = Layer.make((6, 13), 3, False, 37, 70, 90, kept, out, device, alpha=0.5)
    layer.check(scaled)
    assert all(map(torch.equal, layer.run(scaled), layer.run(scaled)))
    replace(layer, bias=None).check(scaled)
    U, Vh = layer.U.T.contiguous().T, layer.Vh.T.contiguous().T
    spread = torch.zeros(6, 26, 180, dtype=out, device=device)[:, ::2, ::2].copy_(layer.x)
    replace(layer, x=spread, U=U, Vh=Vh).check(scaled)


@pytest.mark.usefixtures("guarded", "one_launch")
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_activations_beyond_fp16_are_scaled_before_they_are_rounded(scaled, device) -> None:
    layer = Layer.make((9,), 1, False, 31, 14, 50, F16, BF16, device, alpha=2.0**-12)
    layer.x *= 1e7
    layer.check(scaled)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("kept", "out"), TYPES, ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_few_rows_split_their_sums(scaled, kept, out, device, monkeypatch) -> None:
    monkeypatch.setattr(product, "processors", lambda device: 4)
    monkeypatch.setattr(module, "fits_one_launch", lambda *sizes: False)
    Layer.make((3,), 1, False, 37, 23, 530, kept, out, device, alpha=2.0).check(scaled)


@pytest.mark.parametrize(
    ("B", "P", "N", "R", "M", "one"),
    [
        (1, 77, 320, 320, 320, True),
        (1, 4096, 320, 320, 320, False),  # z would be made anew for work that fills the GPU as it is
        (1, 1, 1280, 1280, 1280, False),  # few programs with all of the work
        (1, 1, 1280, 16, 1280, True),
    ],
)
def test_small_layers_fit_one_launch(B, P, N, R, M, one) -> None:
    assert fits_one_launch(B, P, N, R, M, 132) == one
