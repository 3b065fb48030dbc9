"""What a denoiser is asked in training: noisy latents at a timestep, and what it should answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from svdiff_kernels import SVDiffError

from .config import TrainConfig


class Question(NamedTuple):
    """A noisy batch.

    Attributes:
        noisy: latents ``[B, C, h, w]``, fp32.
        target: what the denoiser should answer, likewise.
        timesteps: ``[B]``, as the denoiser counts them.
        weights: of the loss, ``[B]``.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    weights: Tensor


class Noising:
    """Adds noise to latents; all chance is the generators'."""

    def ask(self, latents: Tensor, rngs: Sequence[torch.Generator]) -> Question:
        """A question about latents ``[B, C, h, w]``, for each of them with the chance of its own generator."""
        raise NotImplementedError


class Diffusion(Noising):
    """Denoisers that predict noise, or velocity (DDPM).

    Args:
        scheduler: the pipeline's, for its noise schedule.
        snr_gamma: weight losses by ``min(snr, gamma)`` (arXiv 2303.09556); None for all alike.
        noise_offset: share of the noise that is one number per channel.

    Raises:
        SVDiffError: the base predicts neither noise nor velocity.
    """

    def __init__(self, scheduler: Any, *, snr_gamma: float | None = None, noise_offset: float = 0.0) -> None:
        from diffusers import DDPMScheduler

        self._scheduler = DDPMScheduler.from_config(scheduler.config)
        self._kind = self._scheduler.config.prediction_type
        if self._kind not in ("epsilon", "v_prediction"):
            raise SVDiffError(f"cannot train a base that predicts {self._kind!r}, only epsilon or v_prediction")
        self._snr_gamma, self._noise_offset = snr_gamma, noise_offset

    @override
    def ask(self, latents: Tensor, rngs: Sequence[torch.Generator]) -> Question:
        noise = _noise(latents, rngs)
        if self._noise_offset:
            offsets = torch.stack([torch.randn(latents.shape[1], 1, 1, generator=rng) for rng in rngs])
            noise = noise + self._noise_offset * offsets.to(latents.device)
        count = self._scheduler.config.num_train_timesteps
        timesteps = torch.stack([torch.randint(count, (), generator=rng) for rng in rngs])
        weights = self._weights(timesteps).to(latents.device)
        timesteps = timesteps.to(latents.device)
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        target = noise if self._kind == "epsilon" else self._scheduler.get_velocity(latents, noise, timesteps)
        return Question(noisy, target, timesteps, weights)

    def _weights(self, timesteps: Tensor) -> Tensor:
        if self._snr_gamma is None:
            return torch.ones(timesteps.shape)
        kept = self._scheduler.alphas_cumprod.cpu()[timesteps]
        snr = kept / (1 - kept)
        if self._kind == "epsilon":
            return (self._snr_gamma / snr).clamp(max=1)  # also where nothing is left of the picture
        return snr.clamp(max=self._snr_gamma) / (snr + 1)


class FlowMatching(Noising):
    """Denoisers that predict the velocity from data to noise along a straight line (SD3, arXiv 2403.03206).

    Args:
        scheduler: the pipeline's, for its noise levels.
        scheme: how timesteps are drawn ("logit_normal", "mode", else evenly) and losses weighted ("sigma_sqrt",
            "cosmap", else all alike).
        logit_mean: of logit_normal.
        logit_std: of logit_normal.
        mode_scale: of mode.
    """

    def __init__(
        self, scheduler: Any, *, scheme: str, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self._timesteps, self._sigmas = fresh.timesteps.cpu(), fresh.sigmas.cpu()
        self._scheme, self._how = scheme, (logit_mean, logit_std, mode_scale)

    @override
    def ask(self, latents: Tensor, rngs: Sequence[torch.Generator]) -> Question:
        from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

        noise = _noise(latents, rngs)
        mean, std, scale = self._how
        drawn = [
            compute_density_for_timestep_sampling(self._scheme, 1, mean, std, scale, generator=rng) for rng in rngs
        ]
        count = len(self._timesteps)
        places = (torch.cat(drawn) * count).long().clamp(0, count - 1)
        sigmas = self._sigmas[places]
        weights = compute_loss_weighting_for_sd3(self._scheme, sigmas)
        sigmas = sigmas.to(latents.device)[:, None, None, None]
        noisy = (1 - sigmas) * latents + sigmas * noise
        device = latents.device
        return Question(noisy, noise - latents, self._timesteps[places].to(device), weights.to(device))


def noising_of(config: TrainConfig, pipeline: Any, *, flow: bool) -> Noising:
    """What the settings say, for a pipeline."""
    if flow:
        return FlowMatching(
            pipeline.scheduler,
            scheme=config.weighting_scheme,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
        )
    return Diffusion(pipeline.scheduler, snr_gamma=config.snr_gamma, noise_offset=config.noise_offset)


def _noise(latents: Tensor, rngs: Sequence[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(latents.shape[1:], generator=rng) for rng in rngs]).to(latents.device)
