"""The miniature's contrastive encoder of pictures and captions: what CLIP is to Stable Diffusion, at its size.

`pretrain_encoder.py` made its weights. It has never seen one of `world.SUBJECTS`, so that it can judge what a model has
learnt of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from svdiff_kernels.errors import SVDiffError

from . import world

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

MEAN = STD = (0.5, 0.5, 0.5)
"""Of the pixels in 0..1 that the encoder takes: it sees them in -1..1."""


def load_encoder(dtype: torch.dtype = torch.float32) -> tuple[CLIPModel, CLIPProcessor]:
    """The encoder on the CPU, ready to be asked, with the processor that prepares pictures of any size and captions.

    ``model.get_image_features`` gives ``[B, 64]`` of pictures, ``model.get_text_features`` of captions of up to 32
    tokens, neither of unit length.

    Raises:
        SVDiffError: the weights are not installed with the package.
    """
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

    from ..evaluation.preparation import image_processor

    folder = resources.files(__package__) / "weights" / "clip"
    if not (folder / "config.json").is_file():
        raise SVDiffError(
            f"the miniature's encoder is missing from {folder}: reinstall, or make it with "
            f"`python -m svdiff.miniature.pretrain_encoder --output_dir {folder}`"
        )
    model = CLIPModel.from_pretrained(str(folder), dtype=dtype, local_files_only=True).eval()
    words = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    return model, CLIPProcessor(image_processor(str(folder)), words)


def pixel_values(images: Sequence[Any]) -> torch.Tensor:
    """Pictures of the world's own size, or arrays of their bytes, as the encoder takes them: ``[B, 3, 64, 64]``."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div(255).sub(MEAN[0]).div(STD[0])


@torch.no_grad()
def retrieval(model: Any, tokenizer: Any, *, scenes: int = 200, seed: int = 0) -> tuple[float, float]:
    """How often the right one scores highest: of all captions for a picture, of all pictures for a caption.

    Scenes are held out from pretraining, no two with the same caption, each said in full.
    """
    rng = random.Random(f"{seed}/retrieval")
    asked: dict[str, world.Scene] = {}
    while len(asked) < scenes:
        scene = world.sample_scene(rng, held_out_only=True)
        asked[world.caption(scene)] = scene
    pixels = pixel_values([world.render(scene, rng) for scene in asked.values()])
    ids = tokenizer(list(asked), padding="max_length", truncation=True, return_tensors="pt").input_ids
    scores = model.to("cpu")(input_ids=ids, pixel_values=pixels).logits_per_image
    right = torch.arange(scenes)
    return (scores.argmax(1) == right).float().mean().item(), (scores.argmax(0) == right).float().mean().item()
