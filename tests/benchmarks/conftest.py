"""A UNet small enough to measure in a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
