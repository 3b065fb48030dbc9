"""A word for a thing that the base can draw, from six pictures: what textual inversion is for.

The thing is a plain object, of which captions tell no shape and no colour: a new word does.
"""

from __future__ import annotations

import random
from pathlib import Path

import svdiff
from PIL.Image import Image
from svdiff import TrainConfig
from svdiff.miniature import recogniser, world
from svdiff.miniature.evaluate import draw
from svdiff.miniature.task import EXAMPLES, share, unchanged
from svdiff.sampling import grid, save_picture

from .contenders import NAMERS, Contender
from .runs import Figures, Run
from .teach import config_of_pictures, look, trained

THINGS = {
    "purple star": ("star", "purple"),
    "green heart": ("heart", "green"),
    "orange cross": ("cross", "orange"),
}
_JUDGED, _STEPS = 48, 400
_OTHERS = 64


def run(one: Run, work: Path) -> Figures:
    """Teach, draw and judge."""
    contender, folder = NAMERS[one.contender], one.folder(work)
    shape, color = THINGS[one.case]
    scenes = [
        world.Scene((world.Item(shape, color, position, size),), background)
        for position in world.POSITIONS
        for size in world.SIZES
        for background in world.BACKGROUNDS
    ]
    learnt = [scene for scene in scenes if look(scene) in EXAMPLES]
    new = [scene for scene in scenes if scene not in learnt]
    config = _config(contender, one, folder, learnt)
    result = svdiff.train(config)
    pipeline = trained(config, result.output_dir)
    asked = [new[i % len(new)] for i in range(_JUDGED)]
    images = draw(pipeline, [_prompt(scene, contender) for scene in asked], 1000 * (one.seed + 1))
    save_picture(grid(images, 8), folder / "subject.png")
    rng = random.Random(one.seed)
    others = [world.sample_scene(rng, 1, held_out_only=True) for _ in range(_OTHERS)]
    plain = draw(pipeline, [world.caption(scene) for scene in others], 1000 * (one.seed + 1))
    return {
        "numbers": result.num_parameters,
        "bytes": sum(file.stat().st_size for file in result.files),
        "recognised": share(_shows(image, shape, color) for image in images),
        "agreeing": unchanged(images, asked),
        "unchanged": unchanged(plain, others),
    }


def _config(contender: Contender, one: Run, folder: Path, scenes: list[world.Scene]) -> TrainConfig:
    rng = random.Random(one.seed)
    pictures = [(world.render(scene, rng), _prompt(scene, contender)) for scene in scenes]
    return config_of_pictures(folder, pictures, **{"max_train_steps": _STEPS, "seed": one.seed, **contender.settings})


def _prompt(scene: world.Scene, contender: Contender) -> str:
    item, word = scene.items[0], "<sks>" if contender.new_words else world.RARE_TOKENS[0]
    return f"a {item.size} {word} {world.place(item.position)}, {scene.background} background"


def _shows(image: Image, shape: str, color: str) -> bool:
    return any((seen.item.shape, seen.item.color) == (shape, color) for seen in recogniser.read(image).seen)
