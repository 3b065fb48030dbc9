"""Personalisation to be judged: a few pictures of each subject to learn from, new prompts, and marks for what is drawn.

A subject is one of `world.SUBJECTS`, which pretraining has never shown; a rare token stands for it.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from . import recogniser, world
from .evaluate import draw

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_CLASS_PICTURES = 160
EXAMPLES = (
    ("left", "large", "white"),
    ("right", "large", "gray"),
    ("center", "large", "black"),
    ("center", "small", "white"),
    ("left", "small", "gray"),
    ("right", "small", "black"),
)
"""Of the first four, which show every position, size and background, one is small: of what is shown large on a side a
model may draw a small one there, but hardly the other way round. Six show every size at every position."""

_GROUND = "gray"
"""Of subjects that are put side by side: no caption could tell of two grounds."""


@dataclass(frozen=True)
class Task:
    """What to teach, and what to ask.

    Attributes:
        subjects: keys of `world.SUBJECTS`.
        seed: of everything that chance decides here.
        pictures: of each subject to learn from, up to six.
        new_words: whether a subject is called by a word that is new to the tokenizer, not by a rare one.
        apart: whether several subjects are taught each by itself, and so on every ground.
        rare: the words that stand for the subjects, or that theirs are made of.
    """

    subjects: tuple[str, ...]
    seed: int = 0
    pictures: int = 4
    new_words: bool = False
    apart: bool = False
    rare: tuple[str, ...] = world.RARE_TOKENS

    def token(self, subject: str) -> str:
        """The word that stands for a subject."""
        rare = self.rare[self.subjects.index(subject)]
        return f"<{rare}>" if self.new_words else rare

    def write_pictures(self, folder: Path, subject: str) -> list[Image]:
        """Render the examples of a subject, with their captions in ``metadata.jsonl``."""
        folder.mkdir(parents=True, exist_ok=True)
        images, lines = self.examples(subject), []
        for i, (image, scene) in enumerate(zip(images, self._split(subject)[0], strict=True)):
            image.save(folder / f"{i}.png")
            phrase = f"a {scene.items[0].size} {self.token(subject)} {world.CLASS_NOUN}"
            lines.append(json.dumps({"file_name": f"{i}.png", "text": self.prompt(scene), "phrase": phrase}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return images

    def examples(self, subject: str) -> list[Image]:
        """The pictures of a subject to learn from."""
        rng = random.Random(self.seed)
        return [world.render(scene, rng) for scene in self._split(subject)[0]]

    def prompt(self, scene: world.Scene) -> str:
        """A scene of subjects in words, each by its token."""
        return world.with_rare_tokens(scene, {subject: self.token(subject) for subject in self.subjects})

    def new_scenes(self, count: int) -> list[world.Scene]:
        """Scenes of one subject that no example shows: every position, size and background, again and again."""
        scenes = [scene for subject in self.subjects for scene in self._split(subject)[1]]
        random.Random(self.seed).shuffle(scenes)
        return [scenes[i % len(scenes)] for i in range(count)]

    def pairs(self, count: int, *, elsewhere: bool = False) -> list[tuple[str, world.Scene]]:
        """Prompts for two subjects, and what they ask for, again and again.

        Every ordered pair, with every size of each, whichever is named first; on the ground that the pictures show, or
        on the others.
        """
        grounds = [ground for ground in world.BACKGROUNDS if (ground != _GROUND) == elsewhere]
        asked = []
        for subjects in itertools.permutations(self.subjects, 2):
            for sizes, ground in itertools.product(itertools.product(world.SIZES, repeat=2), grounds):
                scene = world.Scene(tuple(map(world.Item, subjects, ("", ""), ("left", "right"), sizes)), ground)
                turned = replace(scene, items=scene.items[::-1])
                asked += [(self.prompt(named), scene) for named in (scene, turned)]
        random.Random(self.seed).shuffle(asked)
        return [asked[i % len(asked)] for i in range(count)]

    def other_scenes(self, count: int) -> list[world.Scene]:
        """Scenes of plain objects, held out from pretraining: what should stay as it is."""
        rng = random.Random(self.seed)
        return [world.sample_scene(rng, 1, held_out_only=True) for _ in range(count)]

    def class_prompts(self) -> list[str]:
        """For prior pictures: toys of no kind wherever a subject is taught to stand, and plain scenes."""
        rng = random.Random(f"prior/{self.seed}")
        toys = [
            f"a {size} {world.CLASS_NOUN} {world.place(position)}, {background} background"
            for position in world.POSITIONS
            for size in world.SIZES
            for background in ([_GROUND] if self.side_by_side else world.BACKGROUNDS)
        ]
        if self.side_by_side:
            toys *= 12  # of which mixtures are made, and so not of too few
        scenes = [world.sample_scene(rng, None if self.side_by_side else 1) for _ in range(_CLASS_PICTURES - len(toys))]
        return toys + [world.caption(scene) for scene in scenes]

    def draw(self, pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> list[Image]:
        """A picture of each prompt, the same noise for every model."""
        return draw(pipeline, prompts, 1000 * (self.seed + 1))

    @property
    def side_by_side(self) -> bool:
        """Whether pictures are to show several subjects together."""
        return len(self.subjects) > 1 and not self.apart

    def _split(self, subject: str) -> tuple[list[world.Scene], list[world.Scene]]:
        """The scenes to learn from, and the others."""
        scenes = world.subject_scenes(subject)
        by_look = {(s.items[0].position, s.items[0].size, s.background): s for s in scenes}
        examples = [by_look[p, z, _GROUND if self.side_by_side else g] for p, z, g in EXAMPLES[: self.pictures]]
        return examples, [scene for scene in scenes if scene not in examples]


def recognised(images: Sequence[Image], scenes: Sequence[world.Scene]) -> float:
    """Share of pictures in which the (first) subject of the scene is to be seen at all."""
    return share(recogniser.shows_subject(i, s.items[0].shape) for i, s in zip(images, scenes, strict=True))


def agreeing(images: Sequence[Image], scenes: Sequence[world.Scene]) -> float:
    """Share of pictures with all the subjects of the scene and nothing else, each where it should be, on its ground."""
    right = []
    for image, scene in zip(images, scenes, strict=True):
        reading = recogniser.read(image)
        seen = [(one.subject, one.item.position) for one in reading.seen]
        wanted = [(item.shape, item.position) for item in scene.items]
        right.append(seen == wanted and reading.background == scene.background)
    return share(right)


def both_in_place(images: Sequence[Image], scenes: Sequence[world.Scene]) -> float:
    """Share of pictures with both subjects of the scene, each on the asked side, whatever the ground."""
    right = []
    for image, scene in zip(images, scenes, strict=True):
        seen = [(one.subject, one.item.position) for one in recogniser.read(image).seen]
        right.append(seen == [(item.shape, item.position) for item in scene.items])
    return share(right)


def unchanged(images: Sequence[Image], scenes: Sequence[world.Scene]) -> float:
    """Share of pictures that show a plain scene as its caption says."""
    return share(recogniser.agrees(image, scene) for image, scene in zip(images, scenes, strict=True))


def share(right: Iterable[bool]) -> float:
    """How many of so many, in 0..1."""
    marks = list(right)
    return sum(marks) / len(marks)
