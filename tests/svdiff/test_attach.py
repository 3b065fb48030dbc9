"""attach and unload: what the model computes, what it holds, and that it comes back to the bit."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
import torch.nn.functional as F
from svdiff.attached import AttachedModel
from svdiff.pipelines import load_pipeline
from tiny import assert_unchanged, output, snapshot, tiny_text_encoder, tiny_unet, unet_inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svdiff_kernels import FactorCache, SVDiffError
from svdiff_kernels import nn as snn


def shift(adapter: svdiff.Adapter, size: float = 0.02) -> None:
    torch.manual_seed(9)
    with torch.no_grad():
        for group in adapter.param_groups():
            for parameter in group["params"]:
                parameter.add_(size * torch.randn_like(parameter))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_whole_unet_compiles_without_graph_breaks(unet: Any) -> None:
    adapter = svdiff.attach(unet)
    shift(adapter)
    trained = [p for group in adapter.param_groups() for p in group["params"]]
    x, t, context = unet_inputs()

    def gradients(model: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x, t, context, return_dict=False)[0].square().mean(), trained)

    expected = gradients(unet)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(gradients(compiled), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    shift(adapter)  # what trains is an input of the graph, not a constant in it
    for actual, wanted in zip(gradients(compiled), gradients(unet), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("one_dim", ["vector", "scalar", "none"])
@pytest.mark.parametrize("form", ["factored", "recomposed", "residual"])
def test_zero_shift_changes_nothing(unet: Any, form: Any, one_dim: Any) -> None:
    base = output(unet)
    svdiff.attach(unet, form=form, one_dim=one_dim)
    error = (output(unet) - base).norm() / base.norm()
    assert error <= 1e-5
    if form == "residual" and one_dim != "scalar":
        assert torch.equal(output(unet), base)


def test_truncated_rank_keeps_the_base_to_the_bit(unet: Any) -> None:
    base = output(unet)
    adapter = svdiff.attach(unet, rank=3)
    assert torch.equal(output(unet), base)
    kinds = {m.form for m in unet.modules() if isinstance(m, snn.SpectralModule) and not m.one_dim}
    assert kinds == {"residual"}
    shift(adapter)
    assert not torch.equal(output(unet), base)


@pytest.mark.parametrize("form", ["factored", "residual", "recomposed"])
@pytest.mark.parametrize("one_dim", ["vector", "scalar", "none"])
def test_unload_restores_the_model_to_the_bit(unet: Any, form: Any, one_dim: Any) -> None:
    before, base = snapshot(unet), output(unet)
    modules = dict(unet.named_modules())
    parameters = {name: id(p) for name, p in unet.named_parameters()}
    adapter = svdiff.attach(unet, form=form, one_dim=one_dim)
    shift(adapter)
    assert not torch.equal(output(unet), base)
    adapter.unload()
    assert_unchanged(unet, before)
    assert dict(unet.named_modules()) == modules
    assert {name: id(p) for name, p in unet.named_parameters()} == parameters
    assert torch.equal(output(unet), base)
    with pytest.raises(SVDiffError, match="unloaded"):
        adapter.num_parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["factored", "residual"])
def test_unload_after_a_cast(form: Any, dtype: torch.dtype) -> None:
    unet, plain = tiny_unet(), tiny_unet().to(dtype)
    adapter = svdiff.attach(unet, form=form)
    unet.to(dtype)
    adapter.unload()
    assert_unchanged(unet, snapshot(plain))


@pytest.mark.parametrize("form", ["factored", "residual"])
def test_a_bf16_model_with_its_factors_in_fp16(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nearer to the base in fp32, trains, and unloads to the bit."""
    unet, wide = tiny_unet().to(torch.bfloat16), tiny_unet().to(torch.bfloat16).float()
    before, truth = snapshot(unet), output(wide)
    coarse = (output(tiny_unet().to(torch.bfloat16)) - truth).norm()
    monkeypatch.setattr(snn, "factor_dtype", lambda dtype, device: torch.float16)
    adapter = svdiff.attach(unet, form=form, one_dim="none", cache=False)
    assert unet.conv_in.U.dtype == torch.float16
    assert (output(unet) - truth).norm() <= 1.2 * coarse
    shift(adapter)
    unet(*unet_inputs(torch.bfloat16)).sample.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for group in adapter.param_groups() for p in group["params"] if p.numel())
    adapter.unload()
    assert_unchanged(unet, before)


def test_attaching_again_after_unload(unet: Any) -> None:
    base = output(unet)
    svdiff.attach(unet).unload()
    svdiff.attach(unet, targets="mid", form="residual")
    assert torch.equal(output(unet), base)


def test_everything_else_is_frozen_and_thawed_as_before(unet: Any) -> None:
    unet.conv_in.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in unet.named_parameters()}
    adapter = svdiff.attach(unet, targets="cross_attn")
    trained = {id(p) for group in adapter.param_groups() for p in group["params"]}
    assert {id(p) for p in unet.parameters() if p.requires_grad and p.numel()} == trained
    adapter.unload()
    assert {name: p.requires_grad for name, p in unet.named_parameters()} == flags


def test_param_groups_learn_at_two_rates(unet: Any) -> None:
    adapter = svdiff.attach(unet)
    matrices, norms = adapter.param_groups(lr=0.5, lr_1d=0.25)
    assert (matrices["lr"], norms["lr"]) == (0.5, 0.25)
    assert sum(p.numel() for g in (matrices, norms) for p in g["params"]) == adapter.num_parameters()
    assert sum(p.numel() for p in norms["params"]) == sum(
        m.weight.numel() for m in tiny_unet().modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)
    )
    adapter.unload()
    assert len(svdiff.attach(unet, one_dim="none").param_groups()) == 1


def test_gradients_reach_every_shift(unet: Any) -> None:
    adapter = svdiff.attach(unet)
    x, t, context = unet_inputs()
    unet(x, t, context).sample.square().mean().backward()
    for group in adapter.param_groups():
        for parameter in group["params"]:
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
            assert (parameter.grad != 0).float().mean() > 0.9


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        adapter = svdiff.attach(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        x, t, context = unet_inputs()
        for _ in range(2):  # accumulated over two micro-batches
            unet(x, t, context).sample.square().mean().backward()
        gradients.append([p.grad for g in adapter.param_groups() for p in g["params"]])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_text_encoder(pipeline: Any) -> None:
    before = snapshot(pipeline.text_encoder)
    ids = torch.tensor([[0, 5, 9, 1]])
    with torch.no_grad():
        base = pipeline.text_encoder(ids)[0]
    adapter = svdiff.attach(pipeline, targets="mid", text_encoder=True)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.text_encoder(ids)[0], base, rtol=1e-5, atol=1e-5)
    replaced = [type(m) for m in pipeline.text_encoder.modules() if isinstance(m, snn.SpectralModule)]
    assert replaced.count(snn.SpectralEmbedding) == 2  # tokens and positions
    assert replaced.count(snn.SpectralLinear) == 12  # the text encoder whole, whatever the denoiser's targets
    shift(adapter, 0.1)
    with torch.no_grad():
        assert not torch.allclose(pipeline.text_encoder(ids)[0], base, atol=1e-3)
    adapter.unload()
    assert_unchanged(pipeline.text_encoder, before)


def test_a_text_encoder_that_is_not_there(pipeline: Any) -> None:
    before = snapshot(pipeline.unet)
    with pytest.raises(SVDiffError, match="no 'text_encoder_2', only denoiser, text_encoder"):
        svdiff.attach(pipeline, text_encoder=["text_encoder_2"])
    assert_unchanged(pipeline.unet, before)


def test_a_text_encoder_alone() -> None:
    model = tiny_text_encoder()
    adapter = svdiff.attach(model, targets="self_attn", one_dim="none")
    assert adapter.num_parameters() == 2 * 4 * 12


def test_attaching_twice_is_an_error(unet: Any) -> None:
    svdiff.attach(unet, targets="mid")
    with pytest.raises(SVDiffError, match="already"):
        svdiff.attach(unet, targets="up")


def test_layers_beneath_a_lora_have_their_own_paths(unet: Any) -> None:
    from peft import LoraConfig

    plain = svdiff.attach(tiny_unet(), cache=False).parts[0].layout
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    before = snapshot(unet)
    adapter = svdiff.attach(unet, cache=False)
    assert adapter.parts[0].layout.shapes == plain.shapes and adapter.parts[0].layout.hashes == plain.hashes
    adapter.unload()
    assert_unchanged(unet, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["conv_out.weight", "conv_norm_out.weight"])
def test_a_damaged_weight_leaves_the_model_as_it_was(unet: Any, name: str, value: float) -> None:
    with torch.no_grad():
        unet.get_parameter(name).view(-1)[3] = value
    before = {key: v.view(torch.int32) for key, v in snapshot(unet).items()}
    with pytest.raises(SVDiffError, match=name.removesuffix(".weight")):
        svdiff.attach(unet, cache=False)
    assert {key: v.view(torch.int32).sum() for key, v in unet.state_dict().items()} == {
        k: v.sum() for k, v in before.items()
    }


class FailingCache(FactorCache):
    """Gives up after some weights."""

    left = 20

    def iterate(self, *args: Any, **kwargs: Any) -> Any:
        for found in super().iterate(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is gone")
            yield found


def test_a_failure_half_way_leaves_the_model_as_it_was(pipeline: Any) -> None:
    before = [snapshot(pipeline.unet), snapshot(pipeline.text_encoder)]
    flags = [p.requires_grad for p in pipeline.unet.parameters()]
    cache = FailingCache()
    cache.left = 60  # in the text encoder, after the whole UNet
    with pytest.raises(OSError, match="the disk is gone"):
        svdiff.attach(pipeline, text_encoder=True, cache=cache)
    assert_unchanged(pipeline.unet, before[0])
    assert_unchanged(pipeline.text_encoder, before[1])
    assert [p.requires_grad for p in pipeline.unet.parameters()] == flags
    svdiff.attach(pipeline)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"form": "wrong"}, "form"),
        ({"one_dim": "wrong"}, "one_dim"),
        ({"targets": "zzz"}, "zzz"),
    ],
)
def test_wrong_arguments(unet: Any, arguments: dict[str, Any], message: str) -> None:
    before = snapshot(unet)
    with pytest.raises(SVDiffError, match=message):
        svdiff.attach(unet, **arguments)
    assert_unchanged(unet, before)


def test_a_shared_weight_stays_for_who_shares_it() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(5, 7), "b": nn.Bilinear(2, 3, 4), "c": nn.Linear(5, 7)})
    model["c"].weight = model["a"].weight
    kept = model["a"].weight.clone()
    adapter = svdiff.attach(model, targets="^a$")
    assert torch.equal(model["c"].weight, kept)
    adapter.unload()
    assert model["a"].weight is model["c"].weight


def test_one_module_in_two_places_is_replaced_in_both() -> None:
    shared = nn.Linear(5, 7)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    adapter = svdiff.attach(model)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], snn.SpectralLinear)
    adapter.unload()
    assert model["a"] is model["b"][0] is shared


def test_grouped_convolution_takes_the_only_form_it_has() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 5, 1))
    x = torch.randn(2, 4, 5, 5)
    base = model(x)
    svdiff.attach(model, form="factored")
    assert [m.form for m in model[:2]] == ["recomposed", "factored"]
    torch.testing.assert_close(model(x), base)


def test_without_a_cache_no_file_is_written(unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_CACHE", str(tmp_path / "cache"))
    svdiff.attach(unet, targets="mid", cache=False).unload()
    assert not (tmp_path / "cache").exists()
    svdiff.attach(unet, targets="mid", cache=FactorCache(tmp_path / "other")).unload()
    assert any((tmp_path / "other").rglob("*.safetensors"))


def test_the_same_weight_in_half_precision_takes_the_same_factors(tmp_path: Path) -> None:
    cache = FactorCache(tmp_path)
    half = tiny_unet().to(torch.bfloat16)
    wide = tiny_unet().to(torch.bfloat16).float()
    svdiff.attach(half, cache=cache)
    objects = sorted(tmp_path.rglob("*.safetensors"))
    svdiff.attach(wide, cache=cache)
    assert sorted(tmp_path.rglob("*.safetensors")) == objects
    layer = half.conv_in
    assert (layer.U.dtype, layer.Vh.dtype, layer.sigma.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(layer.sigma, wide.conv_in.sigma)


def test_factored_weights_leave_memory(unet: Any) -> None:
    originals = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    svdiff.attach(unet, form="factored")
    gc.collect()
    assert all(m.weight.numel() == 0 for m in originals.values())


_MEMORY = """
import resource, torch, svdiff
from diffusers import UNet2DConditionModel
from svdiff_kernels import FactorCache, Factors

class MadeUp(FactorCache):  # real decompositions would take minutes
    def iterate(self, weights, rank=None, *, contents=None):
        for name, weight in weights.items():
            M, N = weight.shape[0], weight[0].numel()
            r = min(M, N)
            yield name, Factors(torch.full((M, r), 0.01), torch.ones(r), torch.full((r, N), 0.01))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

start = resident()
with torch.device("meta"):
    unet = UNet2DConditionModel(cross_attention_dim=768)
unet.to_empty(device="cpu")
with torch.no_grad():
    for parameter in unet.parameters():
        parameter.fill_(0.01)
size = sum(p.numel() * 4 for p in unet.parameters())
svdiff.attach(unet, cache=MadeUp())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(size, (resident() - start) / size, (peak - start) / size)
"""


@pytest.mark.slow
def test_memory_of_a_unet_of_stable_diffusions_size() -> None:
    """Factors weigh 1.26 of SD 1.5's weights, which leave memory one by one as their factors come."""
    run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    size, after, peak = map(float, run.stdout.splitlines()[-1].split())
    assert size > 3.4e9
    assert after <= 1.3
    assert peak <= 1.32


class Allocations(TorchDispatchMode):
    """Shapes of all tensors made in a block, other than views of given ones."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(out)
        return out

    def note(self, out: Any) -> None:
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(t.shape))


@pytest.mark.parametrize("form", ["factored", "residual"])
def test_a_step_makes_no_tensor_of_a_weights_shape(unet: Any, form: Any) -> None:
    # Wide weights: of a tall one, [M, N] is also the shape of U.
    weights = [m.weight for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    forbidden = {
        shape
        for w in weights
        if w.shape[0] < w[0].numel()
        for shape in (tuple(w.shape), (w.shape[0], w[0].numel()), (w[0].numel(), w.shape[0]))
    }
    svdiff.attach(unet, form=form)
    rng = torch.Generator().manual_seed(0)
    x, context = torch.randn(3, 4, 8, 8, generator=rng), torch.randn(3, 5, 12, generator=rng)

    def step() -> None:
        F.mse_loss(unet(x, torch.tensor([3, 5, 7]), context).sample, x).backward()

    with Allocations(iter([*unet.buffers(), *unet.parameters()])) as made:
        saved = torch.autograd.graph.saved_tensors_hooks(lambda t: made.note(t) or t, lambda t: t)
        with saved:
            step()
    assert not made.shapes & forbidden
    for m in unet.modules():  # and the watcher sees such a tensor when there is one
        if isinstance(m, snn.SpectralConv2d):
            m.form = "recomposed"
    with Allocations(iter([*unet.buffers(), *unet.parameters()])) as made:
        step()
    assert made.shapes & forbidden


def test_adapters_switch_mix_and_go(unet: Any, tmp_path: Path) -> None:
    base = output(unet)
    adapter = svdiff.attach(unet)
    zero = output(unet)
    shift(adapter)
    dog = output(unet)
    adapter.save_weights(tmp_path / "dog")
    shift(adapter, 0.05)
    adapter.load_weights(tmp_path / "dog", "dog")
    assert adapter.get_list_adapters() == ["default", "dog"]
    assert adapter.get_active_adapters() == ["dog"]
    assert torch.equal(output(unet), dog)
    adapter.set_adapters([])
    assert torch.equal(output(unet), zero)
    torch.testing.assert_close(zero, base, rtol=1e-5, atol=1e-5)
    adapter.set_adapters(["default", "dog"], [0.25, -0.5])
    assert not torch.equal(output(unet), dog)
    adapter.set_adapters("dog", 1.0)
    assert torch.equal(output(unet), dog)
    for wrong in (["cat"], ["dog", "dog"]):
        with pytest.raises(SVDiffError):
            adapter.set_adapters(wrong)
    with pytest.raises(SVDiffError, match="weights"):
        adapter.set_adapters(["dog", "default"], [1.0])
    with pytest.raises(SVDiffError, match="cat"):
        adapter.delete_adapters(["dog", "cat"])
    adapter.delete_adapters("dog")
    assert adapter.get_list_adapters() == ["default"]
    with pytest.raises(SVDiffError, match="default"):
        adapter.delete_adapters("default")


@pytest.mark.parametrize("form", ["factored", "residual", "recomposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_gives_a_plain_model_and_unfusing_takes_it_back(form: Any, dtype: torch.dtype) -> None:
    unet = tiny_unet().to(dtype)
    before = snapshot(unet)
    layers = {path: type(module) for path, module in unet.named_modules()}
    adapter = svdiff.attach(unet, form=form, one_dim="scalar")
    adapter.set_adapters([])
    adapter.fuse()
    fused = unet.state_dict()
    assert fused.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(fused[key], value), key  # no shift: the original to the bit
    zero = output(unet)
    adapter.unfuse()
    shift(adapter)
    adapter.set_adapters("default", 1.5)
    expected = output(unet)
    adapter.fuse()
    assert {path: type(m) for path, m in unet.named_modules()} == layers
    assert not unet._forward_pre_hooks  # no gains are computed for nobody
    error = (output(unet) - expected).norm() / expected.norm()
    assert error <= (1e-5 if dtype == torch.float32 else 0.02)
    assert (output(unet) - zero).norm() / zero.norm() > 0.05
    for forbidden in (
        lambda: adapter.set_adapters([]),
        lambda: adapter.load_deltas({}),
        lambda: adapter.delete_adapters("default"),
        lambda: adapter.set_adapters_per_sample([{}]),
        lambda: adapter.mixed({}).__enter__(),
        adapter.param_groups,
        adapter.fuse,
    ):
        with pytest.raises(SVDiffError, match="unfuse it first"):
            forbidden()
    adapter.unfuse()
    assert torch.equal(output(unet), expected)
    with pytest.raises(SVDiffError, match="nothing is fused"):
        adapter.unfuse()
    adapter.fuse()
    adapter.unload()
    assert_unchanged(unet, before)
    with pytest.raises(SVDiffError, match="unloaded"):
        adapter.set_adapters([])


def test_a_fused_model_can_be_cast_and_comes_back(unet: Any) -> None:
    adapter = svdiff.attach(unet)
    shift(adapter)
    expected = output(unet)
    adapter.fuse()
    unet.to(torch.float64)
    adapter.unfuse()
    assert all(p.dtype != torch.float32 for n, p in unet.named_parameters())
    x, t, context = (v.double() if v.is_floating_point() else v for v in unet_inputs())
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, context).sample.float(), expected, rtol=1e-4, atol=1e-5)


def test_fusing_that_fails_leaves_nothing_fused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(str(base))
    adapter = svdiff.attach(pipeline, text_encoder=True)
    kinds = {path: type(module) for path, module in pipeline.unet.named_modules()}
    monkeypatch.setattr(snn.SpectralEmbedding, "merge", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        adapter.fuse()
    assert {path: type(module) for path, module in pipeline.unet.named_modules()} == kinds
    adapter.set_adapters([])


def test_fusing_that_is_interrupted_leaves_nothing_fused(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = svdiff.attach(unet)
    kinds = {path: type(module) for path, module in unet.named_modules()}
    swap = AttachedModel._swap

    def swap_and_stop(*args: Any) -> None:
        monkeypatch.undo()
        swap(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(AttachedModel, "_swap", swap_and_stop)
    with pytest.raises(KeyboardInterrupt):
        adapter.fuse()
    assert {path: type(module) for path, module in unet.named_modules()} == kinds
    adapter.set_adapters([])


def test_mixes_of_prompts_cannot_be_fused(unet: Any) -> None:
    adapter = svdiff.attach(unet)
    shift(adapter)
    adapter.set_adapters_per_sample([{"default": 1.0}, {}])
    with pytest.raises(SVDiffError, match="mixes of their own"):
        adapter.fuse()
    adapter.set_adapters_per_sample([{"default": 1.0}, {"default": 1.0}])
    adapter.fuse()


def test_a_transformer_denoiser() -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=6, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=2
    ).eval()
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 9]), torch.tensor([3, 5])
    with torch.no_grad():
        base = model(x, t, class_labels=labels).sample
        svdiff.attach(model)
        torch.testing.assert_close(model(x, t, class_labels=labels).sample, base, rtol=1e-5, atol=1e-5)
