"""Pictures of the subject's class, drawn by the base model where there are not enough of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from svdiff_kernels import SVDiffError

from ..pipelines import default_resolution, set_scheduler
from ..sampling import sample, save_picture
from .concepts import Concept
from .config import TrainConfig
from .data import Picture, find_pictures, load_picture
from .precision import autocast

_DRAWN = re.compile(r"class_\d{5}\.png")


def classes_of(
    config: TrainConfig, host: Any, pipeline: Any, concepts: Sequence[Concept], default: Path
) -> list[list[Picture]]:
    """Pictures of each concept's class; concepts that share a folder and prompts share pictures.

    Args:
        config: settings of the run.
        host: accelerate's handle.
        pipeline: the base; its scheduler stays as it is.
        concepts: the subjects.
        default: folder for those that have none of their own.

    Raises:
        SVDiffError: see `class_pictures`.
    """
    if not config.with_prior_preservation:
        return []
    own_scheduler = pipeline.scheduler
    if config.prior_generation_scheduler_type is not None:
        set_scheduler(pipeline, config.prior_generation_scheduler_type)
    name = config.prior_generation_precision
    precision = config.mixed_precision if name == "model" else name
    drawn: dict[tuple[str | None, tuple[str, ...]], list[Picture]] = {}
    for concept in concepts:
        key = concept.class_data_dir, concept.class_prompt
        if key in drawn:
            continue
        own = default / (f"{len(drawn) + 1}" if len(concepts) > 1 else "")
        with autocast(precision, host.device):
            drawn[key] = class_pictures(
                pipeline,
                Path(concept.class_data_dir or own).expanduser(),
                concept.class_prompt,
                config.num_class_images,
                batch_size=config.sample_batch_size,
                num_inference_steps=config.prior_generation_num_inference_steps,
                guidance_scale=config.prior_generation_guidance_scale,
                resolution=config.resolution or default_resolution(pipeline),
                seed=config.seed,
                device=host.device,
                process=host.process_index,
                processes=host.num_processes,
                wait=host.wait_for_everyone,
            )
    pipeline.scheduler = own_scheduler
    return [drawn[concept.class_data_dir, concept.class_prompt] for concept in concepts]


def class_pictures(
    pipeline: Any,
    directory: Path,
    prompts: Sequence[str],
    count: int,
    *,
    batch_size: int,
    num_inference_steps: int,
    guidance_scale: float | None,
    resolution: int,
    seed: int,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> list[Picture]:
    """At least `count` pictures of the class: those in the folder, and new ones drawn into it.

    New pictures take the prompts in turn, and get a ``.txt`` with the prompt beside them, so that a later run finds
    pictures and captions. Which is which is told by their names: what a stopped run has not drawn is drawn by the next.

    Args:
        pipeline: the base, with the scheduler to draw with.
        directory: where they are, or will be.
        prompts: what the class is called; also the caption of pictures without one, if there is one prompt only.
        count: how many are needed.
        batch_size: pictures drawn at a time.
        num_inference_steps: of the scheduler.
        guidance_scale: see `sample`.
        resolution: side in pixels.
        seed: of picture 0; picture 1 has the next seed.
        device: where to draw; the pipeline goes there, if anything has to be drawn.
        process: number of this process; each draws its share.
        processes: how many there are.
        wait: returns when all processes have called it.

    Raises:
        SVDiffError: the folder cannot be written, or a picture in it has no caption, or is damaged.
    """
    caption = prompts[0] if len(prompts) == 1 else None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        present = _present(directory, caption)
        for picture in present:
            load_picture(picture, [(resolution, resolution)])  # a damaged one need not wait for the others to be drawn
        others = sum(not _DRAWN.fullmatch(picture.path.name) for picture in present)
        missing = [i for i in range(count - others) if not (directory / f"class_{i:05d}.png").exists()]
        wait()  # or what another process has drawn by then would not be missing
        # Whole batches, or what is drawn would depend on where a stopped run was, by the rounding of other sums.
        batches = sorted({i // batch_size for i in missing})[process::processes]
        mine = [i for batch in batches for i in range(count - others)[batch * batch_size :][:batch_size]]
        drawn = [prompts[i % len(prompts)] for i in mine]
        if mine:
            pipeline.to(device)
        images = sample(
            pipeline,
            drawn,
            [seed + i for i in mine],
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            resolution=(resolution, resolution),
        )
        for i, image, prompt in zip(mine, images, drawn, strict=True):
            if i not in missing:
                continue
            path = directory / f"class_{i:05d}.png"
            path.with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")
            save_picture(image, path)
        wait()
    except OSError as error:
        raise SVDiffError(f"cannot write class pictures to {directory}: {error.strerror or error}") from error
    return _present(directory, caption)


def _present(directory: Path, caption: str | None) -> list[Picture]:
    return find_pictures(directory, caption) if any(directory.iterdir()) else []
