"""What training draws from: latents of pictures and embeddings of captions, cached where possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data import crop


class Latents:
    """Latents of pictures, augmented and sampled anew at each draw.

    Args:
        vae: an AutoencoderKL, or one without a distribution (AutoencoderTiny).
        images: ``[3, h, w]`` uint8 each, from `data.load_picture`.
        resolution: side of the square that is cut from each.
        center_crop: cut it from the centre, not from anywhere.
        random_flip: mirror every other picture, by chance.
        cache: encode once. A picture that is cropped at random is encoded at each draw all the same.
    """

    def __init__(
        self, vae: Any, images: Sequence[Tensor], resolution: int, *, center_crop: bool, random_flip: bool, cache: bool
    ) -> None:
        self._vae, self._images, self._resolution = vae, images, resolution
        self._center_crop, self._random_flip = center_crop, random_flip
        fixed = center_crop or all(image.shape[-1] == image.shape[-2] for image in images)
        self._moments: tuple[Tensor, Tensor] | None = None
        if cache and fixed:
            rng = torch.Generator()  # decides nothing: these crops leave no choice
            mirrored = (False, True) if random_flip else (False,)
            encoded = [self._encode([i], [flip], rng) for flip in mirrored for i in range(len(images))]
            means, stds = zip(*encoded, strict=True)
            self._moments = torch.cat(means), torch.cat(stds)  # plain ones first, then mirrored

    def draw(self, numbers: Sequence[int], rng: torch.Generator) -> Tensor:
        """Latents ``[len(numbers), C, h, w]`` of these pictures; all chance comes from `rng`."""
        count = len(numbers)
        flips = (torch.rand(count, generator=rng) < 0.5).tolist() if self._random_flip else [False] * count
        if self._moments is None:
            mean, std = self._encode(numbers, flips, rng)
        else:
            rows = [n + len(self._images) * flip for n, flip in zip(numbers, flips, strict=True)]
            mean, std = (moment[rows] for moment in self._moments)
        return mean + std * torch.randn(mean.shape, generator=rng).to(mean.device)

    @torch.no_grad()
    def _encode(self, numbers: Sequence[int], flips: Sequence[bool], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, in the denoiser's units."""
        squares = [
            crop(self._images[n], self._resolution, center=self._center_crop, flip=flip, rng=rng)
            for n, flip in zip(numbers, flips, strict=True)
        ]
        encoded = self._vae.encode(torch.stack(squares).to(self._vae.device, self._vae.dtype))
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        shift, factor = getattr(self._vae.config, "shift_factor", None) or 0.0, self._vae.config.scaling_factor
        return ((mean - shift) * factor).float(), (std * factor).float()


class Captions:
    """Embeddings of the pictures' captions.

    Args:
        tokenizer: CLIP's.
        text_encoder: gives ``[B, L, D]`` for token ids.
        captions: one per picture.
        cache: encode once; for a text encoder that is not trained.
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, captions: Sequence[str], *, cache: bool) -> None:
        self._text_encoder = text_encoder
        distinct = sorted(set(captions))
        self._rows = [distinct.index(caption) for caption in captions]
        self._ids = tokenizer(
            distinct,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(text_encoder.device)  # [distinct, L]
        self._cached: Tensor | None = None
        if cache:
            with torch.no_grad():
                self._cached = torch.cat([text_encoder(ids)[0] for ids in self._ids.split(8)])

    def numbers(self, pictures: Sequence[int]) -> Tensor:
        """Which of the distinct captions each of these pictures has, ``[len(pictures)]``."""
        return torch.tensor([self._rows[n] for n in pictures]).to(self._ids.device)

    def embed(self, numbers: Tensor) -> Tensor:
        """Embeddings ``[len(numbers), L, D]`` of captions by `numbers`."""
        if self._cached is not None:
            return self._cached[numbers]
        embeddings: Tensor = self._text_encoder(self._ids[numbers])[0]
        return embeddings
