"""How well the miniature draws what it is asked for, and its judges judge: `python -m svdiff.miniature.evaluate`."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL.Image import Image
from transformers import HfArgumentParser

from ..sampling import sample
from . import load_pipeline, recogniser, world
from .encoder import load_encoder, retrieval

STEPS = 20
GUIDANCE = 2.5


@dataclass
class EvaluateConfig:
    """What to evaluate on."""

    prompts: int = field(default=200, metadata={"help": "held-out prompts of each kind"})
    scenes: int = field(default=1000, metadata={"help": "rendered scenes that the recogniser itself is checked on"})
    output: str | None = field(default=None, metadata={"help": "also write the figures to this JSON file"})


def main() -> None:
    """Print the figures as JSON."""
    parser = HfArgumentParser(EvaluateConfig, prog="python -m svdiff.miniature.evaluate")
    (config,) = parser.parse_args_into_dataclasses()
    pipeline = load_pipeline()
    encoder, processor = load_encoder()
    right_caption, right_picture = retrieval(encoder, processor.tokenizer, scenes=config.prompts)
    figures = {
        "recogniser_accuracy": recogniser_accuracy(config.scenes),
        "agreement_one_object": agreement(pipeline, 1, config.prompts),
        "agreement_two_objects": agreement(pipeline, 2, config.prompts),
        "encoder_right_caption": right_caption,
        "encoder_right_picture": right_picture,
        "prompts": config.prompts,
    }
    print(json.dumps(figures, indent=2))
    if config.output:
        Path(config.output).write_text(json.dumps(figures, indent=2) + "\n")


def recogniser_accuracy(count: int = 1000, seed: int = 1) -> float:
    """Share of rendered scenes that the recogniser reads right."""
    rng = random.Random(seed)
    scenes = [world.sample_scene(rng) for _ in range(count)]
    return sum(recogniser.agrees(world.render(scene, rng), scene) for scene in scenes) / count


def agreement(pipeline: StableDiffusionPipeline, objects: int, prompts: int = 200, seed: int = 0) -> float:
    """Share of held-out prompts of so many objects whose picture the recogniser reads right.

    Right is: shape, colour and position of every object, and nothing else in the picture.
    """
    rng = random.Random(f"{seed}/held out/{objects}")
    scenes = [world.sample_scene(rng, objects, held_out_only=True) for _ in range(prompts)]
    images = draw(pipeline, [world.caption(scene) for scene in scenes], seed)
    return sum(recogniser.agrees(image, scene) for image, scene in zip(images, scenes, strict=True)) / prompts


def draw(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], seed: int | Sequence[int], **mixing: Any
) -> list[Image]:
    """A picture of each prompt by DPM-Solver++ in `STEPS` steps, guidance `GUIDANCE`.

    Args:
        pipeline: the miniature.
        prompts: what to draw.
        seed: of the first picture's noise, the next has the next; or of each.
        mixing: the adapter and the mixes of `sampling.sample`, if each prompt has its own.
    """
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    before = pipeline.scheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(before.config)
    try:
        return list(
            sample(
                pipeline,
                prompts,
                seeds,
                batch_size=32,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                resolution=(world.IMAGE_SIZE, world.IMAGE_SIZE),
                **mixing,
            )
        )
    finally:
        pipeline.scheduler = before


if __name__ == "__main__":
    main()
