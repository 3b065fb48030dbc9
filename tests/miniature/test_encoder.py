"""The miniature's encoder: what it tells apart, and that it was never shown a subject."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import svdiff.miniature
import torch
from svdiff.evaluation import image_alignment, load_clip, load_miniature_encoder
from svdiff.miniature import pretrain_encoder, recogniser, world
from svdiff.miniature.claims import of_reading, of_scene, said, true
from svdiff.miniature.encoder import load_encoder, pixel_values, retrieval
from svdiff.miniature.pretrain_encoder import caption, contrast, said_of

WEIGHTS = Path(svdiff.miniature.__file__).parent / "weights" / "clip"


def test_it_tells_held_out_captions_and_pictures_apart() -> None:
    model, processor = load_encoder()
    right_caption, right_picture = retrieval(model, processor.tokenizer, scenes=200, seed=1)
    assert right_caption > 0.9
    assert right_picture > 0.9


def test_its_folder_is_a_clip_model_of_transformers() -> None:
    named, plain = load_miniature_encoder(), load_clip(str(WEIGHTS))
    assert (named.name, plain.name) == ("miniature encoder", "CLIP")
    scenes = [world.Scene((world.Item("star", "red", place),)) for place in world.POSITIONS]
    images, texts = [world.render(scene) for scene in scenes], [world.caption(scene) for scene in scenes]
    torch.testing.assert_close(named.images(images), plain.images(images))
    torch.testing.assert_close(named.texts(texts), plain.texts(texts))
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 2_000_000


def test_its_processor_is_what_it_was_trained_with() -> None:
    _, processor = load_encoder()
    images = [world.render(world.sample_scene(random.Random(i))) for i in range(3)]
    ours = processor.image_processor(images=images, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, pixel_values(images), rtol=0, atol=1e-5)
    assert json.loads((WEIGHTS / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 64}


def test_a_subject_is_most_like_itself() -> None:
    """Of subjects that it has never seen, in other places and on other grounds."""
    encoder, rng = load_miniature_encoder(), random.Random(0)
    found = {}
    for name in world.SUBJECTS:
        found[name] = encoder.images([world.render(scene, rng) for scene in world.subject_scenes(name)])
    alike = np.array([[image_alignment(found[a][1::2], found[b][::2]).item() for b in found] for a in found])
    toys = [world.render(world.with_toys(world.sample_scene(rng, 1), rng, 1.0), rng) for _ in range(100)]
    others = encoder.images(toys)
    for k, name in enumerate(found):
        assert alike[k, k] > np.delete(alike[k], k).mean() + 0.1
        assert alike[k, k] > image_alignment(others, found[name]).item() + 0.1
    assert (alike.argmax(1) == np.arange(len(found))).sum() >= len(found) - 1  # flower and robot share their colours


def test_scenes_and_captions_of_training() -> None:
    rng = random.Random(0)
    scenes = [world.with_toys(world.sample_scene(rng), rng, 0.5) for _ in range(200)]
    captions = [caption(scene, rng) for scene in scenes]
    matches = said_of(captions, scenes)
    assert matches.shape == (200, 200)
    assert matches.diagonal().all()
    assert 200 < matches.sum() < 2000
    words = {word for text in captions for word in text.replace(",", "").split()}
    assert not words & set(world.SUBJECTS)
    assert not {item.shape for scene in scenes for item in scene.items} & set(world.SUBJECTS)


def test_pretraining_ends_in_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--output_dir", str(tmp_path / "clip"), "--steps", "2", "--batch_size", "6", "--checkpoint_every", "1"]
    monkeypatch.setattr(sys, "argv", ["pretrain_encoder", *flags])
    pretrain_encoder.main()
    encoder = load_clip(str(tmp_path / "clip"))
    (image,) = encoder.images([world.render(world.Scene((world.Item("star", "red", "left"),)))])
    assert image.shape == (64,)
    shipped = {file.name for file in WEIGHTS.iterdir()}
    assert {file.name for file in (tmp_path / "clip").iterdir() if file.is_file()} == shipped


def test_claims() -> None:
    scene = world.Scene((world.Item("star", "red", "left"), world.Item("heart", "blue", "right", "small")), "gray")
    for text, right in {
        "a red star on the left and a blue heart on the right": True,
        "a small blue heart on the right and a large toy on the left, gray background, solid": True,
        "a sks toy on the right and a toy on the left": True,
        "a red star on the left": False,
        "a red star on the left and a blue heart on the left": False,
        "a red star on the left and a large blue heart on the right": False,
        "a blue star on the left and a red heart on the right": False,
        "a toy on the left and a toy on the right, white background": False,
        "a toy on the left and a toy on the right, outline": False,
    }.items():
        assert true(said(text), of_scene(scene)) is right, text
        assert true(said(text), of_reading(recogniser.read(world.render(scene)))) is right, text
    assert said("a dog").items == ()


def test_contrast_is_the_loss_of_clip_without_pairs_excused() -> None:
    logits = torch.randn(5, 5)
    own = torch.arange(5)
    plain = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    assert contrast(logits).item() == pytest.approx(plain.item())
    excused = torch.eye(5, dtype=torch.bool)  # a pair of its own is never excused
    assert contrast(logits, excused).item() == pytest.approx(plain.item())
    excused[0, 3] = True
    logits[0, 3] = 50.0
    assert contrast(logits, excused) < 10 < contrast(logits)
