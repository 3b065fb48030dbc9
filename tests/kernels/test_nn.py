"""The modules: they stand in for torch's own, keep their shifts in fp32, and merge back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numerics import relative
from torch import Tensor, nn

from svdiff_kernels import SVDiffError, decompose
from svdiff_kernels.nn import (
    SpectralConv2d,
    SpectralEmbedding,
    SpectralGroupNorm,
    SpectralLayerNorm,
    SpectralLinear,
    SpectralModule,
)

MATRICES: dict[str, tuple[Any, nn.Module, Tensor]] = {
    "linear": (SpectralLinear, nn.Linear(23, 29), torch.randn(3, 7, 23)),
    "linear without bias": (SpectralLinear, nn.Linear(29, 17, bias=False), torch.randn(5, 29)),
    "conv": (SpectralConv2d, nn.Conv2d(5, 13, 3, stride=2, padding=1), torch.randn(2, 5, 27, 18)),
    "conv circular": (
        SpectralConv2d,
        nn.Conv2d(5, 13, (3, 5), padding=(1, 2), padding_mode="circular"),
        torch.randn(2, 5, 9, 8),
    ),
    "conv same": (SpectralConv2d, nn.Conv2d(5, 7, 3, padding="same", dilation=2), torch.randn(2, 5, 9, 8)),
    "conv grouped": (SpectralConv2d, nn.Conv2d(6, 9, 3, groups=3, bias=False), torch.randn(2, 6, 9, 8)),
    "embedding": (SpectralEmbedding, nn.Embedding(31, 11, padding_idx=3), torch.randint(0, 31, (3, 5))),
}
NORMS: dict[str, tuple[Any, nn.Module, Tensor]] = {
    "layer norm": (SpectralLayerNorm, nn.LayerNorm(23), torch.randn(3, 7, 23)),
    "layer norm 2-D": (SpectralLayerNorm, nn.LayerNorm((7, 5), bias=False), torch.randn(3, 7, 5)),
    "group norm": (SpectralGroupNorm, nn.GroupNorm(3, 12), torch.randn(2, 12, 5, 7)),
}
ALL = MATRICES | NORMS


def randomised(name: str) -> tuple[Any, nn.Module, Tensor]:
    kind, module, x = ALL[name]
    module = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return kind, module, x


def moved(layer: SpectralModule) -> SpectralModule:
    with torch.no_grad():
        layer.delta.copy_(0.4 * torch.randn_like(layer.delta) * layer.sigma)
    return layer


@pytest.mark.parametrize("name", ALL)
def test_starts_as_the_original(name: str) -> None:
    kind, module, x = randomised(name)
    layer = kind.from_module(module)
    assert relative(layer(x), module(x)) <= 1e-5
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["delta"]


@pytest.mark.parametrize("mode", ["vector", "scalar"])
@pytest.mark.parametrize("name", NORMS)
def test_norm_modes(name: str, mode: str) -> None:
    kind, module, x = randomised(name)
    layer = moved(kind.from_module(module, mode=mode))
    w = module.weight
    assert layer.one_dim and layer.form == mode
    assert layer.rank == (w.numel() if mode == "vector" else 1)
    with torch.no_grad():
        if mode == "vector":
            module.weight.copy_(w + layer.delta.view_as(w))
        else:
            module.weight.copy_(torch.relu(w.norm() + layer.delta) * w / w.norm())
    assert relative(layer(x), module(x)) <= 1e-6
    assert torch.allclose(layer.merge()(x), layer(x), atol=1e-6)
    layer(x).square().sum().backward()
    assert torch.isfinite(layer.delta.grad).all() and layer.delta.grad.any()


def test_scalar_norm_cut_off_gets_no_gradient() -> None:
    layer = SpectralLayerNorm.from_module(nn.LayerNorm(23), mode="scalar")
    nn.init.constant_(layer.delta, -100)
    layer(torch.randn(5, 23)).square().sum().backward()
    assert not layer.delta.grad.any()


def test_norm_shifts_act_in_half_precision() -> None:
    norm = nn.LayerNorm(64)
    layer = SpectralLayerNorm.from_module(norm).bfloat16()
    x = torch.randn(4096, 64).bfloat16()
    nn.init.constant_(layer.delta, 1e-3)  # an eighth of a bf16 step at 1
    gained = (layer(x).double() / norm.double()(x.double())).median()
    ratio = ((layer(x).double() * norm(x.double())).sum() / norm(x.double()).square().sum()).item()
    assert ratio == pytest.approx(1.001, abs=2e-4) and gained > 0
    assert layer(x).dtype == layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["factored", "residual", "recomposed"])
@pytest.mark.parametrize("name", MATRICES)
def test_forms_agree_and_merge(name: str, form: str) -> None:
    kind, module, x = randomised(name)
    if "grouped" in name and form != "recomposed":
        with pytest.raises(SVDiffError, match="grouped"):
            kind.from_module(module, form=form)
        return
    layer = moved(kind.from_module(module, form=form))
    f = decompose(module.weight)
    module = copy.deepcopy(module)  # the residual form shares the weight
    with torch.no_grad():
        W = (f.U * torch.relu(f.sigma + layer.delta)) @ f.Vh
        module.weight.copy_(W.view_as(module.weight))
    y, merged = layer(x), layer.merge()
    assert type(merged) is type(module)
    assert relative(y, module(x)) <= 1e-5
    assert relative(merged(x), y) <= 1e-5
    assert relative(layer.shifted(), torch.relu(f.sigma + layer.delta)) <= 1e-6
    assert (layer.base is not None) == (form == "residual")
    assert {n for n, _ in layer.named_buffers()} - {"base"} == {"sigma", "U", "Vh"}


@pytest.mark.parametrize("name", ["linear", "conv", "embedding"])
def test_auto_form_follows_the_rank(name: str) -> None:
    kind, module, x = randomised(name)
    assert kind.from_module(module).form == "factored"
    layer = kind.from_module(module, rank=4)
    assert layer.form == "residual" and layer.rank == 4
    assert torch.equal(layer(x), module(x))
    given = kind.from_module(module, factors=decompose(module.weight), rank=4)
    assert torch.equal(given.U, layer.U)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_casting_leaves_the_shifts_alone(name: str, dtype: torch.dtype) -> None:
    kind, module, x = randomised(name)
    layer = moved(kind.from_module(module))
    sigma, delta = layer.sigma.clone(), layer.delta.detach().clone()
    layer.delta.grad = torch.rand_like(layer.delta)
    x = x.to(dtype) if x.is_floating_point() else x
    for cast in (lambda m: m.to(dtype), lambda m: m.float().to(dtype), lambda m: nn.Sequential(m).to("cpu", dtype)[0]):
        layer = cast(layer)
        assert torch.equal(layer.sigma, sigma) and torch.equal(layer.delta, delta)
        assert layer.delta.grad.dtype == torch.float32
        assert layer.weight.dtype == dtype
        if name in MATRICES:
            assert layer.U.dtype == layer.Vh.dtype == dtype
        assert layer(x).dtype == dtype
        assert layer.merge().weight.dtype == dtype
    assert layer.double().sigma.dtype == layer.delta.dtype == torch.float64


@pytest.mark.parametrize("name", ALL)
def test_fp64_throughout(name: str) -> None:
    kind, module, x = randomised(name)
    module = module.double()
    layer = kind.from_module(module)
    assert layer.delta.dtype == torch.float64
    x = x.double() if x.is_floating_point() else x
    assert relative(layer(x), module(x)) <= 1e-12


def test_attributes_that_callers_read() -> None:
    for name, attributes in {
        "linear": ["in_features", "out_features", "bias"],
        "conv": [
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ],
        "embedding": ["num_embeddings", "embedding_dim", "padding_idx"],
        "layer norm": ["normalized_shape", "eps", "bias"],
        "group norm": ["num_groups", "num_channels", "eps", "bias"],
    }.items():
        kind, module, _ = randomised(name)
        layer = kind.from_module(module)
        for attribute in attributes:
            expected, actual = getattr(module, attribute), getattr(layer, attribute)
            assert torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected
        assert layer.weight.shape == module.weight.shape
        assert "rank" in repr(layer) or name.endswith("norm")


def test_weight_is_only_recomposed_when_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(23, 29)
    layer = SpectralLinear.from_module(module)
    calls = []
    recompose = SpectralLinear.recomposed_weight
    monkeypatch.setattr(SpectralLinear, "recomposed_weight", lambda self: calls.append(1) or recompose(self))
    weight = layer.weight
    assert weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.shape == (29, 23)
    assert weight.ndim == 2 and weight.size(0) == 29 and weight.numel() == 667 and len(weight) == 29
    assert not calls
    assert torch.allclose(weight + 0, module.weight, atol=1e-6)
    assert torch.allclose(weight[3], module.weight[3], atol=1e-6)
    assert len(calls) == 2
    nn.functional.linear(torch.randn(5, 23), layer.weight).sum().backward()
    assert layer.delta.grad.any()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_modules() -> None:
    model = nn.Sequential(
        SpectralConv2d.from_module(nn.Conv2d(5, 13, 3, padding=1)),
        SpectralGroupNorm.from_module(nn.GroupNorm(1, 13)),
        nn.Flatten(2),
        SpectralLinear.from_module(nn.Linear(63, 7)),
        SpectralLayerNorm.from_module(nn.LayerNorm(7), mode="scalar"),
    )

    class ReadsDtype(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.to(self.inner[0].weight.dtype))

    x = torch.randn(2, 5, 9, 7)
    reader = ReadsDtype()
    y = torch.compile(reader, fullgraph=True, backend="aot_eager")(x)
    y.square().sum().backward()
    compiled = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    reader(x).square().sum().backward()
    for a, p in zip(compiled, (p for p in model.parameters() if p.requires_grad), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-3, atol=1e-5)


def test_state_dict_round_trip_and_copies() -> None:
    _, module, x = randomised("linear")
    layer = moved(SpectralLinear.from_module(module))
    other = SpectralLinear.from_module(nn.Linear(23, 29))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_what_cannot_be_made_spectral_says_so() -> None:
    with pytest.raises(SVDiffError, match="do not belong"):
        SpectralLinear.from_module(nn.Linear(3, 4), factors=decompose(torch.randn(4, 5)))
    with pytest.raises(SVDiffError, match="form"):
        SpectralLinear.from_module(nn.Linear(3, 4), form="dense")
    with pytest.raises(SVDiffError, match="max_norm"):
        SpectralEmbedding.from_module(nn.Embedding(3, 4, max_norm=1.0))
    with pytest.raises(SVDiffError, match="without a weight"):
        SpectralLayerNorm.from_module(nn.LayerNorm(3, elementwise_affine=False))
    with pytest.raises(SVDiffError, match="mode"):
        SpectralGroupNorm.from_module(nn.GroupNorm(1, 3), mode="matrix")
    bad = nn.LayerNorm(3)
    nn.init.constant_(bad.weight, float("nan"))
    with pytest.raises(SVDiffError, match="NaN"):
        SpectralLayerNorm.from_module(bad)
    nan = nn.Linear(3, 4)
    nn.init.constant_(nan.weight, float("inf"))
    with pytest.raises(SVDiffError, match="NaN or inf"):
        SpectralLinear.from_module(nan)
