"""The bank: one vector for a whole model, adapters, mix, and when the gains are refreshed."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svdiff_kernels import Bank, SVDiffError
from svdiff_kernels.mix import Weight
from svdiff_kernels.nn import SpectralConv2d, SpectralGroupNorm, SpectralLayerNorm, SpectralLinear, SpectralModule


class Net(nn.Module):
    """Every kind of layer: factored, residual, both norm modes; optionally checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SpectralConv2d.from_module(nn.Conv2d(5, 12, 3, padding=1))
        self.norm = SpectralGroupNorm.from_module(nn.GroupNorm(3, 12))
        self.linear = SpectralLinear.from_module(nn.Linear(12, 7), rank=3)
        self.last = SpectralLayerNorm.from_module(nn.LayerNorm(7), mode="scalar")
        self.use_reentrant: bool | None = None

    def layers(self) -> dict[str, SpectralModule]:
        return {n: m for n, m in self.named_modules() if isinstance(m, SpectralModule)}

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.linear(self.norm(self.conv(x)).flatten(2).transpose(1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def make() -> tuple[Net, Bank, Tensor, Tensor]:
    """A model with a bank, its input, and a direction for the loss."""
    net = Net()
    for layer in net.layers().values():
        nn.init.normal_(layer.delta, std=0.2)
    return net, Bank(net.layers(), net), torch.randn(2, 5, 9, 8), torch.randn(2, 72, 7)


def grads(bank: Bank) -> list[Tensor]:
    out = [p.grad.clone() for p in bank.trained]
    bank.zero_grad()
    return out


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


def test_mix_adds_before_the_floor() -> None:
    net, bank, _x, _ = make()
    a = bank.delta_dict("default")
    b = {n: torch.randn_like(d) for n, d in a.items()}
    bank.load_delta_dict("ink", b)
    bank.set_mix({"default": 0.7, "ink": -1.5})
    for name, layer in net.layers().items():
        shifted = layer.sigma + 0.7 * a[name] - 1.5 * b[name]
        expected = shifted if layer.form == "vector" else shifted.clamp_min(0)
        assert torch.allclose(bank.scales[name], expected, atol=1e-5)
    assert bank.get_mix() == pytest.approx({"default": 0.7, "ink": -1.5})


def test_gradient_follows_the_mix_of_the_forward_pass() -> None:
    net, bank, x, direction = make()
    bank.load_delta_dict("ink", {n: torch.zeros_like(d) for n, d in bank.delta_dict("default").items()})
    (net(x) * direction).sum().backward()
    whole = grads(bank)
    with torch.no_grad():
        for p in bank.trained:
            p.mul_(2)
    bank.set_mix({"default": 0.5, "ink": 1})
    loss = (net(x) * direction).sum()
    bank.set_mix({})
    loss.backward()
    for half, one in zip(grads(bank), whole, strict=True):
        assert torch.allclose(half, one / 2, rtol=1e-4, atol=1e-6)


def test_an_empty_mix_is_the_base_model() -> None:
    net, bank, x, _ = make()
    bank.set_mix({})
    base = net(x)
    bank.set_mix({"default": 1})
    with torch.no_grad():
        for p in bank.trained:
            p.zero_()
    assert torch.equal(net(x), base)


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


SAMPLES = [{"ink": 1.0}, {}, {"default": 0.7, "ink": -1.5}]


def add(bank: Bank, name: str) -> None:
    bank.load_delta_dict(name, {n: 0.3 * torch.randn_like(d) for n, d in bank.delta_dict("default").items()})


@pytest.mark.parametrize("each", [1, 2], ids=["a sample each", "two rows a sample"])
def test_samples_with_mixes_of_their_own_compute_what_each_would_alone(each: int) -> None:
    net, bank, _, _ = make()
    add(bank, "ink")
    x, direction = torch.randn(3 * each, 5, 9, 8), torch.randn(3 * each, 72, 7)
    alone, expected = [], None
    for mix, part, d in zip(SAMPLES, x.chunk(3), direction.chunk(3), strict=True):
        bank.set_mix(mix)
        alone.append(net(part))
        (alone[-1] * d).sum().backward()
    expected = grads(bank)
    bank.set_mix(bank.make_mix(SAMPLES, repeats=each))
    together = net(x)
    torch.testing.assert_close(together, torch.cat(alone))
    (together * direction).sum().backward()
    for actual, wanted in zip(grads(bank), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert bank.get_mix() == pytest.approx({"default": 0.7, "ink": -1.5})


def test_a_batch_may_hold_all_samples_several_times() -> None:
    net, bank, _, _ = make()
    add(bank, "ink")
    x = torch.randn(6, 5, 9, 8)
    bank.set_mix(bank.make_mix(SAMPLES, repeats=2))
    once = net(x)
    torch.testing.assert_close(net(torch.cat([x, x.flip(0), x])), torch.cat([once, net(x.flip(0)), once]))
    torch.testing.assert_close(net(x=x), once)


def test_mixes_of_samples_survive_adding_and_removing_adapters() -> None:
    net, bank, _, _ = make()
    add(bank, "ink")
    x = torch.randn(3, 5, 9, 8)
    bank.set_mix(SAMPLES)
    expected = net(x)
    add(bank, "dog")
    torch.testing.assert_close(net(x), expected)
    bank.remove("dog")
    torch.testing.assert_close(net(x), expected)
    bank.remove("ink")
    assert bank.get_mix() == {"default": 0.7}
    torch.testing.assert_close(net(x)[2:], alone(net, bank, {"default": 0.7}, x[2:]))


def test_mixes_of_samples_have_no_one_weight_and_must_split_the_batch() -> None:
    net, bank, _, _ = make()
    add(bank, "ink")
    bank.set_mix(SAMPLES)
    bank.refresh()
    for layer in (net.conv, net.norm):
        with pytest.raises(SVDiffError, match="no one weight"):
            layer.merge()
        with pytest.raises(SVDiffError, match="3 inputs does not split a first dimension of 2"):
            layer(torch.randn(2, 12, 5, 5))
    with pytest.raises(SVDiffError, match="3 samples does not split a batch of 2"):
        net(torch.randn(2, 5, 9, 8))
    bank.set_mix(bank.make_mix(SAMPLES, repeats=2))
    with pytest.raises(SVDiffError, match="3 samples with 2 inputs each does not split a batch of 9"):
        net(torch.randn(9, 5, 9, 8))
    with pytest.raises(SVDiffError, match="no samples"):
        bank.set_mix([])


def test_samples_with_the_same_mix_share_one() -> None:
    net, bank, x, _ = make()
    bank.set_mix([{"default": 0.5}] * 3)
    bank.refresh()
    assert net.conv.merge().weight.shape == (12, 5, 3, 3)
    assert net(x).shape == (2, 72, 7)


def alone(net: Net, bank: Bank, mix: dict[str, Weight], x: Tensor) -> Tensor:
    """What the model makes of x with this mix for all; the bank's own comes back."""
    with bank.mixed(mix):
        return net(x)


def test_weights_of_layers() -> None:
    net, bank, x, _ = make()
    add(bank, "ink")
    ink = bank.delta_dict("ink")
    halved = {"conv": ink["conv"] / 2, "linear": ink["linear"]}
    bank.load_delta_dict("halved", halved, strict=False)
    each = {"conv": 0.5, "linear": 1.0}
    expected = alone(net, bank, {"halved": -2.0, "default": 1.0}, x)
    bank.set_mix({"ink": {name: -2 * w for name, w in each.items()}, "default": 1.0})
    torch.testing.assert_close(net(x), expected)
    assert bank.get_mix() == {"default": 1.0, "ink": -2.0}
    bank.set_mix([{"ink": each}, {"ink": dict.fromkeys(ink, 2.0)}])
    torch.testing.assert_close(
        net(x), torch.cat([alone(net, bank, {"halved": 1.0}, x[:1]), alone(net, bank, {"ink": 2.0}, x[1:])])
    )
    trained = bank.delta_dict("default")
    bank.load_delta_dict("copy", {"norm": trained["norm"]}, strict=False)
    bank.set_mix({"default": {"norm": 1.0}})
    torch.testing.assert_close(net(x), alone(net, bank, {"copy": 1.0}, x))


def test_an_adapter_that_acts_can_be_loaded_anew() -> None:
    net, bank, x, _ = make()
    add(bank, "ink")
    bank.set_mix({"ink": 1.0})
    before = net(x)
    bank.load_delta_dict("ink", {n: 2 * d for n, d in bank.delta_dict("ink").items()})
    doubled = net(x)
    assert not torch.allclose(doubled, before)
    torch.testing.assert_close(alone(net, bank, {"ink": 0.5}, x), before)


def test_adapters_come_and_go_within_a_call() -> None:
    net, bank, _, _ = make()
    add(bank, "ink")
    add(bank, "dog")
    bank.set_mix([{"ink": 1.0}, {"default": 1.0}])
    x = torch.randn(4, 5, 9, 8)  # both samples twice
    expected = net(x)
    came = []

    def meanwhile(module: nn.Module, args: Any, output: Tensor) -> None:
        bank.remove("dog")
        add(bank, "new")
        came.append(bank.names)

    hook = net.conv.register_forward_hook(meanwhile)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
    hook.remove()
    assert came == [("default", "ink", "new")]
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_switching_between_many_adapters_keeps_the_slots() -> None:
    net, bank, _x, _ = make()
    names = [f"a{i}" for i in range(20)]
    for name in names:
        add(bank, name)
    bank.set_mix(dict.fromkeys(names[:6], 1.0))
    slots, mix = bank.slots, bank.mix
    for name in names[::-1]:
        bank.set_mix({name: 1.0})
        for key, delta in bank.delta_dict(name).items():
            torch.testing.assert_close(
                bank.scales[key],
                torch.maximum(*(t + u for t, u in zip(net.layers()[key].gain_terms(), (delta, 0), strict=False)))
                + (net.layers()[key].sigma if net.layers()[key].form == "residual" else 0),
            )
    assert bank.slots is slots and bank.mix is mix and len(slots) == 8
    assert set(bank.state_dict()) == {"matrices_default", "one_dim_default"}
    assert len(list(bank.parameters())) == 2


def test_a_mix_chosen_in_inference_mode_serves_training() -> None:
    net, bank, x, direction = make()
    add(bank, "ink")
    add(bank, "dog")
    with torch.inference_mode():
        bank.set_mix({"ink": 1.0})
        net(x)
    bank.set_mix({"default": 1.0, "dog": 1.0})
    (net(x) * direction).sum().backward()
    assert all(grad.any() for grad in grads(bank))


def test_threads_have_mixes_of_their_own() -> None:
    net, bank, _, _ = make()
    mixes: list[Any] = [{"default": 1.0}, {"ink": 1.0}, {}, [{"ink": 2.0}, {"default": -1.0}]]
    add(bank, "ink")
    x = torch.randn(2, 5, 9, 8)
    expected = [alone(net, bank, mix, x) for mix in mixes]
    shared = net(x)
    at_once, wrong = threading.Barrier(len(mixes) + 1), []

    def work(i: int) -> None:
        with bank.mixed(mixes[i]) if i < len(mixes) else nullcontext(), torch.no_grad():
            for _ in range(20):
                at_once.wait(timeout=60)
                if not torch.equal(net(x), expected[i] if i < len(mixes) else shared):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(mixes) + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(net(x), shared)


def test_a_block_ends_with_its_mix_and_keeps_what_it_began_with() -> None:
    net, bank, x, _ = make()
    add(bank, "ink")
    shared, inked = net(x), alone(net, bank, {"ink": 1.0}, x)
    with pytest.raises(KeyError), bank.mixed({"ink": 1.0}):
        assert torch.equal(net(x), inked)
        with bank.mixed({}):
            assert not torch.allclose(net(x), inked)
        bank.remove("ink")
        assert torch.equal(net(x), inked)
        raise KeyError
    assert torch.equal(net(x), shared)
    with pytest.raises(SVDiffError, match="no adapter 'ink'"), bank.mixed({"ink": 1.0}):
        pass


def test_within_a_block_a_layer_alone_follows_it_too() -> None:
    net, bank, x, _direction = make()
    add(bank, "ink")
    bank.set_mix({"ink": 1.0})
    expected = net.conv(x)
    bank.set_mix({"default": 1.0})
    with bank.mixed({"ink": 1.0}):
        assert torch.equal(net.conv(x), expected)
        with torch.inference_mode():
            net(x)
        assert net.conv(x).requires_grad  # not the inference tensor


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_refuses_a_mix_of_the_call(in_place: bool) -> None:
    net, bank, x, _ = make()
    if in_place:
        net.compile(backend="aot_eager")
        compiled: Any = net
    else:
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        compiled(x)
    with pytest.raises(SVDiffError, match="one mix for all calls"), bank.mixed({}):
        compiled(x)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_compiled_within_a_block_is_not_given_another_mix() -> None:
    net, bank, x, _ = make()
    compiled = torch.compile(net, backend="aot_eager")
    with bank.mixed({}):
        try:
            actual = compiled(x)
        except SVDiffError as error:
            assert "one mix for all calls" in str(error)
        else:
            torch.testing.assert_close(actual, net(x))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_switches_among_samples_mixes_without_compiling_anew() -> None:
    net, bank, _, _ = make()
    add(bank, "ink")
    add(bank, "dog")
    x = torch.randn(2, 5, 9, 8)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    bank.set_mix([{"ink": 1.0}, {"default": 1.0}])
    torch.testing.assert_close(compiled(x), net(x))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows in ([{"dog": 1.0}, {}], [{"default": 0.5}, {"ink": {"conv": 1.0}}]):
        bank.set_mix(rows)
        torch.testing.assert_close(compiled(x), net(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


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
