"""examples/trainer: Trainer trains shifts by way of PEFT, and the adapter's folder holds them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import python
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("transformers")


@pytest.mark.slow
def test_a_dialect_is_learnt_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = python("trainer/train.py", "--output_dir", tmp_path)
    before, after = map(float, re.search(r"loss on the dialect: ([\d.]+) before, ([\d.]+) after", told).groups())
    assert after < before / 2

    written = re.findall(r"^(base|adapter) +English +([\d.]+)%  dialect +([\d.]+)%", told, re.MULTILINE)
    english = {name: float(share) for name, share, _ in written}
    dialect = {name: float(share) for name, _, share in written}
    assert english["base"] > 80 and dialect["base"] < 5
    assert dialect["adapter"] > 70 and english["adapter"] < 5

    adapter = tmp_path / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "SVDIFF"
    shifts = load_file(adapter / "adapter_model.safetensors")
    assert all(key.endswith(".svdiff_delta") and shift.dim() == 1 for key, shift in shifts.items())
    trained = int(re.search(r"trainable params: ([\d,]+)", told)[1].replace(",", ""))
    assert sum(shift.numel() for shift in shifts.values()) == trained
