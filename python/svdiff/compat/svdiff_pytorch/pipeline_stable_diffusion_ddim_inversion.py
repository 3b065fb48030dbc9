"""Stable Diffusion with `invert`: the noise from which it would draw a given picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from svdiff_kernels import SVDiffError

from ...inversion import invert
from ...latents import decoding_in_its_own_precision, encode

Picture = Image.Image | Tensor
"""A picture, or pictures ``[B, 3, H, W]`` in -1..1."""


@dataclass
class DDIMInversionOutput(BaseOutput):
    """What `StableDiffusionPipelineWithDDIMInversion.invert` returns.

    Attributes:
        latents: noise ``[B, C, h, w]``.
        images: what the VAE makes of that, as `output_type` says.
    """

    latents: Tensor
    images: Any


class StableDiffusionPipelineWithDDIMInversion(StableDiffusionPipeline):
    """diffusers' pipeline, and the way back from a picture to noise."""

    @torch.no_grad()
    def invert(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        lambda_auto_corr: float = 20.0,
        lambda_kl: float = 20.0,
        num_reg_steps: int = 0,
        num_auto_corr_rolls: int = 5,
    ) -> DDIMInversionOutput | tuple[Tensor, Any]:
        """Follow the DDIM sampler backwards; see `svdiff.inversion.invert`. Any scheduler may be set, and stays.

        Args:
            prompt: one for each picture.
            image: pictures of sides that the VAE's factor divides; others are scaled down to such. One may serve
                several prompts.
            num_inference_steps: of the sampler.
            guidance_scale: 1, without guidance, is what can be undone best.
            generator: of what the VAE leaves to chance.
            latents: of the pictures ``[B, C, h, w]``, scaled as the UNet knows them, instead of image.
            prompt_embeds: instead of prompt.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: or a tuple.
            callback: told a step's number, its timestep and the latents after it.
            callback_steps: how often.
            cross_attention_kwargs: for the UNet's attention.
            lambda_auto_corr, lambda_kl, num_auto_corr_rolls: mean nothing without num_reg_steps.
            num_reg_steps: 0; svdiff-pytorch left the regularisation of pix2pix-zero off.

        Returns:
            Noise from which DDIM in as many steps draws the pictures again, or nearly so, and what it decodes to.

        Raises:
            SVDiffError: no picture or no prompt, numbers of them that do not fit, or num_reg_steps is not 0.
        """
        if num_reg_steps:
            raise SVDiffError(f"num_reg_steps {num_reg_steps}: inversion without regularisation (0) is all there is")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        call: dict[str, Any] = {"cross_attention_kwargs": cross_attention_kwargs}
        if prompts is not None and prompt_embeds is None:
            wanted = len(prompts)
        elif prompts is None and prompt_embeds is not None:
            wanted = len(prompt_embeds)
            call["prompt_embeds"] = prompt_embeds
        else:
            raise SVDiffError("invert needs either a prompt or prompt_embeds")
        start = self._latents_of(image, generator) if latents is None else latents
        if len(start) != wanted:
            if len(start) != 1:
                raise SVDiffError(f"{len(start)} pictures for {wanted} prompts: give one prompt for each")
            start = start.expand(wanted, -1, -1, -1)
        if callback is not None:

            def on_step_end(_: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
                if step % callback_steps == 0:
                    callback(step, timestep, state["latents"])
                return state

            call["callback_on_step_end"] = on_step_end
        steps: Any = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        noise = invert(self, start, prompts, **steps, **call)
        drawn = noise
        if output_type != "latent":
            with decoding_in_its_own_precision(self.vae):
                drawn = self.vae.decode(noise / self.vae.config.scaling_factor, return_dict=False)[0]
        images = self.image_processor.postprocess(drawn, output_type=output_type)
        self.maybe_free_model_hooks()
        return DDIMInversionOutput(latents=noise, images=images) if return_dict else (noise, images)

    def _latents_of(
        self, image: Picture | Sequence[Picture] | None, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        """A sample of what the VAE makes of pictures."""
        given = [image] if isinstance(image, Picture) else list(image or ())
        tensors = [one if one.dim() == 4 else one[None] for one in given if isinstance(one, Tensor)]
        pictures = [one.convert("RGB") for one in given if isinstance(one, Image.Image)]
        if not given:
            raise SVDiffError("invert needs an image, or its latents")
        if len(given) not in (len(tensors), len(pictures)):
            raise SVDiffError(f"an image is a PIL image or a tensor, or a list of one kind, not {type(image).__name__}")
        pixels = torch.cat(tensors) if tensors else self.image_processor.preprocess(pictures)
        mean, deviation = encode(self.vae, pixels)
        return mean + deviation * randn_tensor(mean.shape, generator, device=mean.device, dtype=mean.dtype)
