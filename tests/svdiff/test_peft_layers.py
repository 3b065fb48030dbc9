"""Each kind of layer of svdiff.peft against fp64 by LAPACK's SVD: forms, kinks, merging, dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import EXACT, relative
from peft import inject_adapter_in_model
from svdiff.peft import SVDiffConfig, SVDiffLayer
from tiny_peft import shifted
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdiff_kernels import SVDiffError


def _conv(**changes: Any) -> nn.Conv2d:
    return nn.Conv2d(6, 10, (3, 2), **{"stride": (2, 1), "padding": (1, 2), **changes})


def _conv1d() -> Conv1D:
    layer = Conv1D(11, 7)  # outputs, inputs
    nn.init.normal_(layer.weight, std=0.5)
    nn.init.normal_(layer.bias)
    return layer


BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(7, 11),
    "wide": lambda: nn.Linear(13, 5, bias=False),
    "conv1d": _conv1d,
    "conv": _conv,
    "reflected": lambda: _conv(padding_mode="reflect", padding=1),
    "dilated": lambda: _conv(dilation=2, padding="same", stride=1, bias=False),
    "grouped": lambda: _conv(groups=2),
    "embedding": lambda: nn.Embedding(17, 6, padding_idx=3),
}
KINDS = list(BASES)


def x_for(base: nn.Module, samples: int = 4) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    if isinstance(base, nn.Embedding):
        return torch.randint(0, 17, (samples, 3), generator=rng)
    if isinstance(base, nn.Conv2d):
        return torch.randn(samples, 6, 8, 9, generator=rng)
    return torch.randn(samples, 3, base.in_features if isinstance(base, nn.Linear) else 7, generator=rng)


def wrapped(kind: str, adapters: tuple[str, ...] = ("default",), **changes: Any) -> tuple[SVDiffLayer, nn.Module]:
    """One of our layers with random shifts, and a copy of what it wraps."""
    base = BASES[kind]()
    holder = nn.ModuleDict({"base": base, "other": nn.Linear(2, 2)})
    plain = copy.deepcopy(base)
    for name in adapters:
        config = SVDiffConfig(**{"target_modules": ["base"], "init_weights": False, **changes})
        inject_adapter_in_model(config, holder, name)
    layer = holder["base"]
    assert isinstance(layer, SVDiffLayer)
    layer.set_adapter(list(adapters))
    return layer, plain


def truth(plain: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the base layer gives with another weight, in fp64."""
    plain = copy.deepcopy(plain).double()
    plain.weight.data = weight.double()
    return plain(x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("form", ["factored", "residual"])
@pytest.mark.parametrize("parametrization", ["shift", "scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_that_of_the_shifted_weight(kind: str, parametrization: str, form: str) -> None:
    layer, plain = wrapped(kind, form=form, parametrization=parametrization)
    with torch.no_grad():
        layer.svdiff_delta["default"][-1] = -100.0  # far below the kink
    x = x_for(plain)
    assert relative(layer(x), truth(plain, shifted(layer, "default"), x)) < EXACT[torch.float32]
    assert relative(layer(x), truth(plain, plain.weight, x)) > 0.01  # or nothing was tested


@pytest.mark.parametrize("kind", KINDS)
def test_at_zero_it_is_the_base(kind: str) -> None:
    layer, plain = wrapped(kind, init_weights=True)
    x = x_for(plain)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    residual, plain = wrapped(kind, init_weights=True, form="residual")
    assert torch.equal(residual(x), plain(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_lower_rank_moves_the_largest_singular_values(kind: str) -> None:
    layer, plain = wrapped(kind, rank=2)
    assert layer.form == "residual" and layer.svdiff_delta["default"].shape == (2,)
    x = x_for(plain)
    assert relative(layer(x), truth(plain, shifted(layer, "default"), x)) < EXACT[torch.float32]
    assert wrapped(kind, rank=999)[0].form == "factored"


@pytest.mark.parametrize("kind", KINDS)
def test_active_adapters_add_up_inside_the_relu(kind: str) -> None:
    layer, plain = wrapped(kind, ("a", "b"))
    with torch.no_grad():
        layer.svdiff_delta["a"][0], layer.svdiff_delta["b"][0] = -50.0, 49.9
        layer.svdiff_delta["a"][1], layer.svdiff_delta["b"][1] = -50.0, 49.0
    layer.set_scale("b", 1.01)
    x = x_for(plain)
    assert relative(layer(x), truth(plain, shifted(layer, "a", "b"), x)) < 1e-4
    layer.set_adapter("b")
    assert relative(layer(x), truth(plain, shifted(layer, "b"), x)) < EXACT[torch.float32]


def test_scales() -> None:
    layer, plain = wrapped("linear", ("a", "b"))
    layer.set_adapter("a")
    layer.scale_layer(3.0)
    layer.scale_layer(0.5)
    assert layer.scaling == {"a": 1.5, "b": 1.0}
    x = x_for(plain)
    assert relative(layer(x), truth(plain, shifted(layer, "a"), x)) < EXACT[torch.float32]
    layer.unscale_layer(0.5)
    assert layer.scaling["a"] == 3.0
    layer.unscale_layer()
    assert layer.scaling["a"] == 1.0
    layer.set_scale("absent", 2.0)
    assert layer.scaling == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("form", ["factored", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_shifted_weight(kind: str, form: str) -> None:
    layer, plain = wrapped(kind, form=form)
    x = x_for(plain)
    if x.is_floating_point():
        x.requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(dy)

    weight = layer.matrix().double()
    U, sigma, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    delta = layer.svdiff_delta["default"].detach().double().requires_grad_()
    W = layer._oriented(((U * torch.relu(sigma + delta)) @ Vh).view(weight.shape))
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    plain = copy.deepcopy(plain).double().requires_grad_(False)
    torch.func.functional_call(plain, {"weight": W}, (x64,)).backward(dy.double())
    assert layer.svdiff_delta["default"].grad is not None and delta.grad is not None
    assert relative(layer.svdiff_delta["default"].grad, delta.grad) < 1e-4
    if x.is_floating_point():
        assert relative(x.grad, x64.grad) < EXACT[torch.float32]
    assert layer.get_base_layer().weight.grad is None


@pytest.mark.parametrize("kind", ["linear", "conv", "conv1d"])
def test_a_bias_that_learns_has_a_gradient(kind: str) -> None:
    for form in ("factored", "residual"):
        layer, plain = wrapped(kind, form=form)
        layer.bias.requires_grad_(True)
        x = x_for(plain)
        y = layer(x)
        assert relative(y, truth(plain, shifted(layer, "default"), x)) < EXACT[torch.float32]
        y.sum().backward()
        outputs = len(layer.bias)
        torch.testing.assert_close(layer.bias.grad, torch.full((outputs,), float(y.numel() // outputs)))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_back(kind: str) -> None:
    layer, plain = wrapped(kind, ("a", "b"))
    layer.set_adapter("a")
    x = x_for(plain)
    layer.merge()
    assert layer.merged_adapters == ["a"]
    assert relative(layer.weight.detach(), shifted(layer, "a")) < EXACT[torch.float32]
    assert relative(layer(x), truth(plain, shifted(layer, "a"), x)) < EXACT[torch.float32]
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]
    assert relative(layer.weight.detach(), shifted(layer, "a", "b")) < EXACT[torch.float32]
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, plain.weight)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merging_an_adapter_that_the_layer_lacks_does_nothing() -> None:
    layer, plain = wrapped("linear")
    layer.merge(adapter_names=["elsewhere"])
    assert not layer.merged and torch.equal(layer.weight, plain.weight)


def test_merged_layers_can_be_cast_and_unmerged() -> None:
    layer, plain = wrapped("linear")
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.weight, plain.weight.to(torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_safe_merge_refuses_what_is_not_finite(kind: str, value: float) -> None:
    layer, plain = wrapped(kind)
    with torch.no_grad():
        layer.svdiff_delta["default"][1] = value
    with pytest.raises(SVDiffError, match=r"NaNs detected in the merged weights\. The adapter default"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(layer.weight, plain.weight)
    layer.merge()
    assert not torch.isfinite(layer.weight).all()
    layer.unmerge()
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_weight_is_what_one_adapter_changes(kind: str) -> None:
    layer, plain = wrapped(kind, ("a", "b"))
    layer.set_scale("a", 0.7)
    change = layer.get_delta_weight("a")
    assert change.dtype == torch.float32 and change.shape == plain.weight.shape
    assert relative(change, shifted(layer, "a") - plain.weight.double()) < EXACT[torch.float32]
    layer.merge()
    assert torch.equal(layer.get_delta_weight("a"), change)  # of the base's weight, not of the merged one
    with pytest.raises(SVDiffError, match="no adapter 'c', only a, b"):
        layer.get_delta_weight("c")


@pytest.mark.parametrize("kind", KINDS)
def test_one_name_for_each_sample(kind: str) -> None:
    layer, plain = wrapped(kind, ("a", "b"))
    x = x_for(plain)
    names = ["b", "__base__", "a", "b"]
    y = layer(x, adapter_names=names)
    for i, name in enumerate(names):
        weight = plain.weight if name == "__base__" else shifted(layer, name)
        assert relative(y[i : i + 1], truth(plain, weight, x[i : i + 1])) < EXACT[torch.float32]
    shared = layer(x[:1], adapter_names=names)  # as the ids of positions are
    for i, name in enumerate(names):
        weight = plain.weight if name == "__base__" else shifted(layer, name)
        assert relative(shared[i : i + 1], truth(plain, weight, x[:1])) < EXACT[torch.float32]
    assert torch.equal(layer(x, adapter_names=["elsewhere"] * 4), plain(x))
    with pytest.raises(SVDiffError, match="same as the number of inputs, but got 3 and 4"):
        layer(x, adapter_names=names[:3])
    layer.merge()
    with pytest.raises(SVDiffError, match="merged adapters"):
        layer(x, adapter_names=names)


def test_samples_of_several_adapters_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from svdiff.peft import layer as module

    layer, plain = wrapped("linear", ("a", "b"))
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor, delta: Tensor, *rest: Any, **more: Any) -> Tensor:
        calls.append(tuple(delta.shape))
        return spectral_linear(x, U, sigma, Vh, delta, *rest, **more)

    spectral_linear = module.spectral_linear
    monkeypatch.setattr(module, "spectral_linear", counted)
    layer(x_for(plain), adapter_names=["a", "b", "__base__", "a"])
    assert calls == [(4, 7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_the_shifts_stay_in_fp32(kind: str, dtype: torch.dtype) -> None:
    layer, plain = wrapped(kind, form="residual")
    layer.to(dtype)
    factors = layer.factors()
    assert (factors.U.dtype, factors.sigma.dtype, factors.Vh.dtype) == (dtype, torch.float32, dtype)
    assert layer.svdiff_delta["default"].dtype == torch.float32
    x = x_for(plain)
    x = x.to(dtype) if x.is_floating_point() else x
    y = layer(x)
    exact = truth(plain, shifted(layer, "default"), x)
    dense = copy.deepcopy(plain).double()
    dense.weight.data = shifted(layer, "default")
    assert y.dtype == dtype and relative(y, exact) < 3 * relative(dense.to(dtype)(x), exact)
    y.float().square().sum().backward()
    assert layer.svdiff_delta["default"].grad.dtype == torch.float32
    layer.float()
    assert layer.factors().U.dtype == torch.float32


def test_a_base_in_half_precision_gets_shifts_in_fp32() -> None:
    holder = nn.ModuleDict({"base": nn.Linear(7, 11)}).bfloat16()
    inject_adapter_in_model(SVDiffConfig(target_modules=["base"]), holder, "default")
    layer: Any = holder["base"]
    assert layer.svdiff_delta["default"].dtype == torch.float32 and layer.factors().U.dtype == torch.bfloat16


def test_fp64_is_fp64_throughout() -> None:
    holder = nn.ModuleDict({"base": nn.Linear(7, 11)}).double()
    inject_adapter_in_model(SVDiffConfig(target_modules=["base"], init_weights=False), holder, "default")
    layer: Any = holder["base"]
    plain = layer.base_layer
    x = torch.randn(4, 7, dtype=torch.float64)
    assert relative(layer(x), truth(plain, shifted(layer, "default"), x)) < EXACT[torch.float64]


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_under_autocast(kind: str) -> None:
    layer, plain = wrapped(kind)
    x = x_for(plain)
    with torch.autocast("cpu", torch.bfloat16):
        y, y_plain = layer(x), plain(x)
    assert y.dtype == y_plain.dtype
    assert relative(y, truth(plain, shifted(layer, "default"), x)) < 0.02
    y.float().sum().backward()
    assert layer.svdiff_delta["default"].grad.dtype == torch.float32


def test_the_scale_of_an_embedding_is_kept() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return F.embedding(ids, self.weight) * self.embed_scale

    holder = nn.ModuleDict({"base": Scaled(17, 6)})
    inject_adapter_in_model(SVDiffConfig(target_modules=["base"], init_weights=False), holder, "default")
    layer: Any = holder["base"]
    x = torch.arange(5)
    assert relative(layer(x), 3 * shifted(layer, "default")[x]) < EXACT[torch.float32]


def test_the_decomposition_is_in_no_state_dict_and_follows_the_weight() -> None:
    layer, _ = wrapped("linear")
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "svdiff_delta.default"}
    assert not list(layer.buffers())
    before = layer.factors()
    layer.load_state_dict(layer.state_dict())
    assert layer.factors().U.equal(before.U)
    other = nn.Linear(7, 11).state_dict()
    state = {f"base_layer.{key}": value for key, value in other.items()}
    layer.load_state_dict(state, strict=False)
    assert relative(layer.factors().reconstruct(), other["weight"]) < 1e-5  # of the weight that is there now
    kept = layer.factors()
    layer.load_state_dict({"svdiff_delta.default": torch.ones(7)}, strict=False)
    assert layer.factors() is kept


def test_a_copy_computes_the_same() -> None:
    layer, plain = wrapped("linear")
    x = x_for(plain)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.svdiff_delta["default"].zero_()
    assert not torch.equal(twin(x), layer(x))


def test_a_model_without_values_is_decomposed_when_it_has_some() -> None:
    plain = nn.Linear(7, 11)
    with torch.device("meta"):
        holder = nn.ModuleDict({"base": nn.Linear(7, 11)})
    inject_adapter_in_model(SVDiffConfig(target_modules=["base"]), holder, "default")
    layer: Any = holder["base"]
    assert not layer.has_factors
    with pytest.raises(SVDiffError, match="meta"):
        layer.factors()
    state = {f"base.base_layer.{key}": value for key, value in plain.state_dict().items()}
    holder.load_state_dict(state | {"base.svdiff_delta.default": torch.full((7,), 0.1)}, assign=True)
    x = torch.randn(4, 7)
    assert relative(layer(x), truth(plain, shifted(layer, "default"), x)) < EXACT[torch.float32]


def test_compiled_in_one_graph(fresh_dynamo: None) -> None:
    layer, plain = wrapped("linear", ("a", "b"))
    x = x_for(plain)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert relative(compiled(x), truth(plain, shifted(layer, "a", "b"), x)) < EXACT[torch.float32]


def test_what_is_told_of_a_layer() -> None:
    sizes = {kind: (layer.in_features, layer.out_features) for kind in KINDS for layer in wrapped(kind)[:1]}
    assert sizes["wide"] == (13, 5) and sizes["conv1d"] == (7, 11) and sizes["conv"] == (6, 10)
    assert sizes["embedding"] == (17, 6)
    assert repr(wrapped("linear", rank=3)[0]).startswith("svdiff.Linear(\n  rank=3, form=residual\n  (base_layer): ")
