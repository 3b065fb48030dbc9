"""Several layers with one input: `nn.linears`, and the ops behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import relative
from torch import Tensor, nn

from svdiff_kernels import backends, ops
from svdiff_kernels.nn import SpectralLinear, linears


def layers(count: int = 3, **how: Any) -> list[SpectralLinear]:
    made = [SpectralLinear.from_module(nn.Linear(23, 29, bias=i != 1), **how) for i in range(count)]
    for layer in made:
        layer.delta.data.normal_(std=0.1)
    return made


def outcome(ys: list[Tensor], x: Tensor, made: list[SpectralLinear]) -> list[Tensor]:
    torch.manual_seed(1)
    sum((y * torch.randn_like(y)).sum() for y in ys).backward()
    return [*(y.detach() for y in ys), x.grad, *(layer.delta.grad for layer in made)]


@pytest.mark.parametrize("grouped", [False, True], ids=["one by one", "grouped"])
@pytest.mark.parametrize("how", [{}, {"rank": 4}], ids=["factored", "residual"])
def test_each_as_if_alone(how: dict[str, Any], grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layers(**how), torch.randn(2, 7, 23, requires_grad=True)
    alone = outcome([layer(x) for layer in made], x, made)
    x.grad = None
    for layer in made:
        layer.delta.grad = None
    if grouped:
        monkeypatch.setattr(backends, "fuses", lambda kind: True)
    together = outcome(linears(x, made), x, made)
    for one, other in zip(together, alone, strict=True):
        assert relative(one, other) <= 1e-5


def test_opcheck() -> None:
    x, U, Vh, scale = torch.randn(4, 5), [torch.randn(7, 3)] * 2, [torch.randn(3, 5)] * 2, [torch.rand(2, 3)] * 2
    torch.library.opcheck(torch.ops.svdiff.linear_group.default, (x, U, scale, Vh, [None, None], [1.0, 0.5], True))
    _, kept = ops.linear_group(x, U, scale, Vh, [None, None], alpha=[1.0, 0.5], scaled=True)
    arguments = ([torch.randn(4, 7)] * 2, kept, U, scale, Vh, [1.0, 0.5], True, True)
    torch.library.opcheck(torch.ops.svdiff.linear_group_backward.default, arguments)


def test_factors_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "fuses", lambda kind: True)
    made = layers()
    made[2].Vh.requires_grad_()
    with pytest.raises(ValueError, match="Vh"):
        linears(torch.randn(2, 23), made)
