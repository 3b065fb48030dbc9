"""Layers of bf16 models whose factors are in fp16, as they are on a GPU; here a CPU is told to do the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numerics import relative
from torch import Tensor, nn

from svdiff_kernels import nn as snn
from svdiff_kernels import scaled

BF16, F16 = torch.bfloat16, torch.float16
EPS = torch.finfo(BF16).eps


@pytest.fixture(autouse=True)
def _like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (snn, scaled):
        monkeypatch.setattr(module, "factor_dtype", lambda dtype, device: F16 if dtype == BF16 else dtype)


def linear(gain: float = 1.0) -> tuple[nn.Module, Tensor]:
    module = nn.Linear(23, 29)
    module.weight.data.mul_(gain)
    return module, torch.randn(2, 7, 23)


def conv(gain: float = 1.0) -> tuple[nn.Module, Tensor]:
    module = nn.Conv2d(5, 9, 3, padding=1)
    module.weight.data.mul_(gain)
    return module, torch.randn(2, 5, 6, 7)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Embedding(31, 17), torch.randint(0, 31, (2, 5))


MAKERS = {"linear": linear, "conv": conv, "embedding": embedding}
KINDS: dict[type, Any] = {
    nn.Linear: snn.SpectralLinear,
    nn.Conv2d: snn.SpectralConv2d,
    nn.Embedding: snn.SpectralEmbedding,
}


def spectral(module: nn.Module, **how: Any) -> Any:
    layer = KINDS[type(module)].from_module(module, **how)
    layer.delta.data.uniform_(-0.1, 0.1)
    return layer


def cast(x: Tensor) -> Tensor:
    return x.to(BF16) if x.is_floating_point() else x


@pytest.mark.parametrize("how", [{}, {"rank": 4}, {"form": "recomposed"}], ids=["factored", "residual", "recomposed"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_layer_stays_itself(name: str, how: dict[str, Any]) -> None:
    module, x = MAKERS[name]()
    wide = spectral(module, **how)
    layer = copy.deepcopy(wide).to(BF16)
    assert layer.U.dtype == layer.Vh.dtype == F16
    assert layer.dtype == layer.weight.dtype == BF16
    y = layer(cast(x))
    assert y.dtype == BF16
    assert relative(y, wide(x)) <= 2 * EPS
    assert relative(layer.merge()(cast(x)), wide(x)) <= 2 * EPS
    assert relative(layer.factors().reconstruct(), wide.factors().reconstruct()) <= 2e-3


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("gain", [1.0, 300.0], ids=["small sigma", "large sigma"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e5])
def test_any_size_of_input(name: str, gain: float, size: float) -> None:
    """fp16 ends at 65504."""
    module, x = MAKERS[name](gain)
    wide = spectral(module)
    layer = copy.deepcopy(wide).to(BF16)
    x = (x * size).bfloat16()
    wide_x, half_x = x.float().requires_grad_(), x.requires_grad_()
    truth, y = wide(wide_x), layer(half_x)
    dy = torch.randn_like(truth)
    truth.backward(dy)
    y.backward(dy.bfloat16())
    assert relative(y, truth) <= 2 * EPS
    assert relative(half_x.grad, wide_x.grad) <= 2 * EPS
    assert relative(layer.delta.grad, wide.delta.grad) <= 2 * EPS


def test_small_shifts_act() -> None:
    """Each direction moves by its own shift, on average over many rows."""
    layer = snn.SpectralLinear.from_module(nn.Linear(160, 200).to(BF16))
    layer.delta.data.copy_(1e-3 * layer.sigma)
    x, f = torch.randn(4096, 160).bfloat16(), layer.factors()
    z = x.double() @ f.Vh.double().T
    with torch.no_grad():
        moved = layer(x).double()
        layer.delta.zero_()
        moved -= layer(x).double()
    acted = (moved @ f.U.double() * z).sum(0) / (z * z).sum(0) / (1e-3 * f.sigma)
    assert (acted - 1).abs().mean() <= 0.1


def test_casting_to_and_fro() -> None:
    module, x = linear()
    wide = spectral(module)
    layer = copy.deepcopy(wide).to(BF16)
    assert layer.alpha == 2.0**-6
    for _ in range(3):
        U = layer.U.clone()
        layer = layer.float()
        assert layer.alpha == 1 and layer.U.dtype == torch.float32
        layer = layer.to(BF16)
        assert torch.equal(layer.U, U)
    assert relative(layer.float()(x), wide(x)) <= 1e-3


def test_a_state_dict_holds_the_factors_themselves() -> None:
    module, x = linear()
    wide = spectral(module)
    layer = copy.deepcopy(wide).to(BF16)
    state = layer.state_dict()
    assert relative(state["U"], wide.U) <= 1e-3
    other = spectral(linear()[0])
    other.load_state_dict(state)
    assert relative(other(x), wide(x)) <= 1e-3
    third = spectral(linear()[0]).to(BF16)
    third.load_state_dict(state)
    assert torch.equal(third(cast(x)), layer(cast(x)))


def test_autocast_keeps_the_factors_finer() -> None:
    module, x = linear()
    layer = spectral(module)
    with torch.autocast("cpu", BF16):
        y = layer(x)
    assert y.dtype == BF16
    assert relative(y, layer(x)) <= EPS


def test_a_meta_layer_can_be_made_and_cast() -> None:
    layer = snn.SpectralLinear.from_module(nn.Linear(5, 7)).to("meta").to(BF16)
    assert layer.U.dtype == F16 and layer.U.is_meta
