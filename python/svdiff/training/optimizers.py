"""Optimisers and learning-rate schedules by their names in the settings."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from svdiff_kernels import SVDiffError

from .config import TrainConfig
from .methods import Method

_FOUND = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
"""What Prodigy keeps among its settings, and no setting is."""


def make_optimizer(config: TrainConfig, method: Method, *, samples_per_step: int, fused: bool) -> torch.optim.Optimizer:
    """The optimiser of what trains.

    Args:
        config: settings of the run.
        method: what trains.
        samples_per_step: over all batches and processes, by which ``scale_lr`` multiplies.
        fused: one kernel for all of AdamW.
    """
    factor = samples_per_step if config.scale_lr else 1
    lr, lr_1d, lr_encoders = config.learning_rate, config.learning_rate_1d, config.text_encoder_lr
    if config.optimizer == "prodigy" and lr_1d != lr:
        lr_1d = 0.0  # it knows one rate, and none; the rate of norms is next to none by default
    lr_encoders = lr if lr_encoders is None else lr_encoders
    lr_tokens = lr if config.learning_rate_tokens is None else config.learning_rate_tokens
    groups = method.param_groups(lr * factor, lr_1d * factor, lr_encoders * factor, lr_tokens * factor)
    return _optimizer(config, groups, lr * factor, fused)


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> Callable[[int], None]:
    """The course of the learning rates over `steps` optimiser steps: what sets them for the step after so many."""
    from diffusers.optimization import get_scheduler

    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        step_rules=config.lr_step_rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )

    def set_rates(done: int) -> None:
        for group, rate, course in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = rate * course(done)

    return set_rates


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """What an optimiser has found out: about each parameter by name, and about the run."""
    group = optimizer.param_groups[0]
    return {
        "run": {key: group[key] for key in _FOUND if key in group},
        "parameters": {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state},
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], found: Mapping[str, Any]
) -> None:
    """Go on with an `optimizer_state`; rates and the like, and so how parameters are grouped, are of the settings."""
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.load_state_dict(
        {
            "state": {i: found["parameters"][name] for i, name in enumerate(order) if name in found["parameters"]},
            "param_groups": [group | found["run"] for group in optimizer.state_dict()["param_groups"]],
        }
    )


def rehearse(config: TrainConfig, device: torch.device) -> None:
    """Take a step with settings that optimiser and schedule might refuse, before anything is loaded.

    Raises:
        SVDiffError: they do.
    """
    parameter = nn.Parameter(torch.zeros(4096, device=device))  # of fewer numbers bitsandbytes has no 8-bit moments
    parameter.grad = torch.ones_like(parameter)
    name = "use_8bit_adam" if config.use_8bit_adam else f"optimizer {config.optimizer}"
    try:
        groups = [{"params": [parameter], "lr": config.learning_rate}]
        optimizer = _optimizer(config, groups, config.learning_rate, fused=False)
        optimizer.step()
        name = f"lr_scheduler {config.lr_scheduler}"
        make_schedule(config, optimizer, config.max_train_steps)
    except Exception as error:  # of several libraries
        raise SVDiffError(f"{name}: {' '.join(str(error).split())}") from error


def _optimizer(config: TrainConfig, groups: list[dict[str, Any]], lr: float, fused: bool) -> torch.optim.Optimizer:
    common: dict[str, Any] = {
        "lr": lr,  # of no group, but where schedules look
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        with redirect_stdout(io.StringIO()):  # of its choices it tells
            return Prodigy(
                groups,
                beta3=config.prodigy_beta3,
                decouple=config.prodigy_decouple,
                use_bias_correction=config.prodigy_use_bias_correction,
                safeguard_warmup=config.prodigy_safeguard_warmup,
                **common,
            )
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **common)
    return torch.optim.AdamW(groups, fused=fused, **common)
