"""A text-to-image pipeline small enough to live in the repository and real enough to judge by.

`load_pipeline` gives a `StableDiffusionPipeline` truly pretrained on a rendered world of captioned scenes (`world.py`);
`recogniser.py` reads its pictures back by rule; `pretrain.py` made its weights.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import torch

from svdiff_kernels.errors import SVDiffError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

NAME = "miniature"
"""What stands for it wherever a model's path or hub id is asked for."""


def load_pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The miniature, on the CPU, without a progress bar of its own.

    Raises:
        SVDiffError: the weights are not installed with the package.
    """
    from diffusers import StableDiffusionPipeline

    folder = resources.files(__package__) / "weights"
    if not (folder / "model_index.json").is_file():
        raise SVDiffError(
            f"the miniature's weights are missing from {folder}: reinstall, or make them with "
            f"`python -m svdiff.miniature.pretrain --output_dir {folder}`"
        )
    # its text encoder and UNet are written in fp16; the values are the same in any wider dtype
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
