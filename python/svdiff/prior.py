"""Pictures of the subject's class, drawn by the base model where there are not enough of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdiff_kernels import SVDiffError

from .data import Picture, find_pictures
from .sampling import sample, save_picture


def class_pictures(
    pipeline: Any,
    directory: Path,
    prompts: Sequence[str],
    count: int,
    *,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int,
    seed: int,
) -> list[Picture]:
    """At least `count` pictures of the class: those in the folder, and new ones drawn into it.

    New pictures take the prompts in turn, and get a ``.txt`` with the prompt beside them, so that a later run finds
    pictures and captions.

    Args:
        pipeline: the base, with the scheduler to draw with.
        directory: where they are, or will be.
        prompts: what the class is called; also the caption of pictures without one, if there is one prompt only.
        count: how many are needed.
        batch_size: pictures drawn at a time.
        num_inference_steps: of the scheduler.
        guidance_scale: of classifier-free guidance.
        resolution: side in pixels.
        seed: of the first picture drawn; the next has the next seed.

    Raises:
        SVDiffError: the folder cannot be written, or a picture in it has no caption.
    """
    caption = prompts[0] if len(prompts) == 1 else None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        present = sum(1 for _ in directory.iterdir()) and len(find_pictures(directory, caption))
        drawn = [prompts[i % len(prompts)] for i in range(present, count)]
        images = sample(
            pipeline,
            drawn,
            [seed + i for i in range(present, count)],
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            resolution=(resolution, resolution),
        )
        for i, (image, prompt) in enumerate(zip(images, drawn, strict=True), start=present):
            path = directory / f"class_{i:05d}.png"
            path.with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")
            save_picture(image, path)
    except OSError as error:
        raise SVDiffError(f"cannot write class pictures to {directory}: {error.strerror or error}") from error
    return find_pictures(directory, caption)
