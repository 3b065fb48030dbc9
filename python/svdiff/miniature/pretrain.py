"""Pretrains the miniature: `python -m svdiff.miniature.pretrain --output_dir DIR`, also under torchrun.

Three stages, each resumed from its last checkpoint when the command is given again:

1. `vae`: the autoencoder, on crops of scenes and of abstract drawings (so that it can draw what no scene shows);
2. `text`: the text encoder, to say of a caption what stands where (far faster than learning words through pictures);
3. `unet`: the denoiser, v-prediction with zero terminal SNR, on the latents of scenes, with the others frozen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextModel, HfArgumentParser

from . import models, world
from .evaluate import agreement
from .stage import Stage, run


@dataclass
class PretrainConfig:
    """Settings; each is a flag."""

    output_dir: str = field(metadata={"help": "where the pipeline is saved; checkpoints go to its `state` folder"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data and noise"})
    vae_steps: int = field(default=2900, metadata={"help": "autoencoder: optimiser steps"})
    vae_batch_size: int = field(default=20, metadata={"help": "autoencoder: crops per process and step"})
    text_steps: int = field(default=900, metadata={"help": "text encoder: optimiser steps"})
    text_batch_size: int = field(default=32, metadata={"help": "text encoder: captions per process and step"})
    unet_steps: int = field(default=8400, metadata={"help": "UNet: optimiser steps"})
    unet_batch_size: int = field(default=16, metadata={"help": "UNet: scenes per process and step"})
    unet_learning_rate: float = field(default=6e-4, metadata={"help": "UNet: peak of the cosine schedule"})
    scenes: int = field(default=20000, metadata={"help": "UNet: scenes per process, rendered and encoded once"})
    checkpoint_every: int = field(default=250, metadata={"help": "steps between checkpoints"})
    validate_every: int = field(default=500, metadata={"help": "UNet steps between recognitions of drawn pictures"})


def main() -> None:
    """Run all stages."""
    parser = HfArgumentParser(PretrainConfig, prog="python -m svdiff.miniature.pretrain")
    (config,) = parser.parse_args_into_dataclasses()
    diffusers_logging.disable_progress_bar()
    Pretraining(config).run()


class Pretraining:
    """The three stages over one output directory."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.output = Path(config.output_dir)
        self.state = self.output / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        torch.manual_seed(config.seed)
        words = models.tokenizer()
        self.pipeline = models.pipeline(models.autoencoder(), words, models.text_encoder(words), models.unet())
        self.pipeline.to(self.accelerator.device)
        self.pipeline.set_progress_bar_config(disable=True)

    def run(self) -> None:
        """Train what is not trained yet, and save the pipeline in fp16."""
        config, pipeline = self.config, self.pipeline
        self._run(Stage("vae", NoisyAutoencoder(pipeline.vae), self._vae_loss, config.vae_steps, 2e-3))
        self._set_scaling_factor()
        self._run(Stage("text", CaptionReader(pipeline.text_encoder), self._text_loss, config.text_steps, 1e-3))
        pipeline.vae.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False).eval()
        latents, scenes = self._encoded_scenes()
        unet = pipeline.unet.to(memory_format=torch.channels_last)
        self._run(
            Stage(
                "unet",
                unet,
                lambda model, rng: self._unet_loss(model, rng, latents, scenes),
                config.unet_steps,
                config.unet_learning_rate,
                self._validate,
            )
        )
        if self.accelerator.is_main_process:
            pipeline.to(torch.float16).save_pretrained(self.output)

    def _run(self, stage: Stage) -> None:
        config = self.config
        every = {"checkpoint_every": config.checkpoint_every, "validate_every": config.validate_every}
        run(stage, self.accelerator, self.state, seed=config.seed, **every)

    def _vae_loss(self, model: nn.Module, rng: random.Random) -> torch.Tensor:
        crops = [_crop(_any_drawing(rng), rng) for _ in range(self.config.vae_batch_size)]
        pixels = _to_tensor(crops).to(self.accelerator.device)
        error = model(pixels) - pixels
        return error.square().mean() + 0.2 * error.abs().mean()

    def _set_scaling_factor(self) -> None:
        rng = random.Random(f"{self.config.seed}/scale")
        pixels = _to_tensor([np.asarray(world.render(world.sample_scene(rng), rng)) for _ in range(200)])
        with torch.no_grad():
            latents = self.pipeline.vae.encode(pixels.to(self.accelerator.device)).latents
        self.pipeline.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))

    def _text_loss(self, model: nn.Module, rng: random.Random) -> torch.Tensor:
        scenes = [world.sample_scene(rng) for _ in range(self.config.text_batch_size)]
        captions = [world.caption(scene, rng) for scene in scenes]
        labels = torch.tensor([_labels(scene, text) for scene, text in zip(scenes, captions, strict=True)])
        logits = model(self._token_ids(captions))
        return F.cross_entropy(logits.flatten(0, -2), labels.to(logits.device).expand(2, -1, -1).flatten())

    def _token_ids(self, captions: list[str]) -> torch.Tensor:
        ids = self.pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(self.accelerator.device)

    @torch.no_grad()
    def _encoded_scenes(self) -> tuple[torch.Tensor, list[world.Scene]]:
        """This process's scenes and their scaled latents `[scenes, 8, 16, 16]` in fp16."""
        process = self.accelerator.process_index
        rng = random.Random(f"{self.config.seed}/scenes/{process}")
        scenes = [world.with_toys(world.sample_scene(rng), rng, _TOYS) for _ in range(self.config.scenes)]
        file = self.state / f"latents-{process}.safetensors"
        if file.exists():
            return load_file(file)["latents"], scenes
        vae, parts = self.pipeline.vae, []
        for i in tqdm(
            range(0, len(scenes), 100), "latents", disable=not self.accelerator.is_main_process, mininterval=5
        ):
            pixels = _to_tensor([np.asarray(world.render(scene, rng)) for scene in scenes[i : i + 100]])
            latents = vae.encode(pixels.to(self.accelerator.device)).latents * vae.config.scaling_factor
            parts.append(latents.half().contiguous().cpu())
        stacked = torch.cat(parts)
        save_file({"latents": stacked}, file)
        return stacked, scenes

    def _unet_loss(
        self, model: nn.Module, rng: random.Random, latents: torch.Tensor, scenes: list[world.Scene]
    ) -> torch.Tensor:
        device, scheduler = self.accelerator.device, self.pipeline.scheduler
        chosen = [rng.randrange(len(scenes)) for _ in range(self.config.unet_batch_size)]
        captions = ["" if rng.random() < 0.1 else world.caption(scenes[i], rng) for i in chosen]
        with torch.no_grad():
            text = self.pipeline.text_encoder(self._token_ids(captions)).last_hidden_state
        clean = latents[chosen].to(device, torch.float32).contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(clean)
        steps = scheduler.config.num_train_timesteps
        # what stands where is decided at high noise: draw such timesteps more often (density ~ t^0.5)
        timesteps = (steps * torch.rand(len(chosen), device=device) ** (1 / 1.5)).long().clamp(max=steps - 1)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return F.mse_loss(model(noisy, timesteps, text).sample, target)

    def _validate(self) -> str:
        self.pipeline.unet.eval()
        shares = {n: agreement(self.pipeline, n, prompts=32) for n in (1, 2)}
        return ", ".join(f"{n} object{'s' * (n > 1)} {share:.0%}" for n, share in shares.items())


class NoisyAutoencoder(nn.Module):
    """Encodes and decodes with noise on the latents, which makes them smooth.

    The decoder clamps its input to [-3, 3], so noise of 0.1 bounds what a latent can carry.
    """

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels ``[B, 3, H, W]`` to what the decoder makes of their noisy latents."""
        latents = self.vae.encoder(pixels)
        return self.vae.decoder(latents + 0.1 * torch.randn_like(latents))


class CaptionReader(nn.Module):
    """The text encoder with heads that say what stands where, from the mean of all tokens and from the last."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.Linear(encoder.config.hidden_size, _SLOTS * _CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[B, L]` to logits `[2, B, slots, classes]`."""
        states = self.encoder(ids).last_hidden_state
        pooled = torch.stack([states.mean(1), states[:, -1]])
        return self.heads(pooled).unflatten(-1, (_SLOTS, _CLASSES))


_TOYS = 0.15  # share of the UNet's objects that are some abstract toy: a class as wide as a subject needs
_CLASSES = 8  # at most six values, unsaid, and absent
_SLOTS = len(world.POSITIONS) * 3 + 2


def _labels(scene: world.Scene, text: str) -> list[int]:
    """For each position the shape, colour and size, then background and style, as far as `text` says them."""
    unsaid, absent = 6, 7
    words = text.replace(",", "").split()
    labels: list[int] = []

    def said(value: str, values: tuple[str, ...], phrase: list[str]) -> int:
        return values.index(value) if value in phrase else unsaid

    for position in world.POSITIONS:
        item = next((item for item in scene.items if item.position == position), None)
        if item is None:
            labels += [absent] * 3
            continue
        end = words.index(position)
        start = max(i for i in range(end) if words[i] == "a")
        phrase = words[start:end]
        labels.append(said(item.shape, world.SHAPES, phrase))
        labels.append(said(item.color, tuple(world.COLORS), phrase))
        labels.append(said(item.size, tuple(world.SIZES), phrase))
    labels.append(said(scene.background, tuple(world.BACKGROUNDS), words))
    labels.append(said(scene.style, world.STYLES, words))
    return labels


def _any_drawing(rng: random.Random) -> Image.Image:
    scene = world.sample_scene(rng)
    return world.render(scene if rng.random() < 0.6 else world.with_toys(scene, rng, 1.0), rng)


def _crop(image: Image.Image, rng: random.Random, side: int = 32) -> np.ndarray:
    """A square around a random pixel of an object: plain background teaches an autoencoder nothing."""
    pixels = np.asarray(image)
    rows, columns = np.nonzero(np.abs(pixels.astype(np.int16) - pixels[0, 0]).sum(-1) > 30)
    k = rng.randrange(len(rows))
    top, left = (min(max(int(at[k]) - rng.randrange(side), 0), world.IMAGE_SIZE - side) for at in (rows, columns))
    return pixels[top : top + side, left : left + side]


def _to_tensor(images: list[np.ndarray]) -> torch.Tensor:
    """RGB bytes to `[B, 3, H, W]` in [-1, 1], channels last."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pixels.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
