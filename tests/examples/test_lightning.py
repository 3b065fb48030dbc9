"""examples/lightning: the loss falls, checkpoints hold what trains alone, and a run goes on from one to the bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import svdiff
import torch
from commands import python
from safetensors.torch import load_file
from svdiff.miniature import load_pipeline

pytest.importorskip("lightning")
pytestmark = pytest.mark.slow


def losses(told: str) -> tuple[float, float]:
    """Before and after."""
    return tuple(float(re.search(rf"loss {when} ([\d.]+)", told)[1]) for when in ("before", "after"))


def test_the_loss_falls_and_the_file_is_what_svdiff_loads(tmp_path: Path) -> None:
    told = python("lightning/train.py", "--output_dir", tmp_path)
    before, after = losses(told)
    assert after < 0.8 * before
    trained = int(re.search(r"([\d,]+) shifts", told)[1].replace(",", ""))
    deltas = load_file(tmp_path / "spectral_shifts.safetensors")
    assert sum(delta.numel() for delta in deltas.values()) == trained

    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) == trained
    assert (tmp_path / "last.ckpt").stat().st_size < 4 * 4 * trained  # with both moments of the optimiser

    adapter = svdiff.load(load_pipeline(), tmp_path)
    assert adapter.num_parameters() == trained


def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    steps = ("--steps", "3")
    python("lightning/train.py", "--output_dir", tmp_path / "whole", "--epochs", "2", *steps)
    python("lightning/train.py", "--output_dir", tmp_path / "parts", "--epochs", "1", *steps)
    halfway = load_file(tmp_path / "parts" / "spectral_shifts.safetensors")
    told = python("lightning/train.py", "--output_dir", tmp_path / "parts", "--epochs", "2", "--resume", *steps)
    assert "epoch 0" not in told and "epoch 1: 6 steps" in told
    whole, parts = (load_file(tmp_path / name / "spectral_shifts.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert any(not torch.equal(halfway[key], whole[key]) for key in whole)
