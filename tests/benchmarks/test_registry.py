"""Layer shapes are those of the real models, and costs are those of the arithmetic."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from svdiff.generate import FUSED_FROM
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost, layer, registry, runner
from svdiff_kernels import SVDiffError


@pytest.mark.parametrize(
    ("model", "matrices", "shifts"), [("sd15", 282, 222_696), ("sdxl", 794, 909_800), ("clip", 72, 55_296)]
)
def test_a_model_has_the_published_number_of_matrices_and_shifts(model: str, matrices: int, shifts: int) -> None:
    layers = registry.layers(model)
    assert sum(layers.values()) == matrices
    assert sum(min(shape.M, shape.N) * count for shape, count in layers.items()) == shifts


@pytest.mark.parametrize("model", registry.MODELS)
def test_a_layer_can_be_made_from_its_shape(model: str) -> None:
    for shape in registry.layers(model, 256):
        module = shape.module()
        assert (module.weight.shape[0], module.weight[0].numel()) == (shape.M, shape.N)
        y = module(torch.empty(shape.inputs, device="meta"))
        assert y.numel() == shape.T * shape.M


@pytest.mark.parametrize(("model", "pixels"), [("sd15", 512), ("sdxl", 1024)])
def test_every_shape_has_a_name_of_its_own(model: str, pixels: int) -> None:
    layers = registry.layers(model, pixels)
    assert len(set(map(str, layers))) == len(layers)


def test_a_conv_of_half_the_pixels_a_side_has_a_quarter_of_the_rows() -> None:
    large, small = (max(shape.T for shape in registry.layers("sd15", pixels)) for pixels in (512, 256))
    assert large == 4 * small == 64 * 64


def test_operations_are_those_that_torch_counts() -> None:
    """Of one linear and one conv, forward and backward, of all rivals; torch's counter does not look into our op."""
    for shape in (
        registry.Layer("linear", 20, 12, 9, (1, 9, 12)),
        registry.Layer("conv", 20, 27, 25, (1, 3, 5, 5), kernel=3, stride=1, padding=1),
    ):
        steps, costs = layer.contenders(shape, 1, torch.float32)
        for name, step in steps.items():
            if name == runner.OURS:
                continue
            with FlopCounterMode(display=False) as counter:
                step()
            assert costs[name].flop == pytest.approx(counter.get_total_flops(), rel=0.02), (name, str(shape))


def test_the_cost_rule_never_rebuilds_a_square_conv_or_a_feed_forward_layer() -> None:
    assert not cost.prefers_recomposed(1280, 11520, 10**6)
    assert not cost.prefers_recomposed(10240, 1280, 10**6)
    assert cost.prefers_recomposed(320, 320, 4096)
    assert not cost.prefers_recomposed(320, 320, 500)


def test_the_usual_shapes_are_known_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.keep() == registry._KEPT.read_text()
    known = registry.layers("sdxl", 1024)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name))
    registry.layers.cache_clear()
    assert registry.layers("sdxl", 1024) == known
    with pytest.raises(SVDiffError, match="the layers of sdxl at 768 pixels need diffusers"):
        registry.layers("sdxl", 768)
    registry.layers.cache_clear()


@pytest.mark.parametrize(("model", "pixels"), [("sd15", 256), ("sd15", 512), ("sdxl", 512), ("sdxl", 1024)])
def test_from_how_many_latent_pixels_it_pays_to_fuse(model: str, pixels: int) -> None:
    """What docs/inference.md says, and `FUSED_FROM` in svdiff/generate.py, by count of operations."""
    more = fusing = 0
    for shape, count in registry.layers(model, pixels).items():
        m, X = sorted((shape.M, shape.N))
        more, fusing = more + count * 2 * shape.T * m**2, fusing + count * 2 * m**2 * X
    assert 45_000 <= fusing / more * (pixels / 8) ** 2 <= 48_000 < FUSED_FROM
