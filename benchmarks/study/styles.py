"""A style, from two dozen pictures: other pictures are drawn anew in it, image to image.

Styles are filters that pretraining never saw; whether a picture is in one, and whether its shapes are where they were,
is told by rule. So what an exact stylisation would give is known, too: the filter of the content.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import svdiff
from svdiff import TrainConfig
from svdiff.evaluation import metrics
from svdiff.miniature import world
from svdiff.miniature.evaluate import GUIDANCE, STEPS, draw
from svdiff.miniature.styles import STYLES
from svdiff.miniature.task import share, unchanged
from svdiff.pipelines import set_scheduler
from svdiff.sampling import grid, save_picture
from svdiff.stylize import stylized

from .contenders import STYLISTS, Contender
from .marks import image_features
from .runs import Figures, Run
from .teach import trained

TAUGHT = ("shadow", "blueprint", "bars")
_LEARNT = 24
_JUDGED = 64
_STRENGTH = 0.8
_WORD = "<style>"


def run(one: Run, work: Path) -> Figures:
    """Teach, stylise and judge."""
    contender, style, folder = STYLISTS[one.contender], STYLES[one.case], one.folder(work)
    config = _config(contender, one, folder)
    result = svdiff.train(config)
    pipeline = trained(config, result.output_dir, fused=True)
    set_scheduler(pipeline, "dpm++")
    rng = random.Random(f"contents/{one.seed}")
    scenes = [world.sample_scene(rng, 1, held_out_only=True) for _ in range(_JUDGED)]
    contents = [world.render(scene, rng) for scene in scenes]
    prompts = [_prompt(scene, contender) for scene in scenes]
    wanted = image_features([style.apply(image) for image in contents])
    before = image_features(contents)
    figures: Figures = {
        "numbers": result.num_parameters,
        "bytes": sum(file.stat().st_size for file in result.files),
        "ways": {},
    }
    for way, inverted in (("plain", False), ("stochastic inversion", True)):
        images = stylized(
            pipeline,
            contents,
            prompts,
            range(1000 * one.seed, 1000 * one.seed + _JUDGED),
            strength=_STRENGTH,
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
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(f"style/{one.seed}"), []
    for i in range(_LEARNT):
        scene = world.sample_scene(rng, 1)
        STYLES[one.case].apply(world.render(scene, rng)).save(pictures / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": _prompt(scene, contender)}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": "miniature",
        "instance_data_dir": str(pictures),
        "output_dir": str(folder / "run"),
        "max_train_steps": 300,
        "checkpointing_steps": 3000,
        "lr_scheduler": "cosine",
        "train_batch_size": 8,
        "seed": one.seed,
        "report_to": "none",
        "overwrite": True,
    }
    return TrainConfig(**{**shared, **contender.settings})


def _prompt(scene: world.Scene, contender: Contender) -> str:
    """What stands where, and that it is in the style: by its own word, or by a rare one."""
    said = world.caption(scene).partition(",")[0]
    return f"{said}, in the style of {_WORD if contender.new_words else world.RARE_TOKENS[0]}"
