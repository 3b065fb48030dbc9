"""Pictures of the model as it is, drawn while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..outputs import writing
from ..pipelines import default_resolution
from ..processes import by_the_first, share
from ..sampling import grid, sample, save_picture
from ..termination import Notice
from .config import TrainConfig
from .precision import autocast


def validate(config: TrainConfig, host: Any, pipeline: Any, directory: Path, step: int, told: Notice) -> None:
    """Write a grid, one row per prompt, into ``validation/``, and show it to the trackers.

    Always of the same noise, so that the rows of two grids can be compared. None if a lone process is told to end: who
    tells does not wait for long.

    Args:
        config: settings of the run, with prompts to draw.
        host: accelerate's handle; each process draws its share.
        pipeline: of the model in training.
        directory: of the run.
        step: how many have been taken.
        told: whether to end.

    Raises:
        SVDiffError: the grid cannot be written.
    """
    assert config.validation_prompt is not None
    count = config.num_validation_images
    wanted = [(prompt, config.seed + i) for prompt in config.validation_prompt for i in range(count)]
    prompts, seeds = zip(*share(wanted, host.process_index, host.num_processes), strict=True)
    side = config.resolution or default_resolution(pipeline)
    images = []
    with autocast(config.mixed_precision, host.device):
        for image in sample(
            pipeline,
            prompts,
            seeds,
            batch_size=config.sample_batch_size,
            num_inference_steps=config.validation_num_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            resolution=(side, side),
        ):
            if told() and host.num_processes == 1:
                return
            images.append(torch.from_numpy(np.array(image)))
    pixels = host.gather(torch.stack(images).to(host.device))
    sheet = grid([Image.fromarray(one) for one in pixels[: len(wanted)].cpu().numpy()], count)
    by_the_first(host, lambda: _write_grid(host, sheet, directory, step))


def _write_grid(host: Any, sheet: Image.Image, directory: Path, step: int) -> None:
    path = directory / "validation" / f"step_{step:06d}.png"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        save_picture(sheet, path)
        for tracker in host.trackers:
            how = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, **how)
