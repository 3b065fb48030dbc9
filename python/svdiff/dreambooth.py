"""The DreamBooth objective: denoise pictures of a subject, and of its class so that the class is not forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svdiff_kernels import SVDiffError

from .sources import Captions, Latents


class Batch(NamedTuple):
    """Pictures to denoise, the subject's first.

    Attributes:
        noisy: latents ``[B, C, h, w]`` in the UNet's dtype.
        target: what the UNet should say of them, ``[B, C, h, w]`` in fp32.
        timesteps: ``[B]``.
        captions: ``[B]``, as `Captions.embed` numbers them.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    captions: Tensor


class DreamBooth:
    """Draws batches and gives their loss: noise MSE + `prior_weight` times that of class pictures (SVDiff, eq. 3).

    Args:
        unet: the denoiser.
        scheduler: a DDPMScheduler with the base's noise schedule; its prediction type decides the target.
        latents: of all pictures, the subject's first.
        captions: likewise.
        num_instance: how many pictures are the subject's.
        num_class: how many are of its class; 0 for no prior preservation.
        batch_size: pictures of the subject per batch; with prior preservation as many of the class come on top.
        prior_weight: lambda.
        rng: source of all chance.

    Raises:
        SVDiffError: the base predicts neither noise nor velocity.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        latents: Latents,
        captions: Captions,
        *,
        num_instance: int,
        num_class: int,
        batch_size: int,
        prior_weight: float,
        rng: torch.Generator,
    ) -> None:
        self._prediction = scheduler.config.prediction_type
        if self._prediction not in ("epsilon", "v_prediction"):
            raise SVDiffError(f"cannot train a base that predicts {self._prediction!r}, only epsilon or v_prediction")
        self._unet, self._scheduler, self._latents, self._captions = unet, scheduler, latents, captions
        self._orders = [_shuffled(0, num_instance, rng)]
        if num_class:
            self._orders.append(_shuffled(num_instance, num_class, rng))
        self._dtype = unet.dtype  # read once: diffusers looks through all modules for it
        self._batch_size, self._prior_weight, self._rng = batch_size, prior_weight, rng

    def draw(self) -> Batch:
        """The next batch; all chance is here."""
        numbers = [next(order) for order in self._orders for _ in range(self._batch_size)]
        latents = self._latents.draw(numbers, self._rng)
        noise = torch.randn(latents.shape, generator=self._rng).to(latents.device)
        steps = self._scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(numbers),), generator=self._rng).to(latents.device)
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = noise if self._prediction == "epsilon" else self._scheduler.get_velocity(latents, noise, timesteps)
        return Batch(noisy.to(self._dtype), target, timesteps, self._captions.numbers(numbers))

    def loss(self, noisy: Tensor, target: Tensor, timesteps: Tensor, captions: Tensor) -> Tensor:
        """The loss of a `Batch`, whose parts are the arguments; the CPU does not wait for the device."""
        context = self._captions.embed(captions).to(self._dtype)
        predicted = self._unet(noisy, timesteps, context, return_dict=False)[0]
        # One loss for the subject's part of the batch, and one for the class's.
        losses = F.mse_loss(predicted.float(), target, reduction="none").reshape(len(self._orders), -1).mean(dim=1)
        return losses[0] if len(losses) == 1 else losses[0] + self._prior_weight * losses[1]


def _shuffled(first: int, count: int, rng: torch.Generator) -> Iterator[int]:
    """Numbers from `first` on without end, each of them once a round."""
    while True:
        yield from (first + torch.randperm(count, generator=rng)).tolist()
