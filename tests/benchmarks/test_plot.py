"""Every figure is drawn from lines that the suite wrote, and shows what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from svdiff.bench import BenchConfig, bench

from benchmarks import plot, sweep


def test_every_figure_is_drawn(tiny_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SIDES", (32,))
    monkeypatch.setattr(sweep, "ROWS", (4, 8))
    files = []
    for level, settings in (("unet", {"config": tiny_config}), ("infer", {"config": tiny_config, "batch": 8})):
        files.append(tmp_path / f"{level}.jsonl")
        bench(BenchConfig(level, latents=8, lora_rank=4, rounds=2, output=str(files[-1]), **settings))
    for level in ("layer", "sweep"):
        files.append(tmp_path / f"{level}.jsonl")
        bench(BenchConfig(level, model="clip", rounds=1, output=str(files[-1])))
    files.append(
        Path(plot.__file__).parent / "results" / "predicted.jsonl"
    )  # nothing to draw, and nothing to fall over
    assert plot.main([*map(str, files), "--output_dir", str(tmp_path / "images")]) == 0
    pictures = {path.stem: Image.open(path) for path in (tmp_path / "images").iterdir()}
    assert pictures.keys() == plot.FIGURES.keys()
    assert all(
        min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 20 for picture in pictures.values()
    )


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert plot.main([str(empty)]) == 2
    assert "nothing that can be drawn" in capsys.readouterr().err
