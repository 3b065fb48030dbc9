"""The bank: one vector for a whole model, its gradient, adapters in it, and when the gains are refreshed."""

from __future__ import annotations

import copy

import pytest
import torch
from kernels.banked import Net, add, grads, make
from torch import Tensor, nn

from svdiff_kernels import Bank, SVDiffError
from svdiff_kernels.nn import SpectralLinear


def test_a_bank_changes_nothing() -> None:
    net = Net()
    for layer in net.layers().values():
        nn.init.normal_(layer.delta, std=0.2)
    x, direction = torch.randn(2, 5, 9, 8), torch.randn(2, 72, 7)
    expected = net(x)
    (expected * direction).sum().backward()
    each = {n: layer.delta.grad.clone() for n, layer in net.layers().items()}

    bank = Bank(net.layers(), net)
    assert torch.equal(net(x), expected)
    (net(x) * direction).sum().backward()
    matrices, one_dim = bank.trained
    assert torch.allclose(matrices.grad, torch.cat([each["conv"], each["linear"]]), rtol=1e-4, atol=1e-6)
    assert torch.allclose(one_dim.grad, torch.cat([each["norm"], each["last"]]), rtol=1e-4, atol=1e-6)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        "spectral_bank.matrices_default",
        "spectral_bank.one_dim_default",
    ]


def test_gains_are_computed_once_per_call_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    net, bank, x, _ = make()
    calls = []
    refresh = bank.refresh
    monkeypatch.setattr(bank, "refresh", lambda: calls.append(1) or refresh())
    net(x)
    net(x)
    assert len(calls) == 2
    net.conv(x)
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["delta", "mix", "adapter", "grad mode", "inference mode"])
def test_a_stale_gain_is_refreshed_on_read(change: str) -> None:
    net, bank, x, _ = make()
    bank.load_delta_dict("ink", {n: torch.randn(layer.rank) for n, layer in net.layers().items()})
    before = net.conv(x)
    if change == "delta":
        torch.optim.SGD(bank.trained, lr=1.0)
        with torch.no_grad():
            bank.trained[0].add_(0.5)
    elif change == "mix":
        bank.set_mix({"default": 0.5, "ink": 0.5})
    elif change == "adapter":
        bank.load_delta_dict("dog", {n: torch.randn(layer.rank) for n, layer in net.layers().items()})
        bank.set_mix({"dog": 1})
    elif change == "grad mode":
        with torch.no_grad():
            assert not net.conv(x).requires_grad
        assert net.conv(x).requires_grad
        return
    else:
        with torch.inference_mode():
            net.conv(x)
        net.conv(x).sum().backward()  # inference tensors cannot take part in this
        return
    after = net.conv(x)
    assert not torch.allclose(before, after)
    assert torch.equal(after, net.conv(x))


def test_two_losses_share_one_refresh() -> None:
    net, bank, x, direction = make()
    bank.ensure_fresh()
    losses = [(net.body(x) * direction).sum(), (net.body(2 * x) * direction).sum()]
    for loss in losses:
        loss.backward()
    shared = grads(bank)
    for factor in (1, 2):
        (net(factor * x) * direction).sum().backward()
    for a, b in zip(shared, grads(bank), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    net, bank, x, direction = make()
    x.requires_grad_()
    (net(x) * direction).sum().backward()
    expected = grads(bank)
    net.use_reentrant = use_reentrant
    (net(x) * direction).sum().backward()
    for a, b in zip(grads(bank), expected, strict=True):
        assert torch.equal(a, b)


def test_a_layer_left_out_of_the_loss_gets_zero() -> None:
    net, bank, x, _ = make()
    net.conv(x).sum().backward()
    matrices, one_dim = bank.trained
    assert matrices.grad[:12].any() and not matrices.grad[12:].any() and not one_dim.grad.any()


def test_no_gradient_at_and_below_the_kink() -> None:
    net, bank, x, direction = make()
    with torch.no_grad():
        net.conv.delta.copy_(-net.conv.sigma)
        net.linear.delta.copy_(-2 * net.linear.sigma)
        net.last.delta.copy_(-3 * net.last.sigma)
        net.norm.delta.copy_(-2 * net.norm.sigma)  # a vector has no floor
    (net(x) * direction).sum().backward()
    matrices, one_dim = bank.trained
    assert not matrices.grad.any() and torch.isfinite(one_dim.grad).all()
    net.body(x)
    with torch.no_grad():
        net.last.delta.zero_()
    (net(x) * direction).sum().backward()
    assert not matrices.grad.any() and one_dim.grad[:12].any()


def test_layers_show_their_slice() -> None:
    net, bank, x, _ = make()
    before = net(x)
    with torch.no_grad():
        net.linear.delta.add_(1)
        bank.trained[0][:12].mul_(2)
    assert not torch.allclose(net.body(x), before)
    for name, delta in bank.delta_dict("default").items():
        assert torch.equal(net.layers()[name].delta, delta)


def test_casting_and_moving_the_model() -> None:
    net, bank, x, _ = make()
    before = bank.delta_dict("default")
    y = net(x)
    net.to(torch.bfloat16)
    assert all(torch.equal(d, before[n]) for n, d in bank.delta_dict("default").items())
    assert bank.base.dtype == torch.float32
    assert net(x.bfloat16()).dtype == torch.bfloat16
    net.float()
    with torch.no_grad():
        net.linear.delta.zero_()
    assert not bank.delta_dict("default")["linear"].any()  # the view still is a view
    assert net(x).shape == y.shape
    assert net.double()(x.double()).dtype == torch.float64


def test_release_gives_the_layers_their_deltas_back() -> None:
    net, bank, x, _ = make()
    y = net(x)
    bank.release()
    assert not hasattr(net, "spectral_bank") and not net._forward_pre_hooks
    assert torch.equal(net(x), y)
    assert sum(p.requires_grad for p in net.parameters()) == 4
    Bank(net.layers(), net)
    assert torch.equal(net(x), y)


def test_a_copy_of_the_model_has_a_bank_of_its_own() -> None:
    net, bank, x, _ = make()
    y = net(x)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        bank.trained[0].zero_()
    assert torch.equal(twin(x), y) and not torch.allclose(net(x), y)


def test_state_dict_round_trip() -> None:
    net, _, _x, _ = make()
    other, _, _, _ = make()
    other.spectral_bank.load_state_dict(net.spectral_bank.state_dict())
    assert set(net.spectral_bank.state_dict()) == {"matrices_default", "one_dim_default"}
    assert torch.equal(other.linear.delta, net.linear.delta)


def test_without_root_and_without_norms() -> None:
    layers = {"a": SpectralLinear.from_module(nn.Linear(5, 3)), "b": SpectralLinear.from_module(nn.Linear(3, 4))}
    bank = Bank(layers)
    y = layers["b"](layers["a"](torch.randn(7, 5)))
    y.sum().backward()
    matrices, one_dim = bank.trained
    assert matrices.grad.any() and one_dim.numel() == 0
    torch.optim.AdamW(bank.parameters()).step()
    bank.release()


def test_trains() -> None:
    net, bank, x, _ = make()
    target = torch.randn(2, 72, 7)
    optimiser = torch.optim.AdamW(bank.trained, lr=3e-2, fused=True)
    losses = []
    for _ in range(30):
        loss = (net(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_sees_new_deltas_and_a_new_mix() -> None:
    net, bank, x, direction = make()
    bank.load_delta_dict("ink", {n: torch.randn_like(d) for n, d in bank.delta_dict("default").items()})
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(x)
    recompiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for mix in ({"default": 1.0}, {"ink": 1.0}, {"default": 0.3, "ink": 0.4}):
        bank.set_mix(mix)
        with torch.no_grad():
            bank.trained[0].mul_(1.1)
        (compiled(x) * direction).sum().backward()
        actual = grads(bank)
        y = net(x)
        (y * direction).sum().backward()
        assert torch.allclose(compiled(x), y, atol=1e-5)
        for a, b in zip(actual, grads(bank), strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == recompiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv": torch.zeros(11)}, "'conv' has shape"),
        ({"conv": torch.full((12,), float("nan"))}, "'conv' holds NaN"),
        ({"other": torch.zeros(3)}, "'other' belongs to no"),
        ({"conv": None}, "no delta, the first is 'conv'"),
    ],
)
def test_a_bad_delta_touches_nothing(change: dict[str, Tensor | None], message: str) -> None:
    _, bank, _, _ = make()
    before = bank.delta_dict("default")
    deltas = {n: torch.ones_like(d) for n, d in before.items()} | change
    deltas = {n: d for n, d in deltas.items() if d is not None}
    for name in ("default", "new"):
        with pytest.raises(SVDiffError, match=message):
            bank.load_delta_dict(name, deltas)
    assert bank.names == ("default",)
    assert all(torch.equal(d, before[n]) for n, d in bank.delta_dict("default").items())


def test_a_partial_delta_leaves_the_rest_at_zero() -> None:
    _, bank, _, _ = make()
    bank.load_delta_dict("part", {"conv": torch.ones(12)}, strict=False)
    assert {n for n, d in bank.delta_dict("part").items() if d.any()} == {"conv"}


def test_adapters_by_name() -> None:
    net, bank, _, _ = make()
    add(bank, "ink")
    bank.set_mix({"ink": 2.0})
    add(bank, "dog")
    assert bank.names == ("default", "ink", "dog") and bank.get_mix() == {"ink": 2.0}
    bank.remove("ink")
    assert bank.names == ("default", "dog") and bank.get_mix() == {}
    for call, message in [
        (lambda: bank.load_delta_dict("", {}, strict=False), "needs a name"),
        (lambda: bank.remove("ink"), "no adapter 'ink'"),
        (lambda: bank.remove("default"), "cannot be removed"),
        (lambda: bank.delta_dict("cat"), "no adapter 'cat'; there are: default, dog"),
        (lambda: bank.set_mix({"cat": 1}), "no adapter 'cat'"),
        (lambda: bank.set_mix({"dog": float("nan")}), "finite"),
        (lambda: bank.set_mix({"dog": {"conv": float("inf")}}), "finite"),
        (lambda: bank.set_mix({"dog": {"cone": 1}}), "'cone', which is no spectral layer"),
        (lambda: bank.make_mix({"dog": 1}, repeats=0), "an input at least"),
        (lambda: Bank({}), "at least one"),
        (lambda: Bank(net.layers()), "another bank"),
    ]:
        with pytest.raises(SVDiffError, match=message):
            call()
    assert bank.get_mix() == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_frozen_adapter_is_held_in_its_dtype(dtype: torch.dtype) -> None:
    net, bank, x, _ = make()
    wide = {name: 0.2 * torch.randn(layer.rank) for name, layer in net.layers().items()}
    half = {name: delta.to(dtype) for name, delta in wide.items()}
    bank.load_delta_dict("wide", wide)
    before = bank.delta_dict("wide")
    bank.load_delta_dict("half", half)
    assert all(torch.equal(delta, wide[name]) for name, delta in before.items())
    assert all(
        delta.dtype == dtype and torch.equal(delta, half[name]) for name, delta in bank.delta_dict("half").items()
    )
    assert sum(t.nbytes for t in bank.delta_dict("half").values()) * 2 == sum(t.nbytes for t in before.values())
    weights = {name: 0.5 + i for i, name in enumerate(net.layers())}
    rounded = {name: delta.float() for name, delta in half.items()}
    bank.load_delta_dict("rounded", rounded)
    for each in (1.0, 0.7, weights):
        bank.set_mix({"half": each})
        out = net(x)
        bank.set_mix({"rounded": each})
        assert torch.equal(out, net(x))
    with bank.mixed({"half": 0.7}):
        out = net(x)
    bank.set_mix({"rounded": 0.7})
    assert torch.equal(out, net(x))


def test_what_trains_and_what_is_mixed_is_wide() -> None:
    net, bank, _, _ = make()
    deltas = {name: torch.zeros(layer.rank, dtype=torch.float16) for name, layer in net.layers().items()}
    bank.load_delta_dict("default", deltas)
    assert all(p.dtype == torch.float32 for p in bank.trained)
    bank.load_delta_dict("both", deltas | {"conv": torch.zeros(net.conv.rank)})
    assert all(delta.dtype == torch.float32 for delta in bank.delta_dict("both").values())
