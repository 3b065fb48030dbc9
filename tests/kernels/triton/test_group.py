"""Layers with one input in one launch a stage, in Triton, against fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernels.cases import BF16, F16, TYPES, bound, by_rows, cases, in_nan, random_rows, random_scale
from numerics import relative
from torch import Tensor

from svdiff_kernels import ops
from svdiff_kernels.triton import product
from svdiff_kernels.triton.group import linear_group, linear_group_backward

SIZES = [(70, 1, 13), (1, 40, 67), (29, 17, 150)]  # (M, r, N)
ALPHAS = [2.0, 1.0, 0.5]


@dataclass
class Group:
    """Arguments of the launchers, and what fp64 makes of them."""

    x: Tensor
    U: list[Tensor]
    scale: list[Tensor]
    Vh: list[Tensor]
    bias: list[Tensor | None]
    dy: list[Tensor]
    alpha: list[float]

    @classmethod
    def make(cls, lead, S, columns, M, R, N, kept, out, device, members: int = 3) -> Group:
        def each(make) -> list[Tensor]:
            return [in_nan(make(), device) for _ in range(members)]

        return cls(
            in_nan(random_rows(lead, N, out, columns), device),
            each(lambda: (torch.randn(M, R) * R**-0.5).to(kept)),
            each(lambda: random_scale(S, R)),
            each(lambda: (torch.randn(R, N) * N**-0.5).to(kept)),
            each(lambda: torch.randn(M).to(out)),
            each(lambda: random_rows(lead, M, out, columns)),
            ALPHAS[:members],
        )

    def run(self, scaled: bool) -> tuple[list[Tensor], list[Tensor]]:
        return linear_group(self.x, self.U, self.scale, self.Vh, self.bias, self.alpha, scaled)

    def check(self, scaled: bool) -> list[Tensor]:
        y, kept = self.run(scaled)
        for g, (U, scale, Vh, bias) in enumerate(zip(self.U, self.scale, self.Vh, self.bias, strict=True)):
            z = self.alpha[g] * self.x.double() @ Vh.double().T
            scaled_z = z * by_rows(scale.double(), z)
            true_y = scaled_z @ U.double().T + (0 if bias is None else bias.double())
            assert y[g].dtype == self.x.dtype and ops.columns_dense(y[g]) == ops.columns_dense(self.x)
            assert relative(y[g], true_y) <= bound(y[g].dtype)
            assert relative(kept[g], scaled_z if scaled else z) <= bound(kept[g].dtype)
        return kept

    def check_backward(self, kept: list[Tensor]) -> None:
        dx, sums = linear_group_backward(self.dy, kept, self.U, self.scale, self.Vh, self.alpha, False, True)
        true_dx = torch.zeros_like(self.x, dtype=torch.float64)
        same = self.x.dtype == kept[0].dtype
        for g, (U, scale, Vh, dy) in enumerate(zip(self.U, self.scale, self.Vh, self.dy, strict=True)):
            b = dy.double() @ U.double()
            true_dx += self.alpha[g] * (b * by_rows(scale.double(), b)) @ Vh.double()
            true_sums = (kept[g].double() * b).reshape(len(scale), -1, b.shape[-1]).sum(1)
            # The factors are rounded to dy's type where the two differ.
            assert relative(sums[g], true_sums) <= (1e-5 if same else bound(dx.dtype))
        assert dx.dtype == self.x.dtype
        assert relative(dx, true_dx) <= bound(dx.dtype) * (1 if same else 2)


@pytest.mark.usefixtures("guarded")
@cases("M R N", SIZES, every=2)
def test_matches_fp64(lead, S, columns, M, R, N, kept, out, device) -> None:
    group = Group.make(lead, S, columns, M, R, N, kept, out, device, members=3 if S == 3 else 2)
    z_or_scaled = group.check(scaled=(len(lead) + M + (kept == out)) % 2 == 0)
    group.check_backward(z_or_scaled)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("kept", "out"), TYPES, ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_every_way(scaled, kept, out, device) -> None:
    group = Group.make((6, 5), 3, False, 37, 23, 90, kept, out, device)
    z_or_scaled = group.check(scaled)
    again = group.run(scaled)[1]
    assert all(map(torch.equal, z_or_scaled, again))
    group.bias[1] = None
    group.check(scaled)
    given = group.dy, z_or_scaled, group.U, group.scale, group.Vh, group.alpha
    dx, sums = linear_group_backward(*given, False, True)
    again, sums_again = linear_group_backward(*given, False, True)
    assert torch.equal(dx, again) and all(map(torch.equal, sums, sums_again))
    nothing, only_sums = linear_group_backward(*given, False, False)
    assert nothing.numel() == 0 and all(map(torch.equal, sums, only_sums))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("kept", "out"), TYPES, ids=str)
def test_layers_may_be_laid_out_differently(kept, out, device) -> None:
    group = Group.make((4, 7), 2, False, 29, 17, 40, kept, out, device)
    group.U[0] = group.U[0].T.contiguous().T
    group.Vh[1] = group.Vh[1].T.contiguous().T
    group.dy[2] = group.dy[2].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(2, 60, device=device)
    group.scale = [wide[:, 17 * g : 17 * (g + 1)].copy_(s) for g, s in enumerate(group.scale)]
    group.check_backward(group.check(scaled=True))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("kept", "out"), TYPES[::3], ids=str)
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_few_rows_split_their_sums(scaled, kept, out, device, monkeypatch) -> None:
    monkeypatch.setattr(product, "processors", lambda device: 64)
    group = Group.make((3,), 1, False, 37, 514, 530, kept, out, device, members=2)
    group.check_backward(group.check(scaled))


@pytest.mark.usefixtures("guarded")
def test_activations_beyond_fp16_are_scaled_before_they_are_rounded(device) -> None:
    group = Group.make((9,), 1, False, 31, 14, 50, F16, BF16, device)
    replace(group, x=group.x * 1e7, alpha=[2.0**-12, 2.0**-10, 2.0**-11]).check(scaled=True)
