"""Pretrains the miniature: `python -m svdiff.miniature.pretrain --output_dir DIR`, or the same under `accelerate launch`.

Three stages, each resumed from its last checkpoint when the command is given again:

1. `vae`: the autoencoder, on crops of scenes and of abstract drawings (so that it can draw what no scene shows);
2. `text`: the text encoder, to say of a caption what stands where (it learns words far faster so than through pictures);
3. `unet`: the denoiser, v-prediction with zero terminal SNR, on the latents of scenes, text encoder and autoencoder frozen.

Every step draws its data and noise from a generator seeded by stage, step and process, so a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextModel, HfArgumentParser

from . import models, world
from .evaluate import agreement

LossFunction = Callable[[nn.Module, random.Random], torch.Tensor]


@dataclass
class PretrainConfig:
    output_dir: str = field(metadata={"help": "where the pipeline is saved; checkpoints go to its `state` folder"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data and noise"})
    vae_steps: int = field(default=2000, metadata={"help": "autoencoder: optimiser steps"})
    vae_batch_size: int = field(default=32, metadata={"help": "autoencoder: crops per process and step"})
    text_steps: int = field(default=1500, metadata={"help": "text encoder: optimiser steps"})
    text_batch_size: int = field(default=64, metadata={"help": "text encoder: captions per process and step"})
    unet_steps: int = field(default=8000, metadata={"help": "UNet: optimiser steps"})
    unet_batch_size: int = field(default=16, metadata={"help": "UNet: scenes per process and step"})
    unet_learning_rate: float = field(default=6e-4, metadata={"help": "UNet: peak of the cosine schedule"})
    scenes: int = field(default=20000, metadata={"help": "UNet: scenes per process, rendered and encoded once"})
    checkpoint_every: int = field(default=250, metadata={"help": "steps between checkpoints"})
    validate_every: int = field(default=500, metadata={"help": "UNet steps between recognitions of sampled pictures"})
    max_minutes: float = field(default=math.inf, metadata={"help": "stop (resumably) after so many minutes"})


class OutOfTime(Exception):
    """`max_minutes` are over; the last checkpoint is complete."""


def main() -> None:
    (config,) = HfArgumentParser(PretrainConfig, prog="python -m svdiff.miniature.pretrain").parse_args_into_dataclasses()
    diffusers_logging.disable_progress_bar()
    try:
        Pretraining(config).run()
    except OutOfTime as stopped:
        print(stopped)


class Pretraining:
    """The three stages over one output directory."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.output = Path(config.output_dir)
        self.state = self.output / "state"
        self.state.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.deadline = time.monotonic() + 60 * config.max_minutes
        torch.manual_seed(config.seed)
        words = models.tokenizer()
        self.pipeline = models.pipeline(models.autoencoder(), words, models.text_encoder(words), models.unet())
        self.pipeline.to(self.accelerator.device)
        self.pipeline.set_progress_bar_config(disable=True)

    def run(self) -> None:
        config, pipeline = self.config, self.pipeline
        batch = config.vae_batch_size
        self._train("vae", NoisyAutoencoder(pipeline.vae), lambda m, rng: self._vae_loss(m, rng, batch), config.vae_steps, 2e-3)
        self._set_scaling_factor()
        reader = CaptionReader(pipeline.text_encoder)
        batch_text = config.text_batch_size
        self._train("text", reader, lambda m, rng: self._text_loss(m, rng, batch_text), config.text_steps, 1e-3)
        latents, scenes = self._encoded_scenes()
        pipeline.vae.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False).eval()
        self._train(
            "unet",
            pipeline.unet.to(memory_format=torch.channels_last),
            lambda m, rng: self._unet_loss(m, rng, latents, scenes),
            config.unet_steps,
            config.unet_learning_rate,
            validate=self._validate,
        )
        if self.accelerator.is_main_process:
            pipeline.to(torch.float16).save_pretrained(self.output)

    # One stage ---------------------------------------------------------------------------------------------------------

    def _train(
        self, stage: str, model: nn.Module, loss_of: LossFunction, steps: int, peak: float, validate: Callable[[], str] | None = None
    ) -> None:
        """Train `model` with AdamW (warm-up, cosine) and leave it with the exponential mean of its weights."""
        accelerator, config = self.accelerator, self.config
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        ema = EMAModel(model.parameters(), decay=0.998, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        ema.to(accelerator.device)
        file = self.state / f"{stage}.safetensors"
        first = _load_state(file, model, optimizer, ema) if file.exists() else 0
        wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
        progress = tqdm(
            range(first, steps), stage, initial=first, total=steps, disable=not accelerator.is_main_process, mininterval=5
        )
        for step in progress:
            key = f"{config.seed}/{stage}/{step}/{accelerator.process_index}"
            rng = random.Random(key)
            torch.manual_seed(rng.getrandbits(62))
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 100) * (0.52 + 0.48 * math.cos(math.pi * step / steps))
            loss = loss_of(wrapped, rng)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.step(model.parameters())
            if step % 20 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}")
            last = step + 1 == steps
            # every process must see the same clock, or one would wait for the others for ever
            late = self._any_late() if step % 25 == 24 else False
            if last or late or (step + 1) % config.checkpoint_every == 0:
                if accelerator.is_main_process:
                    _save_state(file, model, optimizer, ema, step + 1)
            if validate and accelerator.is_main_process and (last or (step + 1) % config.validate_every == 0):
                ema.store(model.parameters())
                ema.copy_to(model.parameters())
                tqdm.write(f"{stage} {step + 1}: {validate()}")
                ema.restore(model.parameters())
                model.train()
            if late and not last:
                raise OutOfTime(f"{stage}: stopped after step {step + 1} of {steps}; run the same command to go on")
        ema.copy_to(model.parameters())
        model.eval()
        accelerator.wait_for_everyone()

    def _any_late(self) -> bool:
        late = torch.tensor([float(time.monotonic() > self.deadline)], device=self.accelerator.device)
        return bool(self.accelerator.gather(late).any())

    # Autoencoder -------------------------------------------------------------------------------------------------------

    def _vae_loss(self, model: nn.Module, rng: random.Random, batch: int) -> torch.Tensor:
        pixels = _to_tensor([_crop(_any_drawing(rng), rng) for _ in range(batch)]).to(self.accelerator.device)
        error = model(pixels) - pixels
        return error.square().mean() + 0.2 * error.abs().mean()

    def _set_scaling_factor(self) -> None:
        rng = random.Random(f"{self.config.seed}/scale")
        pixels = _to_tensor([np.asarray(world.render(world.sample_scene(rng), rng)) for _ in range(200)])
        with torch.no_grad():
            latents = self.pipeline.vae.encode(pixels.to(self.accelerator.device)).latents
        self.pipeline.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))

    # Text encoder ------------------------------------------------------------------------------------------------------

    def _text_loss(self, model: nn.Module, rng: random.Random, batch: int) -> torch.Tensor:
        scenes = [world.sample_scene(rng) for _ in range(batch)]
        captions = [world.caption(scene, rng) for scene in scenes]
        labels = torch.tensor([_labels(scene, text) for scene, text in zip(scenes, captions, strict=True)])
        logits = model(self._token_ids(captions))
        return F.cross_entropy(logits.flatten(0, -2), labels.to(logits.device).expand(2, -1, -1).flatten())

    def _token_ids(self, captions: list[str]) -> torch.Tensor:
        ids = self.pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids.to(self.accelerator.device)

    # UNet --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _encoded_scenes(self) -> tuple[torch.Tensor, list[world.Scene]]:
        """This process's scenes and their scaled latents `[scenes, 8, 16, 16]` in fp16."""
        process = self.accelerator.process_index
        rng = random.Random(f"{self.config.seed}/scenes/{process}")
        scenes = [world.sample_scene(rng) for _ in range(self.config.scenes)]
        file = self.state / f"latents-{process}.safetensors"
        if file.exists():
            return load_file(file)["latents"], scenes
        vae, parts = self.pipeline.vae, []
        for i in tqdm(range(0, len(scenes), 100), "latents", disable=not self.accelerator.is_main_process, mininterval=5):
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
    if rng.random() < 0.6:
        return world.render(scene, rng)
    drawings = {position: world.abstract_drawing(rng) for position in world.POSITIONS}
    items = tuple(replace(item, shape=item.position) for item in scene.items)
    return world.render(replace(scene, items=items), rng, drawings)


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


# Checkpoints of a stage ------------------------------------------------------------------------------------------------


def _save_state(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, step: int) -> None:
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for i, (parameter, shadow) in enumerate(zip(model.parameters(), ema.shadow_params, strict=True)):
        state[f"ema.{i}"] = shadow.contiguous()
        moments = optimizer.state[parameter]
        state[f"exp_avg.{i}"] = moments["exp_avg"].contiguous()
        state[f"exp_avg_sq.{i}"] = moments["exp_avg_sq"].contiguous()
    temporary = file.with_suffix(".tmp")
    save_file(state, temporary, metadata={"step": str(step)})
    os.replace(temporary, file)


def _load_state(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> int:
    state = load_file(file)
    with safe_open(file, "pt") as handle:
        step = int(handle.metadata()["step"])
    model.load_state_dict({name.removeprefix("model."): v for name, v in state.items() if name.startswith("model.")})
    for i, parameter in enumerate(model.parameters()):
        ema.shadow_params[i].copy_(state[f"ema.{i}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": state[f"exp_avg.{i}"].to(parameter),
            "exp_avg_sq": state[f"exp_avg_sq.{i}"].to(parameter),
        }
    ema.optimization_step = step
    return step


if __name__ == "__main__":
    main()
