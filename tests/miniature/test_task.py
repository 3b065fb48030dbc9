"""The personalisation to be judged: what is taught, what is asked, and that the first does not give away the second."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from svdiff.miniature import recogniser, world
from svdiff.miniature.task import Task, agreeing, both_in_place, recognised

ONE, TWO = Task(("mushroom",), pictures=6), Task(("mushroom", "robot"), pictures=6)
APART = Task(("mushroom", "robot"), pictures=6, new_words=True, apart=True, rare=("zwx", "sks"))


@pytest.mark.parametrize("task", [ONE, TWO, APART], ids=["one", "two", "apart"])
def test_pictures_show_what_their_captions_say(task: Task, tmp_path: Path) -> None:
    for subject in task.subjects:
        images = task.write_pictures(tmp_path / subject, subject)
        lines = [json.loads(line) for line in (tmp_path / subject / "metadata.jsonl").read_text().splitlines()]
        assert len(images) == len(lines) == 6
        for image, line in zip(images, lines, strict=True):
            reading = recogniser.read(image)
            assert [seen.subject for seen in reading.seen] == [subject]
            size, position = reading.seen[0].item.size, reading.seen[0].item.position
            assert line["text"] == (
                f"a {size} {task.token(subject)} toy {world.place(position)}, {reading.background} background"
            )
            assert line["phrase"] == f"a {size} {task.token(subject)} toy"


@pytest.mark.parametrize("task", [ONE, TWO, APART], ids=["one", "two", "apart"])
def test_new_scenes_are_of_no_picture(task: Task, tmp_path: Path) -> None:
    shown = set()
    for subject in task.subjects:
        task.write_pictures(tmp_path / subject, subject)
        lines = (tmp_path / subject / "metadata.jsonl").read_text().splitlines()
        shown |= {json.loads(line)["text"] for line in lines}
    asked = {task.prompt(scene) for scene in task.new_scenes(200)}
    assert len(asked) == 12 * len(task.subjects) and not asked & shown


@pytest.mark.parametrize(("elsewhere", "grounds"), [(False, {"gray"}), (True, {"white", "black"})])
def test_pairs_are_asked_for_in_either_order(elsewhere: bool, grounds: set[str]) -> None:
    distinct = 16 * len(grounds)
    asked = TWO.pairs(2 * distinct, elsewhere=elsewhere)
    assert len(set(asked)) == distinct and set(Counter(asked).values()) == {2}
    for prompt, scene in asked:
        for item, side in zip(scene.items, ("left", "right"), strict=True):
            assert f"a {item.size} {TWO.token(item.shape)} toy on the {side}" in prompt
        assert prompt.endswith(f", {scene.background} background")
    assert {scene.background for _, scene in asked} == grounds
    assert {prompt.index("left") < prompt.index("right") for prompt, _ in asked} == {True, False}
    assert len(set(Task(("mushroom", "robot", "lolly")).pairs(200, elsewhere=elsewhere))) == 3 * distinct


def test_prior_prompts_leave_the_subjects_out() -> None:
    for task in (ONE, TWO):
        prompts = task.class_prompts()
        assert len(prompts) == 160
        assert not any(token in prompt.split() for prompt in prompts for token in world.RARE_TOKENS)
    of_toys = [prompt for prompt in TWO.class_prompts() if world.CLASS_NOUN in prompt]
    assert len(of_toys) == 72 and all(prompt.endswith("gray background") for prompt in of_toys)  # as the pictures are


def test_subjects_apart_are_taught_as_by_themselves(tmp_path: Path) -> None:
    """But for the words."""
    alone = Task(("robot",), pictures=6, new_words=True, rare=("sks",))
    for task, folder in ((APART, tmp_path / "apart"), (alone, tmp_path / "alone")):
        task.write_pictures(folder, "robot")
    written = [(tmp_path / name / "metadata.jsonl").read_text() for name in ("apart", "alone")]
    assert written[0] == written[1] and APART.examples("robot") == alone.examples("robot")
    assert APART.class_prompts() == ONE.class_prompts() and APART.token("mushroom") == "<zwx>"


def test_marks() -> None:
    asked = [scene for _, scene in TWO.pairs(6)]
    drawn = [world.render(scene) for scene in asked]
    swapped = [world.render(world.Scene(_swapped(scene), scene.background)) for scene in asked]
    other_ground = [world.render(world.Scene(scene.items, _another(scene.background))) for scene in asked]
    assert both_in_place(drawn, asked) == agreeing(drawn, asked) == recognised(drawn, asked) == 1
    assert both_in_place(swapped, asked) == 0 and recognised(swapped, asked) == 1
    assert both_in_place(other_ground, asked) == 1 and agreeing(other_ground, asked) == 0
    alone = [world.render(world.Scene(scene.items[:1], scene.background)) for scene in asked]
    assert both_in_place(alone, asked) == 0 and recognised(alone, asked) == 1


def _swapped(scene: world.Scene) -> tuple[world.Item, ...]:
    one, other = scene.items
    return (world.Item(other.shape, "", "left"), world.Item(one.shape, "", "right"))


def _another(background: str) -> str:
    return next(name for name in world.BACKGROUNDS if name != background)
