"""examples/vit: it learns, by few numbers, and the table says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import python
from safetensors.torch import load_file


@pytest.mark.slow
def test_shifts_learn_a_new_look(tmp_path: Path) -> None:
    told = python("vit/fine_tune.py", "--output_dir", tmp_path)
    rows = re.findall(r"^(\w[\w ]+?) +([\d.]+)% +([\d.]+)% +([\d,]+) +([\d,]+)$", told, re.MULTILINE)
    outlines = {name: float(score) for name, score, *_ in rows}
    filled = {name: float(score) for name, _, score, *_ in rows}
    trained = {name: int(count.replace(",", "")) for name, *_, count, _ in rows}
    size = {name: int(count.replace(",", "")) for name, *_, count in rows}
    assert list(outlines) == ["base", "linear probe", "shifts", "all weights"]

    assert filled["base"] > 80
    assert outlines["base"] < 40  # by chance 12.5
    assert outlines["shifts"] > outlines["base"] + 25
    assert outlines["shifts"] > outlines["linear probe"] + 10
    assert trained["shifts"] < trained["all weights"] / 50
    assert size["shifts"] < size["all weights"] / 50

    deltas = load_file(tmp_path / "shifts.safetensors")
    assert all(key.endswith(".delta") for key in deltas)
    assert sum(delta.numel() for delta in deltas.values()) == trained["shifts"]
    assert size["shifts"] == (tmp_path / "shifts.safetensors").stat().st_size

    # From the file again, and beside the base in one batch of 250 of the 1000 each.
    mixed = re.search(r"([\d.]+)% of outlines, ([\d.]+)% of filled$", told.strip())
    assert abs(float(mixed[1]) - outlines["shifts"]) < 10 and abs(float(mixed[2]) - filled["base"]) < 10
