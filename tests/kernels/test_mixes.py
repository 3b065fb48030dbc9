"""Mixes of adapters: for all samples, for each of them, for one call; in threads, and in a compiled model."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kernels.banked import add, alone, grads, make
from torch import Tensor, nn

from svdiff_kernels import SVDiffError

SAMPLES = [{"ink": 1.0}, {}, {"default": 0.7, "ink": -1.5}]


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
