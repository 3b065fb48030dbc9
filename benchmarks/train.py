"""A whole step of `svdiff train` on the miniature: data, text encoder, UNet, loss, backward, AdamW."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import svdiff
import torch
from PIL import Image
from svdiff.bench import BenchConfig
from svdiff.miniature import load_pipeline
from svdiff.training.data import Loaded
from svdiff.training.dreambooth import DreamBooth, Pool
from svdiff.training.families import family_of
from svdiff.training.noising import Diffusion
from svdiff.training.sources import Captions, Latents
from torch import nn

from svdiff_kernels import FactorCache

from . import baselines, runner

_PICTURES = 16  # of the subject and of its class, half each


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure, interleaved: ours, LoRA and full fine-tuning of UNet and text encoder, and gradients alone."""
    steps = {
        runner.OURS: _step(bench, "ours"),
        f"lora r={bench.lora_rank}": _step(bench, "lora"),
        "full fine-tuning": _step(bench, "full"),
        runner.FROZEN: _step(bench, "frozen"),
    }
    subject = f"miniature, {bench.batch} + {bench.batch} pictures"
    return runner.interleave(steps, bench.rounds, subject=subject, warmup=2, device=bench.device)


def _step(bench: BenchConfig, way: str) -> runner.Step:
    pipeline = load_pipeline().to(bench.device)
    models: list[nn.Module] = [pipeline.unet, pipeline.text_encoder]
    parameters: list[nn.Parameter] = []
    if way == "ours":
        # Kept in the user's cache: the miniature is small, and svdiff train puts it there too.
        adapter = svdiff.attach(
            pipeline, one_dim=bench.one_dim, rank=bench.rank, cache=FactorCache(), text_encoder=True
        )
        parameters = [p for group in adapter.param_groups() for p in group["params"]]
    else:
        for model in models:
            model.requires_grad_(way == "full")
            if way == "lora":
                names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
                baselines.add_lora(model, names, bench.lora_rank)
            parameters += [p for p in model.parameters() if p.requires_grad]
    objective = _objective(pipeline, bench.batch)
    if not parameters:  # as through a frozen model: somebody must want gradients
        pipeline.text_encoder.get_input_embeddings().weight.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    batches = itertools.count()

    def step() -> None:
        objective.loss(*objective.draw(next(batches))).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _objective(pipeline: Any, batch: int) -> DreamBooth:
    rng, size = np.random.default_rng(0), (64, 64)
    pixels = rng.integers(0, 256, (_PICTURES, *size, 3), dtype=np.uint8)
    pictures = [Loaded(Image.fromarray(one), size, size) for one in pixels]
    captions = ["sks toy", "toy"] * (_PICTURES // 2)
    family, half = family_of(pipeline), _PICTURES // 2
    objective = DreamBooth(
        family,
        Diffusion(pipeline.scheduler),
        Latents(pipeline.vae, pictures, center_crop=True, cache=True),
        Captions(family, ["sks toy", "toy"], trained=["text_encoder"]),
        [
            Pool("instance", range(half), pictures, captions, None, 0),
            Pool("class", range(half, _PICTURES), pictures, captions, None, 0),
        ],
        batch_size=batch,
    )
    objective.prepare()
    return objective
