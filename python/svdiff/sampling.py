"""Pictures from a pipeline: any number of prompts in batches, each picture with a seed of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .latents import decoding_in_its_own_precision
from .progress import progress_options
from .termination import exit_if_told

if TYPE_CHECKING:
    from .adapter import Adapter


def sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float | None,
    resolution: tuple[int, int],
    negative_prompt: str | None = None,
    adapter: Adapter | None = None,
    mixes: Sequence[Mapping[str, float]] = (),
    on_step: Callable[[int, int], object] | None = None,
) -> Iterator[Image.Image]:
    """One picture per prompt, in order; a picture depends on its prompt and seed, not on its neighbours.

    Args:
        pipeline: a text-to-image pipeline of diffusers.
        prompts: what to draw.
        seeds: of the noise, one per prompt.
        batch_size: pictures drawn at a time.
        num_inference_steps: of the pipeline's scheduler.
        guidance_scale: of classifier-free guidance, 1 is none; None for what the pipeline takes.
        resolution: height and width in pixels.
        negative_prompt: what not to draw, in all pictures.
        adapter: of the pipeline, if each picture is to have its own of `mixes`.
        mixes: one per prompt.
        on_step: told after each step of the scheduler how many are done, and of how many for all pictures.
    """
    total = len(prompts)
    steps_done = itertools.count(1)
    all_steps = num_inference_steps * -(-total // batch_size)

    how: dict[str, Any] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if on_step is not None:

        def tell(pipeline: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            exit_if_told()
            on_step(min(next(steps_done), all_steps), all_steps)  # some schedulers call twice for a step
            return state

        how["callback_on_step_end"] = tell
    for start in range(0, total, batch_size):
        exit_if_told()
        part = list(prompts[start : start + batch_size])
        pipeline.set_progress_bar_config(
            desc=f"Drawing {start + len(part)}/{total}", leave=start + len(part) == total, **progress_options()
        )
        if negative_prompt is not None:
            how["negative_prompt"] = [negative_prompt] * len(part)
        if adapter is not None:
            adapter.set_adapters_per_sample(mixes[start : start + batch_size])
        with decoding_in_its_own_precision(pipeline.vae):
            images = pipeline(
                part,
                height=resolution[0],
                width=resolution[1],
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]],
                **how,
            ).images
        yield from images


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """All pictures in one, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG that is whole as soon as it can be seen."""
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG")
    partial.replace(path)


@dataclass(frozen=True)
class WantedPicture:
    """A picture that a command is to draw, as its run file tells it.

    Attributes:
        file: its name in the output directory.
        prompt: what it shall show.
        seed: of its noise.
    """

    file: str
    prompt: str
    seed: int


def wanted_pictures(prompts: Sequence[str], num_images_per_prompt: int, seed: int) -> list[WantedPicture]:
    """So many pictures of each prompt, prompt by prompt; the first has this seed, the next has the next."""
    return [
        WantedPicture(f"{i:03d}_{slug(prompt)}_seed{own}.png", prompt, own)
        for i, prompt in enumerate(prompts)
        for own in range(seed + i * num_images_per_prompt, seed + (i + 1) * num_images_per_prompt)
    ]


def save_pictures(images: Iterable[Image.Image], wanted: Sequence[WantedPicture], directory: Path) -> list[Image.Image]:
    """Write pictures into a directory as they come; returns them."""
    drawn = []
    for image, picture in zip(images, wanted, strict=True):
        save_picture(image, directory / picture.file)
        drawn.append(image)
    return drawn


def slug(text: str, length: int = 40) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w]+", "-", text).strip("-")[:length].rstrip("-") or "picture"
