"""Pretrains the miniature's encoder: `python -m svdiff.miniature.pretrain_encoder --output_dir DIR`.

Pictures and captions of scenes are told apart by contrast (CLIP, arXiv 2103.00020), and so are two drawings of a scene
from those of others (SLIP, arXiv 2112.12750): captions do not say all that distinguishes one toy from another. Its text
tower starts as the miniature's text encoder, which knows the words.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, HfArgumentParser

from . import load_pipeline, models, world
from .claims import colors, of_scene, said, true
from .encoder import MEAN, STD, pixel_values, retrieval
from .stage import Stage, run

_TOYS = 0.3  # share of the objects that are abstract drawings: what a subject may look like
_COLORS_SAID = 0.5  # share of their captions that name their colours
_DRAWINGS = 0.5  # weight of telling drawings apart against telling captions apart
_NOISE = 0.08  # of the pixels in -1..1: what a diffusion model draws is not as clean as a rendered scene


@dataclass
class PretrainEncoderConfig:
    """Settings; each is a flag."""

    output_dir: str = field(metadata={"help": "where the encoder is saved; checkpoints go to its `state` folder"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data and noise"})
    steps: int = field(default=1100, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=128, metadata={"help": "scenes per step"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine schedule"})
    checkpoint_every: int = field(default=250, metadata={"help": "steps between checkpoints"})


def main() -> None:
    """Train, and save the encoder in fp16 with its processor."""
    parser = HfArgumentParser(PretrainEncoderConfig, prog="python -m svdiff.miniature.pretrain_encoder")
    (config,) = parser.parse_args_into_dataclasses()
    output = Path(config.output_dir)
    (output / "state").mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(config.seed)
    words = models.tokenizer()
    model = contrastive_encoder()
    model.text_model.load_state_dict(load_pipeline().text_encoder.state_dict())
    model.to(accelerator.device)

    half = config.batch_size // 2

    def loss(wrapped: nn.Module, rng: random.Random) -> torch.Tensor:
        scenes = [world.with_toys(world.sample_scene(rng), rng, _TOYS) for _ in range(config.batch_size)]
        captions = [caption(scene, rng) for scene in scenes]
        ids = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        pixels = pixel_values([world.render(scene, rng) for scene in scenes + scenes[:half]])
        pixels += _NOISE * torch.rand(len(pixels), 1, 1, 1) * torch.randn_like(pixels)
        out = wrapped(input_ids=ids.to(accelerator.device), pixel_values=pixels.to(accelerator.device))
        scale = model.logit_scale.exp()
        first, second = out.image_embeds.split([len(scenes), half])
        by_words = contrast(scale * out.text_embeds @ first.T, said_of(captions, scenes).to(scale.device))
        return by_words + _DRAWINGS * contrast(scale * first[:half] @ second.T)

    def validate() -> str:
        model.eval()
        captions, pictures = retrieval(model, words)
        model.to(accelerator.device)
        return f"right caption of 200 {captions:.1%}, right picture {pictures:.1%}"

    stage = Stage("encoder", model, loss, config.steps, config.learning_rate, validate)
    every = {"checkpoint_every": config.checkpoint_every, "validate_every": config.checkpoint_every}
    run(stage, accelerator, output / "state", seed=config.seed, **every)
    model.half().save_pretrained(output)
    side = {"height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE}
    size = {"shortest_edge": world.IMAGE_SIZE}
    processor = CLIPImageProcessor(size=size, crop_size=side, image_mean=list(MEAN), image_std=list(STD))
    processor.save_pretrained(output)
    words.save_pretrained(output)


def contrastive_encoder() -> CLIPModel:
    """Patches of 8x8 pixels through four layers of width 96, captions through three; both to 64 numbers."""
    words = models.tokenizer()
    vision = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": world.IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": 64,
    }
    text = models.text_encoder(words).config.to_dict() | {"projection_dim": 64}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def caption(scene: world.Scene, rng: random.Random) -> str:
    """A caption as of the denoiser's training, that now and then names the colours of toys besides."""
    text = world.caption(scene, rng)
    for item in scene.items:
        place = f"{world.CLASS_NOUN} {world.place(item.position)}"
        if item.drawing and rng.random() < _COLORS_SAID:
            text = text.replace(place, f"{' and '.join(colors(item))} {place}")
    return text


def said_of(captions: list[str], scenes: list[world.Scene]) -> torch.Tensor:
    """Which captions are true of which scenes ``[captions, scenes]``: no two of those are to be told apart."""
    claims, facts = [said(text) for text in captions], [of_scene(scene) for scene in scenes]
    return torch.tensor([[true(claim, fact) for fact in facts] for claim in claims])


def contrast(logits: torch.Tensor, excused: torch.Tensor | None = None) -> torch.Tensor:
    """The symmetric cross-entropy of CLIP, where the k-th row belongs to the k-th column, without the pairs excused."""
    own = torch.arange(len(logits), device=logits.device)
    if excused is not None:
        logits = logits.masked_fill(excused & (own[:, None] != own), -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


if __name__ == "__main__":
    main()
