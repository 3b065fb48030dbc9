"""The world's pictures, words and the recogniser that reads the pictures back."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from svdiff.miniature import models, recogniser, world
from svdiff.miniature.evaluate import recogniser_accuracy


def test_the_recogniser_reads_rendered_scenes() -> None:
    assert recogniser_accuracy(1000) >= 0.99


def test_the_recogniser_reads_everything_it_claims_to() -> None:
    rng = random.Random(3)
    for _ in range(50):
        scene = world.sample_scene(rng)
        reading = recogniser.read(world.render(scene, rng))
        assert (reading.background, reading.style) == (scene.background, scene.style)
        assert {seen.item for seen in reading.seen} == set(scene.items)


@pytest.mark.parametrize(
    "change", [{"shape": "star"}, {"color": "green"}, {"position": "left"}], ids=["shape", "color", "position"]
)
def test_the_recogniser_disagrees_with_another_prompt(change: dict[str, str]) -> None:
    item = world.Item("circle", "red", "right")
    asked = world.Scene((item,))
    assert recogniser.agrees(world.render(asked), asked)
    other = world.Scene((world.replace(item, **change),))
    assert not recogniser.agrees(world.render(other), asked)


def test_an_object_too_many_or_too_few_is_wrong() -> None:
    left, right = world.Item("heart", "blue", "left"), world.Item("cross", "orange", "right")
    one, two = world.Scene((left,)), world.Scene((left, right))
    assert not recogniser.agrees(world.render(two), one)
    assert not recogniser.agrees(world.render(one), two)


def test_an_empty_or_noisy_picture_shows_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for pixels in (np.full((64, 64, 3), 250, np.uint8), noise):
        image = Image.fromarray(pixels)
        assert not any(recogniser.shows_subject(image, subject) for subject in world.SUBJECTS)
        assert not recogniser.agrees(image, world.Scene((world.Item("circle", "red", "left"),)))


@pytest.mark.parametrize("subject", world.SUBJECTS)
def test_subjects_are_recognised_and_nothing_else_is_taken_for_them(subject: str) -> None:
    rng = random.Random(0)
    scenes = world.subject_scenes(subject)
    assert all(recogniser.shows_subject(world.render(scene, rng), subject) for scene in scenes)
    others = [world.with_toys(world.sample_scene(rng), rng, 0.5) for _ in range(200)]
    others += [scene for other in world.SUBJECTS if other != subject for scene in world.subject_scenes(other)]
    assert sum(recogniser.shows_subject(world.render(scene, rng), subject) for scene in others) <= 0.01 * len(others)


def test_a_toy_is_named_by_its_class_alone_and_drawn_where_it_stands() -> None:
    rng = random.Random(0)
    scene = world.with_toys(world.sample_scene(rng, 2), rng, 1.0)
    assert world.caption(scene).count(world.CLASS_NOUN) == 2
    assert not any(color in world.caption(scene) for color in world.COLORS)
    drawn = np.asarray(world.render(scene)).astype(int)
    apart = np.abs(drawn - world.BACKGROUNDS[scene.background]).sum(-1) > 60
    assert apart[:, :32].any() and apart[:, 32:].any()
    assert world.with_toys(scene, rng, 0.0) == scene


def test_held_out_scenes_are_never_drawn_for_training() -> None:
    rng = random.Random(0)
    seen = {world.sample_scene(rng) for _ in range(2000)}
    held_out = {world.sample_scene(rng, held_out_only=True) for _ in range(500)}
    assert held_out and not seen & held_out


def test_every_word_of_a_caption_is_one_token() -> None:
    words, rng = models.tokenizer(), random.Random(0)
    for _ in range(300):
        text = world.caption(world.sample_scene(rng), rng)
        ids = words(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= models.MAX_TOKENS


def test_captions_say_what_is_drawn() -> None:
    scene = world.Scene((world.Item("star", "red", "left", "small"), world.Item("cross", "blue", "right")), "gray")
    assert world.caption(scene) == (
        "a small red star on the left and a large blue cross on the right, gray background, solid"
    )
