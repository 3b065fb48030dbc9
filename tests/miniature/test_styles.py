"""The miniature's styles: pretraining never showed them, rules tell them, and what stands where can still be read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from svdiff.latents import encode
from svdiff.miniature import load_pipeline, world
from svdiff.miniature.evaluate import draw
from svdiff.miniature.styles import STYLES

COUNT = 150
DRAWN = 50


@cache
def scenes() -> list[world.Scene]:
    rng = random.Random(1)
    return [world.sample_scene(rng, held_out_only=True) for _ in range(COUNT)]


@cache
def renderings() -> list[Image.Image]:
    rng = random.Random(2)
    return [world.render(scene, rng) for scene in scenes()]


@cache
def drawings() -> list[Image.Image]:
    """Of the base model, of as many prompts."""
    return draw(load_pipeline(), [world.caption(scene) for scene in scenes()[:DRAWN]], 0)


def through_the_vae(images: Sequence[Image.Image]) -> list[Image.Image]:
    pipeline, found = load_pipeline(), []
    with torch.no_grad():
        for start in range(0, len(images), 50):
            latents, _ = encode(pipeline.vae, pipeline.image_processor.preprocess(list(images[start : start + 50])))
            decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
            found += pipeline.image_processor.postprocess(decoded, output_type="pil")
    return found


def share(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)


@pytest.mark.parametrize("name", STYLES)
def test_the_rule_tells_the_style_and_nothing_else(name: str) -> None:
    style = STYLES[name]
    styled = [style.apply(image) for image in renderings()]
    assert share([style.shows(image) for image in styled]) >= 0.98
    assert share([style.shows(image) for image in renderings()]) <= 0.02
    assert share([style.shows(image) for image in drawings()]) <= 0.02
    for other in STYLES.keys() - {name}:
        assert share([style.shows(STYLES[other].apply(image)) for image in renderings()[:50]]) <= 0.02


@pytest.mark.parametrize("name", STYLES)
def test_what_stands_where_is_read_in_spite_of_it(name: str) -> None:
    style = STYLES[name]
    styled = [style.apply(image) for image in renderings()]
    assert share([style.keeps(image, scene) for image, scene in zip(styled, scenes(), strict=True)]) >= 0.98
    assert all(style.places(image, scene) for image, scene in zip(styled, scenes(), strict=True))
    others = scenes()[1:] + scenes()[:1]
    wrong = [style.keeps(image, scene) for image, scene in zip(styled, others, strict=True)]
    same = [_shapes(a) == _shapes(b) for a, b in zip(scenes(), others, strict=True)]
    assert wrong == same


@pytest.mark.parametrize("name", STYLES)
def test_it_survives_the_autoencoder(name: str) -> None:
    """Or no model could learn it."""
    style = STYLES[name]
    styled = through_the_vae([style.apply(image) for image in renderings()])
    assert share([style.shows(image) for image in styled]) >= 0.98
    assert share([style.keeps(image, scene) for image, scene in zip(styled, scenes(), strict=True)]) >= 0.9


@pytest.mark.parametrize("name", STYLES)
def test_a_filter_changes_much_and_always_the_same(name: str) -> None:
    for image in renderings()[:5]:
        once, again = (np.asarray(STYLES[name].apply(image)).astype(int) for _ in range(2))
        assert np.array_equal(once, again)
        assert np.abs(once - np.asarray(image)).mean() > 10


def _shapes(scene: world.Scene) -> list[tuple[str, str]]:
    return sorted((item.position, item.shape) for item in scene.items)
