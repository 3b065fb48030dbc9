"""One stage of pretraining: a loop that can be stopped at any moment and goes on from its last checkpoint."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Stage:
    """What to train, and how long.

    Attributes:
        name: of the stage and its checkpoint.
        model: what is trained; it is left with the exponential mean of its weights.
        loss: of a batch drawn with the given source of chance, computed through the given (wrapped) model.
        steps: optimiser steps in all.
        learning_rate: the peak; 100 steps of warm-up lead to it, and a cosine to 4 % of it.
        validate: what to print now and then, with the mean weights in place.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, random.Random], torch.Tensor]
    steps: int
    learning_rate: float
    validate: Callable[[], str] | None = None


def run(
    stage: Stage, accelerator: Accelerator, folder: Path, *, seed: int, checkpoint_every: int, validate_every: int
) -> None:
    """Train `stage` to its end, from its checkpoint in `folder` if there is one.

    Every step draws its data and noise from a source seeded by stage, step and process, so a resumed run sees what an
    uninterrupted one would have seen.
    """
    model, main = stage.model, accelerator.is_main_process
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    ema = EMAModel(model.parameters(), decay=0.998, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    file = folder / f"{stage.name}.safetensors"
    first = _load(file, model, optimizer, ema) if file.exists() else 0
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    bar = tqdm(range(first, stage.steps), stage.name, initial=first, total=stage.steps, disable=not main, mininterval=5)
    for step in bar:
        rng = random.Random(f"{seed}/{stage.name}/{step}/{accelerator.process_index}")
        torch.manual_seed(rng.getrandbits(62))
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * _schedule(step, stage.steps)
        loss = stage.loss(wrapped, rng)
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        last = step + 1 == stage.steps
        if main and (last or (step + 1) % checkpoint_every == 0):
            _save(file, model, optimizer, ema, step + 1)
        if main and stage.validate and (last or (step + 1) % validate_every == 0):
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            tqdm.write(f"{stage.name} {step + 1}: {stage.validate()}")
            ema.restore(model.parameters())
            model.train()
    ema.copy_to(model.parameters())
    model.eval()
    accelerator.wait_for_everyone()


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 100) * (0.52 + 0.48 * math.cos(math.pi * step / steps))


def _save(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, step: int) -> None:
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for i, (parameter, shadow) in enumerate(zip(model.parameters(), ema.shadow_params, strict=True)):
        state[f"ema.{i}"] = shadow.contiguous()
        moments = optimizer.state[parameter]
        state[f"exp_avg.{i}"] = moments["exp_avg"].contiguous()
        state[f"exp_avg_sq.{i}"] = moments["exp_avg_sq"].contiguous()
    temporary = file.with_suffix(".tmp")
    save_file(state, temporary, metadata={"step": str(step)})
    os.replace(temporary, file)


def _load(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> int:
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
