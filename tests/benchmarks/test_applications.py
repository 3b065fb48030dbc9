"""What fine-tunes do together, judged: short runs, whose marks are those of models that have learnt nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from svdiff.miniature import world

from benchmarks import applications


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of training, few prompts and pictures."""
    for name in ("config_of", "_style_config", "picture_config"):
        whole = getattr(applications, name)
        monkeypatch.setattr(
            applications,
            name,
            lambda *args, whole=whole: replace(whole(*args), max_train_steps=1, train_batch_size=1, learning_rate=1e-6),
        )
    monkeypatch.setattr(applications.Task, "class_prompts", lambda task: ["a toy", "a blue star"])
    for name, few in {
        "_PROMPTS": 3,
        "_FEWER": 2,
        "_EDITS": 3,
        "_PATH": [0.0, 1.0],
        "_GROUPS": ("up", "text_encoder"),
    }.items():
        monkeypatch.setattr(applications, name, few)
    monkeypatch.setattr(applications, "EDITS", {"noise": {"start_from": "noise"}, "inversion": {}})


@pytest.mark.usefixtures("short")
def test_mixtures_of_what_has_learnt_nothing(tmp_path: Path) -> None:
    found = applications.mixing(0, tmp_path / "pictures")
    assert {label for label in found if label.startswith(("alone", "in one batch"))} == {
        f"{how}: {what}" for how in ("alone", "in one batch") for what in ("first subject", "second subject", "style")
    }
    for label in ("alone: first subject", "in one batch: second subject"):
        assert found[label] == {"right": 0.0}
    assert set(found["subject + 0.5 style"]) == {"subject", "style", "both"}
    assert found["path 1.000"] == {"first": 0.0, "second": 0.0}
    assert set(found["without text_encoder"]) == {"subject", "style"}
    assert Image.open(tmp_path / "pictures" / "mixing.png").width >= 64


@pytest.mark.usefixtures("short")
def test_edits_of_what_the_base_knows(tmp_path: Path) -> None:
    found = applications.editing(0, tmp_path / "pictures")
    assert list(found) == ["noise", "inversion", "not learnt: noise", "not learnt: inversion"]
    assert all(marks.pop(applications._MOVED) >= 0 for marks in found.values())
    assert all(0 <= share <= 1 for marks in found.values() for share in marks.values())
    assert found["noise"]["place and ground"] > 0  # the base draws what it is asked for
    assert Image.open(tmp_path / "pictures" / "editing.png").height == 5 * 64


def test_an_edit_is_marked_by_what_was_asked_and_what_was_not() -> None:
    before = world.Scene((world.Item("square", "red", "left", "large"),), "white")
    after = replace(before, items=(replace(before.items[0], color="blue"),))
    moved = replace(after, items=(replace(after.items[0], position="right"),))
    other = replace(after, items=(replace(after.items[0], shape="heart"),))
    pictures = [world.render(scene) for scene in (after, before, moved, other)]
    marks = applications.edit_marks(pictures, [before] * 4, [after] * 4)
    assert marks == {"changed": 0.75, "place and ground": 0.75, "both": 0.5, "rest": 0.75}


def test_how_far_something_has_moved() -> None:
    scene = world.Scene((world.Item("square", "red", "left", "large"),), "gray")
    right = replace(scene, items=(replace(scene.items[0], position="right"),))
    empty = Image.new("RGB", (64, 64), world.BACKGROUNDS["gray"])
    before, after = [world.render(scene)] * 3, [world.render(right), world.render(right), empty]
    assert applications.moved(before, before) == 0
    assert applications.moved(before, after) == pytest.approx(33, abs=1)
    assert applications.moved(before[:1], [empty]) == 64


def test_what_is_there_is_told_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: Any) -> None:
        pytest.fail("it is there")

    monkeypatch.setattr(applications, "mixing", never)
    for seed, share in enumerate((0.5, 0.7)):
        (tmp_path / f"mixing_{seed}.json").write_text(json.dumps({"alone: style": {"right": share}}))
    monkeypatch.setattr("sys.argv", ["applications", "mixing", str(tmp_path), "--seeds", "2"])
    assert applications.main() == 0
    assert "alone: style  right 60% (50%-70%)" in capsys.readouterr().out
