"""A style, from two dozen pictures: other pictures are drawn anew in it, image to image.

Styles are filters that pretraining never saw; whether a picture is in one, and whether its shapes are where they were,
is told by rule. So what an exact stylisation would give is known, too: the filter of the content.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import svdiff
from PIL.Image import Image
from PIL.Image import fromarray as image_of
from svdiff import TrainConfig
from svdiff.evaluation import metrics
from svdiff.miniature import load_pipeline, recogniser, world
from svdiff.miniature.evaluate import GUIDANCE, STEPS, draw
from svdiff.miniature.styles import STYLES, Style
from svdiff.miniature.task import share, unchanged
from svdiff.pipelines import set_scheduler
from svdiff.sampling import grid, save_picture
from svdiff.stylize import stylized

from .contenders import STYLISTS, Contender
from .marks import image_features
from .runs import Figures, Run
from .teach import config_of_pictures, trained

TAUGHT = ("shadow", "blueprint", "bars")
KNOWN = "black ground"
_LEARNT, _STEPS = 24, 300
_JUDGED = 64
_STRENGTH = {KNOWN: 0.95}  # at 0.8, the papers', half of a ground shines through
_WORD = "<style>"
_SAME = 60.0  # RGB distance from the ground


def _on(image: Image, ground: str) -> Image:
    """The picture of a scene before another ground."""
    pixels = np.asarray(image, dtype=float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    is_ground = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) < _SAME
    pixels = np.where(is_ground[..., None], np.array(world.BACKGROUNDS[ground], dtype=float), pixels)
    return image_of(pixels.astype(np.uint8))


def _is_on_black(image: Image) -> bool:
    return recogniser.read(image).background == "black"


ALL: dict[str, Style] = {
    **{name: STYLES[name] for name in TAUGHT},
    KNOWN: Style(apply=lambda image: _on(image, "black"), shows=_is_on_black, undo=lambda image: image),
}
"""Those that the base has never seen, and what it can draw without more: what a new word alone can be taught."""


def run(one: Run, work: Path) -> Figures:
    """Teach, stylise and judge."""
    contender, style, folder = STYLISTS[one.contender], ALL[one.case], one.folder(work)
    folder.mkdir(parents=True, exist_ok=True)
    figures: Figures = {"ways": {}}
    pipeline = load_pipeline()
    if contender is not None:
        config = _config(contender, one, folder)
        result = svdiff.train(config)
        pipeline = trained(config, result.output_dir, fused=True)
        figures["numbers"] = result.num_parameters
        figures["bytes"] = sum(file.stat().st_size for file in result.files)
    set_scheduler(pipeline, "dpm++")
    rng = random.Random(f"contents/{one.seed}")
    scenes = [world.sample_scene(rng, 1, held_out_only=True) for _ in range(_JUDGED)]
    if one.case == KNOWN:  # on black already there would be nothing to do
        scenes = [replace(scene, background="white", style="solid") for scene in scenes]
    contents = [world.render(scene, rng) for scene in scenes]
    prompts = [_prompt(scene, contender) for scene in scenes]
    wanted = image_features([style.apply(image) for image in contents])
    before = image_features(contents)
    for way, inverted in (("plain", False), ("stochastic inversion", True)):
        images = stylized(
            pipeline,
            contents,
            prompts,
            range(1000 * one.seed, 1000 * one.seed + _JUDGED),
            strength=_STRENGTH.get(one.case, 0.8),
            stochastic_inversion=inverted,
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
        )
        save_picture(grid([*contents[:8], *images[:8]], 8), folder / f"{way.split()[0]}.png")
        features = image_features(images)
        shown = [style.shows(image) for image in images]
        kept = [style.keeps(image, scene) for image, scene in zip(images, scenes, strict=True)]
        figures["ways"][way] = {
            "shown": share(shown),
            "kept": share(kept),
            "both": share(a and b for a, b in zip(shown, kept, strict=True)),
            "fid": metrics.fid(features, wanted).item(),
            "content_distance": metrics.drift(features, before).item(),
        }
    others = [world.sample_scene(rng, 1, held_out_only=True) for _ in range(_JUDGED)]
    plain = draw(pipeline, [world.caption(scene) for scene in others], 1000 * (one.seed + 1))
    return {**figures, "unchanged": unchanged(plain, others)}


def _config(contender: Contender, one: Run, folder: Path) -> TrainConfig:
    rng = random.Random(f"style/{one.seed}")
    pictures = []
    for _ in range(_LEARNT):
        scene = world.sample_scene(rng, 1)
        pictures.append((ALL[one.case].apply(world.render(scene, rng)), _prompt(scene, contender)))
    return config_of_pictures(folder, pictures, **{"max_train_steps": _STEPS, "seed": one.seed, **contender.settings})


def _prompt(scene: world.Scene, contender: Contender | None) -> str:
    """What stands where, and that it is in the style: by its own word, or by a rare one."""
    said = world.caption(scene).partition(",")[0]
    return f"{said}, in the style of {_WORD if contender and contender.new_words else world.RARE_TOKENS[0]}"
