"""Noising: what is asked of a denoiser is the formula of its kind, and its chance that of each sample alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from svdiff.training.chance import generator
from svdiff.training.noising import Diffusion, FlowMatching, Noising, Question
from torch import Tensor

from svdiff_kernels import SVDiffError

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


def ddim(kind: str = "epsilon", **settings: object) -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", prediction_type=kind, **settings)


def latents(count: int) -> Tensor:
    return torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(1))


def ask(noising: Noising, count: int, seed: int = 0) -> Question:
    return noising.ask(latents(count), [generator(seed, i) for i in range(count)])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_right_answer_gives_the_picture_back(kind: str) -> None:
    question = ask(Diffusion(ddim(kind)), 50)
    kept = ddim().alphas_cumprod.double()[question.timesteps][:, None, None, None]
    noisy, target = question.noisy.double(), question.target.double()
    if kind == "epsilon":
        picture = (noisy - (1 - kept).sqrt() * target) / kept.sqrt()
    else:
        picture = kept.sqrt() * noisy - (1 - kept).sqrt() * target
    torch.testing.assert_close(picture, latents(50).double(), rtol=1e-4, atol=2e-5)
    assert torch.equal(question.weights, torch.ones(50))
    noise = target if kind == "epsilon" else kept.sqrt() * target + (1 - kept).sqrt() * noisy
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_timesteps_are_all_alike_likely() -> None:
    timesteps = ask(Diffusion(ddim()), 2000).timesteps
    counts = timesteps.float().histc(10, 0, 1000)
    assert counts.min() > 150 and counts.max() < 250
    assert timesteps.min() < 5 and timesteps.max() > 994


def test_a_base_that_predicts_something_else() -> None:
    with pytest.raises(SVDiffError, match="'sample', only epsilon or v_prediction"):
        Diffusion(ddim("sample"))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr(kind: str) -> None:
    question = ask(Diffusion(ddim(kind), snr_gamma=5.0), 200)
    snr = compute_snr(ddim(), question.timesteps)
    wanted = snr.clamp(max=5.0) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(question.weights, wanted)
    assert 0 < wanted.min() < 0.1
    assert torch.equal(question.noisy, ask(Diffusion(ddim(kind)), 200).noisy)


@pytest.mark.parametrize(("kind", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_where_nothing_is_left_of_the_picture(kind: str, weight: float) -> None:
    noising = Diffusion(DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True), snr_gamma=5.0)
    assert noising._weights(torch.tensor([999])).item() == pytest.approx(weight, abs=1e-5)


def test_noise_offset_is_one_number_a_channel() -> None:
    plain, offset = ask(Diffusion(ddim()), 40), ask(Diffusion(ddim(), noise_offset=0.5), 40)
    more = offset.target - plain.target
    torch.testing.assert_close(more, more[:, :, :1, :1].expand_as(more), rtol=0, atol=1e-5)
    assert more[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_flows_are_straight(scheme: str) -> None:
    question = ask(FlowMatching(FLOW, scheme=scheme), 60)
    sigmas = (question.timesteps / 1000)[:, None, None, None]
    torch.testing.assert_close(question.noisy - sigmas * question.target, latents(60), rtol=1e-4, atol=1e-5)
    noise = question.noisy + (1 - sigmas) * question.target
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    wanted = compute_loss_weighting_for_sd3(scheme, sigmas.flatten())
    torch.testing.assert_close(question.weights, wanted, rtol=1e-3, atol=1e-4)
    assert set(question.timesteps.tolist()) <= set(FLOW.timesteps.tolist())


def mode(u: Tensor) -> Tensor:
    return 1 - u - 1.29 * ((math.pi * u / 2).cos().square() - 1 + u)


@pytest.mark.parametrize(
    ("scheme", "quantile"),
    [
        ("none", lambda u: u),
        ("mode", lambda u: mode(u).sort().values),
        ("logit_normal", lambda u: (0.5 + 2 * torch.special.ndtri(u)).sigmoid()),
    ],
)
def test_how_noise_levels_are_drawn(scheme: str, quantile: Callable[[Tensor], Tensor]) -> None:
    """Place 0 is the noisiest level; SD3's paper draws the share of noise that schedulers shift afterwards."""
    noising = FlowMatching(FlowMatchEulerDiscreteScheduler(), scheme=scheme, logit_mean=0.5, logit_std=2.0)
    drawn = 1 - ask(noising, 3000).timesteps / 1000
    wanted = quantile((torch.arange(3000) + 0.5) / 3000)
    assert (drawn.sort().values - wanted).abs().max() < 0.05


@pytest.mark.parametrize(
    "noising",
    [Diffusion(ddim(), snr_gamma=5.0, noise_offset=0.1), FlowMatching(FLOW, scheme="logit_normal")],
    ids=["diffusion", "flow"],
)
def test_a_sample_does_not_depend_on_its_neighbours(noising: Noising) -> None:
    together, again = ask(noising, 3), ask(noising, 3)
    alone = noising.ask(latents(3)[1:2], [generator(0, 1)])
    for whole, same, part in zip(together, again, alone, strict=True):
        assert torch.equal(whole, same)
        assert torch.equal(whole[1:2], part)
    assert not torch.equal(ask(noising, 3, seed=1).timesteps, together.timesteps)


def test_the_pipelines_own_schedule_counts() -> None:
    """Not its sampler: that of a model is swapped at will."""
    config = ddim("v_prediction", beta_end=0.02, rescale_betas_zero_snr=True).config
    noising = Diffusion(SimpleNamespace(config=config))
    kept = noising._scheduler.alphas_cumprod
    torch.testing.assert_close(kept, DDIMScheduler.from_config(config).alphas_cumprod, rtol=1e-4, atol=1e-6)
