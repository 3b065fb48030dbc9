"""Pictures as latents, latents as pictures, and noise between noises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What a VAE makes of pictures: mean and deviation of their latents, ``[B, C, h, w]`` in fp32.

    Args:
        vae: of diffusers; one without a distribution has no deviation.
        pixels: ``[B, 3, H, W]`` in -1..1.
    """
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        mean, std = encoded.latents, torch.zeros_like(encoded.latents)
    shift, factor = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    return ((mean - shift) * factor).float(), (std * factor).float()


@contextmanager
def decoding_in_its_own_precision(vae: Any) -> Iterator[None]:
    """Some VAEs overflow in half precision, which denoisers do not mind."""
    decode = vae.decode

    def exactly(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = exactly
    try:
        yield
    finally:
        del vae.decode


def slerp(alpha: float, start: Tensor, end: Tensor) -> Tensor:
    """Each sample on the arc from start (alpha = 0) to end (alpha = 1), where noise stays as long as noise is.

    Args:
        alpha: how far.
        start: ``[B, ...]``.
        end: of the same shape.
    """
    a, b = start.flatten(1).double(), end.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine)[:, None]
    close = angle < 1e-4  # an arc that short is straight
    sine = torch.where(close, 1, torch.sin(angle))
    of_start = torch.where(close, 1 - alpha, torch.sin((1 - alpha) * angle) / sine)
    of_end = torch.where(close, alpha, torch.sin(alpha * angle) / sine)
    return (of_start * a + of_end * b).view_as(start).to(start.dtype)
