"""What pictures are worth: by the recogniser, which reads them by rule, and by the encoder that stands in for CLIP."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL.Image import Image
from svdiff.evaluation import load_miniature_encoder, metrics
from svdiff.miniature import world
from svdiff.miniature.task import agreeing, recognised, unchanged
from torch import Tensor

from .runs import Figures

_REAL = 256


@cache
def _encoder() -> Any:
    return load_miniature_encoder()


@cache
def _real_features() -> Tensor:
    """Of rendered scenes, others than those that are asked for: what the base was taught to draw."""
    rng = random.Random("real")
    return image_features([world.render(world.sample_scene(rng, 1, held_out_only=True), rng) for _ in range(_REAL)])


def image_features(images: Sequence[Image]) -> Tensor:
    """``[N, D]``."""
    return _encoder().images(images)


def subject_marks(images: Sequence[Image], scenes: Sequence[world.Scene], examples: Sequence[Image]) -> Figures:
    """Of pictures of a subject in new scenes.

    Args:
        images: N of them.
        scenes: what each was asked to show.
        examples: what the subject was learnt from.
    """
    features = image_features(images)
    return {
        "recognised": recognised(images, scenes),
        "agreeing": agreeing(images, scenes),
        "text_alignment": metrics.text_alignment(features, _encoder().texts([said(scene) for scene in scenes])).item(),
        "image_alignment": metrics.image_alignment(features, image_features(examples)).item(),
    }


def class_marks(images: Sequence[Image], scenes: Sequence[world.Scene], before: Sequence[Image]) -> Figures:
    """Of pictures that have nothing to do with what was learnt.

    Args:
        images: N of them.
        scenes: what each was asked to show.
        before: the base model's, of the same prompts and noise.
    """
    features, base = image_features(images), image_features(before)
    return {
        "unchanged": unchanged(images, scenes),
        "drift": metrics.drift(features, base).item(),
        "kid": metrics.kid(features, _real_features()).item(),
    }


def toy_marks(images: Sequence[Image], subject: str) -> Figures:
    """Of pictures of "a toy", all with one prompt: whether the subject has taken its place, and how unlike they are."""
    features = image_features(images)
    scene = world.Scene((world.Item(subject, "", "center"),))
    return {
        "leaked": recognised(images, [scene] * len(images)),
        "diversity": metrics.diversity(metrics.cosine_distances(features), [0] * len(images)).item(),
    }


def said(scene: world.Scene) -> str:
    """A scene of subjects in words that the encoder knows."""
    return world.with_rare_tokens(scene, {item.shape: "" for item in scene.items}).replace("  ", " ")
