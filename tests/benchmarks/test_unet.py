"""A whole UNet's step is measured against its rivals, and the result file says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from svdiff.bench import BenchConfig, bench

from benchmarks import models, runner

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


def test_a_twin_shares_weights_but_not_parameters(tiny_config: str) -> None:
    model = models.random_unet(Path(tiny_config), torch.float32)
    twin = models.twin(model)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours is not theirs and ours.data_ptr() == theirs.data_ptr()


def test_bench_unet_writes_a_line_per_contender(tiny_config: str, tmp_path: Path) -> None:
    output = tmp_path / "results" / "unet.jsonl"
    table = bench(BenchConfig("unet", config=tiny_config, latents=8, rounds=1, lora_rank=4, output=str(output)))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    names = [line["name"] for line in lines]
    expected = ["svdiff", "lora r=4", "svdiff-pytorch's arithmetic", "frozen (forward and dx)", runner.CONTROL]
    assert names == expected
    assert all(line["p50"] > 0 and line["ratio_p50"] > 0 and line["torch"] and line["threads"] for line in lines)
    assert all(0 < line["of_roofline"] < 1.5 for line in lines)
    assert all(name in table for name in names)
