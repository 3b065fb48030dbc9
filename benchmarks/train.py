"""A whole step of `svdiff train` on the miniature: data, text encoder, UNet, loss, backward, AdamW."""

from __future__ import annotations

from typing import Any

import svdiff
import torch
from svdiff.bench import BenchConfig
from svdiff.dreambooth import DreamBooth
from svdiff.miniature import load_pipeline
from svdiff.sources import Captions, Latents
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

    def step() -> None:
        objective.loss(*objective.draw()).backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _objective(pipeline: Any, batch: int) -> DreamBooth:
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(_PICTURES)]
    captions = ["sks toy", "toy"] * (_PICTURES // 2)
    return DreamBooth(
        pipeline.unet,
        DDPMScheduler.from_config(pipeline.scheduler.config),
        Latents(pipeline.vae, images, 64, center_crop=True, random_flip=False, cache=True),
        Captions(pipeline.tokenizer, pipeline.text_encoder, captions, cache=False),
        num_instance=_PICTURES // 2,
        num_class=_PICTURES // 2,
        batch_size=batch,
        prior_weight=1.0,
        rng=torch.Generator().manual_seed(0),
    )
