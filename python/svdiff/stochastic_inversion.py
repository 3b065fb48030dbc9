"""Stochastic inversion: noise that knows what it is put on (InST, arXiv 2211.13203)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .training.families import Family, family_of

Noise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Puts noise on latents: of both, ``[B, C, h, w]``, and the timesteps ``[B]``."""


@contextmanager
def inverting_stochastically(pipeline: Any, prompts: Sequence[str], size: tuple[int, int]) -> Iterator[None]:
    """Within, image-to-image by pipelines that share this one's scheduler starts from noise that the denoiser sees.

    The pipeline puts random noise on the picture; the denoiser, told the prompt, says once what of that is noise; and
    that is put on the picture in its place. It leans on what there is to be seen, so that more of that is kept than
    with any noise. Models that match flows are asked for the velocity, which is noise less data.

    Args:
        pipeline: text-to-image, of diffusers; its scheduler is what it was afterwards.
        prompts: of the pictures in the batch.
        size: height and width of them, in pixels.

    Raises:
        SVDiffError: it is none that `svdiff train` knows.
    """
    family = family_of(pipeline)
    told = _conditions(family, prompts)
    height, width = size
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(prompts), device=told[0].device)
    scheduler = pipeline.scheduler

    def ask(noisy: Tensor, timesteps: Tensor) -> Tensor:
        with torch.no_grad():
            return family.predict(noisy.to(family.denoiser.dtype), timesteps, told, sizes)

    name = "scale_noise" if family.flow else "add_noise"
    plain = getattr(scheduler, name)

    def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return plain(latents, predicted_noise(scheduler, plain, ask, latents, noise, timesteps), timesteps)

    def scale_noise(latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        def put(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            found: Tensor = plain(latents, timesteps, noise)
            return found

        return put(latents, predicted_noise(scheduler, put, ask, latents, noise, timesteps), timesteps)

    setattr(scheduler, name, scale_noise if family.flow else add_noise)
    try:
        yield
    finally:
        delattr(scheduler, name)


def predicted_noise(
    scheduler: Any,
    put: Noise,
    ask: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """What a denoiser takes for noise in noisy latents, ``[B, C, h, w]``.

    Args:
        scheduler: of diffusers, with timesteps set.
        put: puts noise on latents, as the scheduler does.
        ask: the denoiser: its answer to noisy latents at timesteps.
        latents: of pictures, ``[B, C, h, w]``.
        noise: likewise.
        timesteps: ``[B]``, all the same.
    """
    noisy = put(latents, noise, timesteps)
    signal, share = (
        put(torch.ones_like(latents), torch.zeros_like(latents), timesteps),
        put(torch.zeros_like(latents), torch.ones_like(latents), timesteps),
    )  # how much of each is in it
    if hasattr(scheduler, "scale_model_input"):  # where noise is just added, denoisers see that scaled to variance 1
        noisy, signal, share = (scheduler.scale_model_input(part, timesteps[0]) for part in (noisy, signal, share))
    answer = ask(noisy, timesteps).to(noisy.dtype)
    kind = getattr(scheduler.config, "prediction_type", "flow")
    if kind == "epsilon":
        return answer
    if kind == "v_prediction":
        return share * noisy + signal * answer
    if kind == "sample":
        return (noisy - signal * answer) / share
    return noisy + signal * answer  # of a flow: noisy = (1 - share) data + share noise, answer = noise - data


@torch.no_grad()
def _conditions(family: Family, prompts: Sequence[str]) -> tuple[Tensor, ...]:
    encoded = {}
    for name, encoder in family.text_encoders.items():
        ids = family.tokens(name, prompts).to(next(encoder.parameters()).device)
        encoded[name] = family.encode(name, ids)
    return tuple(part.to(family.denoiser.dtype) for part in family.conditions(encoded))
