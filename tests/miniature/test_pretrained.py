"""The shipped weights draw what they are asked for, and the demo teaches them a subject."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import svdiff.miniature
from PIL import Image
from svdiff.cli import main
from svdiff.miniature import load_pipeline
from svdiff.miniature.evaluate import agreement

PROMPTS = 200


def test_the_weights_are_small_and_in_half_precision() -> None:
    folder = Path(str(resources.files(svdiff.miniature))) / "weights"
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 4  # of the pipeline, and its encoder
    assert sum(file.stat().st_size for file in files) <= 24_000_000
    pipeline = load_pipeline()
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        assert all((p == p.half().float()).all() for p in part.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("objects", "least"), [(1, 0.90), (2, 0.75)])
def test_pictures_agree_with_held_out_prompts(objects: int, least: float) -> None:
    assert agreement(load_pipeline(), objects, PROMPTS) >= least


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_teaches_a_new_subject(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", "--output_dir", str(folder)]) == 0
    assert "subject recognised in" in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["subject_accuracy_base"] < 0.05
    assert metrics["subject_accuracy"] >= 0.80
    # 3 of 64 pictures, and 2 that another CPU's rounding may turn.
    assert metrics["class_accuracy"] >= metrics["class_accuracy_base"] - 0.08
    assert metrics["delta_bytes"] * 100 <= metrics["base_bytes"]
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) == metrics["delta_bytes"]
    assert min(Image.open(folder / "grid.png").size) > 300


def test_the_demo_refuses_a_folder_that_holds_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
