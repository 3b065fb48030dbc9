"""DDIM inversion: the noise from which a deterministic sampler would draw a given picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from svdiff_kernels import SVDiffError

from .pipelines import classes_of
from .progress import progress_options


def invert(
    pipeline: Any,
    latents: Tensor,
    prompts: Sequence[str] | None,
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    **call: Any,
) -> Tensor:
    """Follow the DDIM sampler backwards, from pictures to noise (Song et al., arXiv 2010.02502, equation 13).

    The pipeline's scheduler and progress bar stay as they are.

    Args:
        pipeline: Stable Diffusion 1.x, 2.x or XL.
        latents: of pictures, ``[B, C, h, w]``; see `latents.encode`.
        prompts: one for each. CoSINE takes those of what is to be drawn. None if `call` has their embeddings.
        num_inference_steps: of the sampler.
        guidance_scale: 1, without guidance, is what can be undone best.
        call: what else the pipeline's call takes.

    Returns:
        Noise ``[B, C, h, w]``, from which DDIM in as many steps draws the pictures again, or nearly so.

    Raises:
        SVDiffError: the model flows along straight lines, for which there is no such sampler.
    """
    check_invertible(classes_of(pipeline))
    from diffusers import DDIMInverseScheduler

    kept, factor = pipeline.scheduler, pipeline.vae_scale_factor
    settings = dict(kept.config)
    if settings.get("timestep_spacing") not in ("leading", "trailing"):
        settings["timestep_spacing"] = "leading"
    bar = dict(getattr(pipeline, "_progress_bar_config", {}))
    how = progress_options(disable=bool(bar.get("disable")))
    pipeline.set_progress_bar_config(desc="Inverting", leave=False, **how)
    pipeline.scheduler = DDIMInverseScheduler.from_config(settings, clip_sample=False)
    try:
        with torch.no_grad():
            noise: Tensor = pipeline(
                None if prompts is None else list(prompts),
                latents=latents.to(pipeline.device, pipeline.unet.dtype),
                height=latents.shape[2] * factor,
                width=latents.shape[3] * factor,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
                **call,
            ).images
    finally:
        pipeline.scheduler = kept
        pipeline.set_progress_bar_config(**bar)
    return noise


def check_invertible(classes: Mapping[str, str]) -> None:
    """Raises SVDiffError if a pipeline of these `pipelines.classes_of` has no DDIM sampler to follow back."""
    if "unet" not in classes or classes["scheduler"].startswith("FlowMatch"):
        raise SVDiffError(f"a {classes['pipeline']} cannot be inverted by DDIM: start from the image, or from noise")
