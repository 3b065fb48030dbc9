"""The study: runs that are kept and gone on with, marks of pictures that are known, and the page."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from svdiff import TrainConfig
from svdiff.miniature import world
from svdiff.miniature.task import Task
from svdiff.sampling import grid, save_picture
from svdiff.training.config import check

from benchmarks.study import contenders, editing, page, pairs, styles, subjects, teach, words
from benchmarks.study.__main__ import _EXPERIMENTS
from benchmarks.study.marks import class_marks, subject_marks, toy_marks
from benchmarks.study.runs import Results, Run, all_of, make_missing

RUN = Run("subjects", "shifts", "mushroom", 0)
FIGURES: dict[str, Any] = {
    "recognised": 0.5, "agreeing": 0.4, "unchanged": 0.9, "leaked": 0.1, "text_alignment": 0.7, "kid": 3.0,
    "image_alignment": 0.5, "drift": 0.01, "diversity": 0.6, "numbers": 1000, "bytes": 106072, "commit": "abc",
    "changes": {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": 0.1, "text_encoder.x": 0.3},
    "curve": {"100": {"recognised": 0.2, "unchanged": 0.9}, "500": {"recognised": 0.5, "unchanged": 0.8}},
    "scales": {"0.5": {"recognised": 0.2, "unchanged": 0.9}, "1.0": {"recognised": 0.5, "unchanged": 0.8}},
    "spectrum": {"self-attention": [0.1, 0.2], "convolutions": [0.2, 0.1]},
}  # fmt: skip


def test_results_are_kept_sorted_and_read_again(tmp_path: Path) -> None:
    later = Run("subjects", "lora4", "robot", 2)
    found = Results(tmp_path, "subjects")
    found.add(later, {"recognised": 1.0})
    found.add(RUN, FIGURES)
    lines = (tmp_path / "subjects.jsonl").read_text().splitlines()
    assert [json.loads(line)["contender"] for line in lines] == ["lora4", "shifts"]
    again = Results(tmp_path, "subjects")
    assert again.runs == {later: {"recognised": 1.0}, RUN: FIGURES}
    assert again.of("shifts") == [FIGURES] == again.of("shifts", "mushroom")
    assert again.of("shifts", "robot") == [] and again.cases() == {"mushroom", "robot"}


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    """And what fails is told, after the others have been kept."""
    runs = all_of("subjects", ["shifts", "lora4"], ["mushroom"], 2)
    assert [(run.contender, run.seed) for run in runs] == [("shifts", 0), ("lora4", 0), ("shifts", 1), ("lora4", 1)]
    Results(tmp_path, "subjects").add(runs[0], FIGURES)
    with pytest.raises(SystemExit, match=r"failed: .*lora4.mushroom_0.log.txt$"):
        make_missing(runs, {"subjects": _recorded}, tmp_path, tmp_path / "work", jobs=2)
    found = Results(tmp_path, "subjects").runs
    assert found.keys() == {runs[0], runs[2], runs[3]} and found[runs[0]] == FIGURES
    assert found[runs[2]]["recognised"] == 1.0 and found[runs[2]]["commit"]
    assert found[runs[2]]["process"] != found[runs[3]]["process"]  # each has its memory, and its peak, for itself
    assert "it does not want to" in (runs[1].folder(tmp_path / "work") / "log.txt").read_text()
    assert "a word" in (runs[2].folder(tmp_path / "work") / "log.txt").read_text()


def _recorded(run: Run, work: Path) -> dict[str, Any]:
    print("a word")
    if run == Run("subjects", "lora4", "mushroom", 0):
        raise ValueError("it does not want to")
    return {"recognised": 1.0, "process": os.getpid()}


def test_every_setting_is_one_that_training_takes(tmp_path: Path) -> None:
    """Of all contenders of all experiments, without training."""
    for name, known in subjects.CASES.items():
        for contender in known:
            check(subjects._asked(Run(name, contender, "robot", 0), tmp_path)[1])
    for way in pairs.WAYS.values():
        if isinstance(way, pairs.Together):
            task = teach.task_of(("mushroom", "robot"), 0, new_words=way.contender.new_words)
            check(pairs._config(way.contender, task, tmp_path / "pairs"))
        else:
            assert way.contender in contenders.CONTENDERS
    for experiment, known in (("styles", contenders.STYLISTS), ("words", contenders.NAMERS)):
        for contender in known.values():
            run = Run(experiment, "", next(iter(_EXPERIMENTS[experiment].cases)), 0)
            if contender is None:
                continue
            if experiment == "styles":
                check(styles._config(contender, run, tmp_path / experiment))
            else:
                check(words._config(contender, run, tmp_path / experiment, world.subject_scenes("robot")[:2]))
    assert set(pairs.LABELS) == {
        f"{name}/{end}" if end else name for name, way in pairs.WAYS.items() for end in _ends(way) or [""]
    }
    assert all(teach.RARE[a] != teach.RARE[b] for a, b in pairs.PAIRS.values()) and len(pairs.PAIRS) >= 4
    assert contenders.ALREADY.keys() < contenders.LAYERS.keys() | contenders.RATES.keys()
    assert len(subjects.SUBJECTS) >= 6 and len(styles.TAUGHT) >= 3 and len(editing.ATTRIBUTES) == 3


def test_marks_of_pictures_that_are_known() -> None:
    task = Task(("mushroom",), 0, 6)
    scenes, others = task.new_scenes(4), task.other_scenes(4)
    right = subject_marks([world.render(scene) for scene in scenes], scenes, task.examples("mushroom"))
    assert right["recognised"] == right["agreeing"] == 1
    plain = [world.render(scene) for scene in others]
    wrong = subject_marks(plain, scenes, task.examples("mushroom"))
    assert wrong["recognised"] == wrong["agreeing"] == 0
    assert wrong["image_alignment"] < right["image_alignment"] and wrong["text_alignment"] < right["text_alignment"]
    same = class_marks(plain, others, plain)
    assert same["unchanged"] == 1 and same["drift"] == pytest.approx(0, abs=1e-9)
    assert class_marks(plain[::-1], others, plain)["drift"] > 0.1
    toys = toy_marks([plain[0], world.render(scenes[0])], "mushroom")
    assert toys["leaked"] == 0.5 and toys["diversity"] > 0.1


def test_pictures_of_a_grid_come_apart() -> None:
    images = [world.render(scene) for scene in world.subject_scenes("robot")[:6]]
    found = subjects.cut(grid(images, 4), world.IMAGE_SIZE)
    assert [one.tobytes() for one in found[:6]] == [one.tobytes() for one in images]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("denoiser.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "cross-attention, K and V"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "cross-attention, Q and out"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "self-attention"),
        ("unet.up_blocks.1.resnets.0.conv1", "convolutions"),
        ("unet.up_blocks.1.upsamplers.0.conv", "convolutions"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2", "feed-forward"),
        ("unet.mid_block.resnets.0.norm1", "norms"),
        ("text_encoder.encoder.layers.0.mlp.fc1", "text encoder"),
    ],
)
def test_kinds_of_layers(path: str, kind: str) -> None:
    assert subjects.kind_of(path) == kind and kind in subjects.KINDS


def test_the_page_has_every_table_and_plot(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for name in contenders.CONTENDERS:
        for seed in range(2):
            Results(results, "subjects").add(Run("subjects", name, "mushroom", seed), FIGURES)
        Results(results, "cost").add(
            Run("cost", name, "robot", 0), {"seconds_per_step": 0.1, "peak_bytes": 8e8, "commit": "abc"}
        )
    for name, known in (("words", contenders.NAMERS), ("layers", contenders.LAYERS), ("rates", contenders.RATES)):
        for contender in known:
            Results(results, name).add(Run(name, contender, "robot", 0), FIGURES)
    way = {"shown": 0.8, "kept": 0.6, "both": 0.5, "fid": 12.0, "content_distance": 0.3, "commit": "abc"}
    for contender in contenders.STYLISTS:
        figures = {"ways": {"plain": way, "stochastic inversion": way}, "commit": "abc"}
        Results(results, "styles").add(Run("styles", contender, "bars", 0), figures)
    for name, one in pairs.WAYS.items():
        both = {"both_in_place": 0.5, "both_elsewhere": 0.4, "agreeing": 0.6, "unchanged": 0.8}
        ends = {"ends": {end: both for end in _ends(one)}} if _ends(one) else both
        Results(results, "pairs").add(Run("pairs", name, "robot+lolly", 0), {**ends, "commit": "abc"})
    marks = {"changed": 0.5, "place and ground": 0.4, "both": 0.3, "rest": 0.2}
    for name in contenders.EDITORS:
        edits = {"starts": {start: marks for start in editing.STARTS}, "commit": "abc"}
        Results(results, "editing").add(Run("editing", name, "color", 0), edits)
    work = tmp_path / "work"
    for run in Results(results, "styles").runs:
        run.folder(work).mkdir(parents=True)
        save_picture(grid(16 * [world.render(world.subject_scenes("robot")[0])], 8), run.folder(work) / "plain.png")
    written = tmp_path / "docs" / "study.md"
    page.write(results, written, tmp_path / "docs" / "images" / "study", work)
    text = written.read_text()
    known = [*contenders.CONTENDERS.values(), *contenders.LAYERS.values(), *filter(None, contenders.STYLISTS.values())]
    for label in [*(one.label for one in known), *pairs.LABELS.values(), "CycleGAN", "not learnt, from noise"]:
        assert f"| {label} |" in text
    assert "| 20.96" not in text and "| 21 |" in text  # theirs, in three digits
    assert "50 % (50 to 50)" in text and "0.11 MB" in text and "commits abc" in text
    assert not (tmp_path / "docs" / "images" / "study" / "subjects.png").exists()  # of which there are no pictures
    for image in ("alignment", "drift", "scales", "spectrum", "places", "layers", "styles"):
        assert f"(images/study/{image}.png)" in text
        assert (tmp_path / "docs" / "images" / "study" / f"{image}.png").stat().st_size > 5000


def test_the_page_in_docs_is_of_the_results_that_are_kept(tmp_path: Path) -> None:
    """No figure is typed, and none is of earlier results."""
    root = Path(__file__).parents[2]
    written = tmp_path / "docs" / "study.md"
    page.write(root / "benchmarks" / "results" / "study", written, written.parent / "images" / "study", tmp_path)
    assert written.read_text() == (root / "docs" / "study.md").read_text()


def test_a_page_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"run python -m benchmarks\.study first"):
        page.write(tmp_path, tmp_path / "study.md", tmp_path, tmp_path)


@pytest.mark.slow
def test_a_run_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps each: what is found has what the page reads, and is JSON."""
    monkeypatch.setattr(subjects, "STEPS", 4)
    monkeypatch.setattr(subjects, "_PROMPTS", 4)
    monkeypatch.setattr(subjects, "_TOYS", 2)
    monkeypatch.setattr(subjects, "_FEWER_PROMPTS", 2)
    monkeypatch.setattr(subjects, "_SCALES", (0.0, 1.0))
    for module in (styles, words, pairs):
        for name, value in (("_JUDGED", 4), ("_OTHERS", 4), ("_PROMPTS", 4), ("_ROUNDS", 1), ("TOGETHER", 2)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(editing, "_PICTURES", 1)
    monkeypatch.setattr(teach, "draw_class_pictures", _rendered)
    for several in (False, True):
        teach.prepare(tmp_path, 1, several=several)
    short = {"max_train_steps": 2, "checkpointing_steps": 2}

    def config(**settings: Any) -> TrainConfig:
        return TrainConfig(**{**settings, **short})

    monkeypatch.setattr(teach, "TrainConfig", config)
    for experiment, contender, case in (
        ("subjects", "shifts", "robot"), ("subjects", "custom", "robot"), ("styles", "svd_inst", "bars"),
        ("words", "inversion", "purple star"), ("pairs", "unmix", "robot+lolly"),
        ("pairs", "mergeable_apart", "robot+lolly"), ("cost", "lora4", "robot"), ("editing", "none", "color"),
    ):  # fmt: skip
        run = Run(experiment, contender, case, 0)
        figures = _EXPERIMENTS[experiment].run(run, tmp_path)
        Results(tmp_path / "results", experiment).add(run, {**figures, "commit": "abc"})
        assert json.loads(json.dumps({**asdict(run), **figures}))
    found = Results(tmp_path / "results", "pairs").of("mergeable_apart")[0]["ends"]["merged"]
    assert found["merge_seconds"] < 2 and found["text_drift"] < found["text_drift_added"]
    page.write(tmp_path / "results", tmp_path / "study.md", tmp_path / "images", tmp_path)


def _ends(way: pairs.Together | pairs.Apart) -> list[str]:
    return list(way.ends) if isinstance(way, pairs.Apart) else []


def _rendered(config: TrainConfig, task: Task, folder: Path) -> None:
    """Class pictures without a model."""
    folder.mkdir(parents=True)
    for i, prompt in enumerate(task.class_prompts()):
        world.render(world.subject_scenes("house")[i % 18]).save(folder / f"class_{i:05d}.png")
        (folder / f"class_{i:05d}.txt").write_text(prompt)
