"""The rivals compute what they claim to."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from benchmarks import baselines
from svdiff_kernels.nn import SpectralConv2d, SpectralLinear


@pytest.mark.parametrize("way", get_args(baselines.Way))
def test_recomposition_is_the_same_function_as_the_spectral_layers(way: baselines.Way) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(5, 7, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(12, 9))
    layers = {"0": SpectralConv2d.from_module(plain[0]), "2": SpectralLinear.from_module(plain[2])}
    naive = plain.requires_grad_(False)
    shifts = baselines.recompose(naive, layers, way)
    spectral = nn.Sequential(layers["0"], nn.Flatten(2), layers["2"])
    with torch.no_grad():
        for shift, layer in zip(shifts, layers.values(), strict=True):
            shift.copy_(0.1 * torch.randn_like(shift))
            layer.delta.copy_(shift)
    x = torch.randn(2, 5, 6, 8)
    ours, theirs = spectral(x), naive(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for shift, layer in zip(shifts, layers.values(), strict=True):
        torch.testing.assert_close(layer.delta.grad, shift.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("way", "kept"), [("diag", True), ("broadcast", False)])
def test_only_the_way_of_existing_code_keeps_the_weight(way: baselines.Way, kept: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(7, 5)}).requires_grad_(False)
    weight = model["a"].weight
    baselines.recompose(model, {"a": SpectralLinear.from_module(model["a"])}, way)
    assert any(parameter is weight for parameter in model.parameters()) == kept


def test_lora_starts_as_the_base_and_trains_two_matrices_a_layer() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(7, 5), "b": nn.Conv2d(3, 4, 3)}).requires_grad_(False)
    x, before = torch.randn(2, 7), model["a"](torch.ones(2, 7))
    trained = baselines.add_lora(model, ["a", "b"], 2)
    assert sum(p.numel() for p in trained) == 2 * (7 + 5) + 2 * (3 * 9 + 4)
    torch.testing.assert_close(model["a"](torch.ones(2, 7)), before)
    model["a"](x).sum().backward()
    assert any(p.grad is not None for p in trained)
