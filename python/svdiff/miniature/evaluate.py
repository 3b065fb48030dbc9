"""How well the miniature draws what it is asked for: `python -m svdiff.miniature.evaluate`."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL.Image import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from . import load_pipeline, recogniser, world

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
    figures = {
        "recogniser_accuracy": recogniser_accuracy(config.scenes),
        "agreement_one_object": agreement(pipeline, 1, config.prompts),
        "agreement_two_objects": agreement(pipeline, 2, config.prompts),
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


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int = 0, batch: int = 32) -> list[Image]:
    """One picture per prompt with DPM-Solver++, `STEPS` steps, guidance `GUIDANCE`."""
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    sampler = StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    sampler.set_progress_bar_config(disable=True)
    images: list[Image] = []
    for start in tqdm(range(0, len(prompts), batch), "drawing", leave=False, disable=len(prompts) <= batch):
        part = prompts[start : start + batch]
        generator = torch.Generator().manual_seed(seed + start)
        images += sampler(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator).images
    return images


if __name__ == "__main__":
    main()
