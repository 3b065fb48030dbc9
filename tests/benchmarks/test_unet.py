"""The benchmark's contenders compute what they claim to, and its result files say what was measured."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from svdiff.bench import BenchConfig, bench
from torch import nn

from benchmarks import baselines, runner, unet
from svdiff_kernels.nn import SpectralConv2d, SpectralLinear

TINY = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}


@pytest.fixture
def tiny_config(tmp_path: Path) -> str:
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_recomposition_is_the_same_function_as_the_spectral_layers() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(5, 7, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(12, 9))
    layers = {"0": SpectralConv2d.from_module(plain[0]), "2": SpectralLinear.from_module(plain[2])}
    naive = nn.Sequential(*plain)
    shifts = baselines.recompose(naive, layers)
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


def test_a_twin_shares_weights_but_not_parameters(tiny_config: str) -> None:
    model = unet.random_unet(Path(tiny_config), torch.float32)
    twin = unet.twin(model)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours is not theirs and ours.data_ptr() == theirs.data_ptr()


def test_interleaving_sees_a_slowdown_and_no_difference_where_there_is_none() -> None:
    timings = runner.interleave({"one": lambda: time.sleep(0.01), "two": lambda: time.sleep(0.02)}, rounds=9)
    ratios = {t.name: t.ratio_p50 for t in timings}
    assert ratios["one"] == 1
    assert ratios["two"] == pytest.approx(2, rel=0.3)
    assert ratios[runner.CONTROL] == pytest.approx(1, rel=0.3)


def test_bench_unet_writes_a_line_per_contender(tiny_config: str, tmp_path: Path) -> None:
    output = tmp_path / "results" / "unet.jsonl"
    table = bench(BenchConfig("unet", config=tiny_config, latents=8, rounds=1, lora_rank=4, output=str(output)))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    names = [line["name"] for line in lines]
    expected = ["svdiff", "lora r=4", "svdiff-pytorch's arithmetic", "frozen (forward and dx)", runner.CONTROL]
    assert names == expected
    assert all(line["p50"] > 0 and line["ratio_p50"] > 0 and line["torch"] and line["threads"] for line in lines)
    assert all(name in table for name in names)


def test_the_configuration_is_that_of_stable_diffusion_1_5() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(json.loads(unet.CONFIG.read_text()))
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(matrices) == 282
    assert sum(min(w.shape[0], w[0].numel()) for w in matrices) == 222_696
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
