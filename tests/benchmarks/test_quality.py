"""What is learnt, judged: one short run in a process of its own, and tables and plots of results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from svdiff.miniature import world

from benchmarks import quality


def result(share: float, **more: Any) -> dict[str, Any]:
    """As of a run."""
    marks = {"recognised": share, "agreeing": share - 0.1, "unchanged": 0.9}
    rest = {"unchanged_base": 0.9, "bytes": 125_712, "seconds": 63.0, "peak_bytes": 900_000_000}
    return {**marks, **rest, "curve": {"100": marks, "200": marks}, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of three seeds of two contenders."""
    for name, share in (("svdiff", 0.9), ("lora4", 0.6)):
        for seed in range(3):
            (tmp_path / f"{name}_{seed}.json").write_text(json.dumps(result(share + 0.05 * (seed - 1))))
    return tmp_path


def test_what_is_there_is_told_and_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = folder / "images" / "plot.png"
    command = ["quality", "single", str(folder), "--only", "svdiff", "lora4", "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", command)
    assert quality.main() == 0
    header, ours, lora = (line.strip() for line in capsys.readouterr().out.splitlines())
    assert header.split()[:3] == ["recognised", "agreeing", "unchanged"]
    assert ours.startswith("spectral shifts  90.0% (85%-95%)  80.0% (75%-85%)  90.0% (90%-90%)")
    assert lora.startswith("LoRA r = 4  60.0% (55%-65%)")
    assert ours.split()[-5:] == ["MB", "63", "s", "900.00", "MB"]
    with Image.open(plot) as image:
        assert len(image.convert("L").getcolors() or []) > 20


@pytest.mark.parametrize(("name", "subjects"), [("svdiff", 1), ("unmix", 2)])
def test_a_run_is_judged(name: str, subjects: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few steps nothing is learnt, and nothing lost."""
    experiment = next(e for e in quality.EXPERIMENTS.values() if name in e)
    short = {"max_train_steps": 2, "checkpointing_steps": 1, "train_batch_size": 1, "learning_rate": 1e-4}
    contender = replace(experiment[name], settings=experiment[name].settings | short)
    monkeypatch.setattr(quality, "_PROMPTS", 4)
    monkeypatch.setattr(quality, "_CURVE_PROMPTS", 2)
    monkeypatch.setattr(quality.Task, "class_prompts", lambda task: ["a toy", "a blue star"])
    found = quality._run(contender, 0)
    assert found["recognised"] == found["agreeing"] == 0.0
    assert found["unchanged"] == found["unchanged_base"]
    assert list(found["curve"]) == [1, 2]
    assert found["seconds"] > 0 and found["peak_bytes"] > 1e8 and found["bytes"] > 50_000
    assert len(found["subjects"]) == subjects and set(found["subjects"]) <= set(world.SUBJECTS)
    assert ("both_in_place" in found) == (subjects > 1)


def test_subjects_can_be_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(quality, "_run", lambda *args: asked.append(args) or {})
    command = ["quality", "several", str(folder), "--subjects", "fish", "lolly", "--only", "unmix"]
    monkeypatch.setattr("sys.argv", [*command, "--run", "unmix", "2"])
    assert quality.main() == 0
    assert asked == [(quality.EXPERIMENTS["several"]["unmix"], 2, ["fish", "lolly"])]
    monkeypatch.setattr("sys.argv", [*command, "three"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "--subjects: 2 for unmix, three" in capsys.readouterr().err
