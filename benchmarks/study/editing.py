"""One picture, changed by words: who has learnt the picture keeps what the words do not change."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import svdiff
from svdiff.edit import edited
from svdiff.miniature import load_pipeline, world
from svdiff.sampling import grid, save_picture

from ..applications import changed, edit_marks, picture_config
from .contenders import EDITORS
from .runs import Figures, Run
from .teach import trained

_PICTURES = 6
ATTRIBUTES = ("color", "shape", "size")
STARTS: dict[str, dict[str, Any]] = {
    "noise": {"start_from": "noise"},
    "inversion": {},
    "inversion, eta 1": {"eta": 1.0},
    "image, strength 0.6": {"start_from": "image", "strength": 0.6},
}


def run(one: Run, work: Path) -> Figures:
    """Teach each picture by itself, and change it from every start; the case is what is changed."""
    contender, folder = EDITORS[one.contender], one.folder(work)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"editing/{one.case}/{one.seed}")
    scenes = [world.sample_scene(rng, 1) for _ in range(_PICTURES)]
    targets = [changed(scene, one.case, rng) for scene in scenes]
    originals = [world.render(scene, rng) for scene in scenes]
    drawn: dict[str, list[Any]] = {start: [] for start in STARTS}
    for i, (image, scene, target) in enumerate(zip(originals, scenes, targets, strict=True)):
        pipeline = load_pipeline()
        if contender is not None:
            place = folder / f"{i}"
            (place / "pictures").mkdir(parents=True, exist_ok=True)
            image.save(place / "pictures" / "image.png")
            config = picture_config(place, world.caption(scene), one.seed, **contender.settings)
            pipeline = trained(config, svdiff.train(config).output_dir, fused=True)
        for start, how in STARTS.items():
            drawn[start] += edited(pipeline, [image], [world.caption(target)], [i], **how)
    save_picture(
        grid([image for group in (originals, *drawn.values()) for image in group], _PICTURES), folder / "all.png"
    )
    return {"starts": {start: edit_marks(images, scenes, targets) for start, images in drawn.items()}}
