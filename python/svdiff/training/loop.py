"""The loop: batches, gradients, optimiser steps, logs, checkpoints; for every method and any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdiff_kernels import SVDiffError

from ..outputs import writing
from ..processes import Agreement, by_the_first, say
from ..progress import progress_bar
from ..termination import Notice
from . import state
from .chance import seed_of
from .config import TrainConfig, differences
from .dreambooth import DreamBooth
from .graphs import GraphedStep
from .methods import Method
from .optimizers import make_optimizer, make_schedule, optimizer_state, restore_optimizer
from .precision import autocast

_FIXED = ("method", "optimizer", "use_8bit_adam")
"""Settings of which a checkpoint cannot be gone on from with others."""

_LOG_EVERY = 10  # steps; reading a loss waits for the device


class Loop:
    """Trains what a method trains.

    Every process draws its part of each batch, and gradients are averaged over processes before each optimiser step:
    for spectral shifts that is about a megabyte.

    Args:
        config: settings of the run.
        host: accelerate's handle on device, precision, processes and trackers.
        method: what trains.
        objective: the batches and their loss.
        steps: optimiser steps in all.
        directory: where checkpoints go.
        validate: draws pictures, at a step, unless told to end.
    """

    def __init__(
        self,
        config: TrainConfig,
        host: Any,
        method: Method,
        objective: DreamBooth,
        *,
        steps: int,
        directory: Path,
        validate: Callable[[int, Notice], None],
    ) -> None:
        self._config, self._host, self._method, self._objective = config, host, method, objective
        self._steps, self._directory, self._validate = steps, directory, validate
        self._parameters = method.parameters()
        self._optimizer = make_optimizer(
            config,
            method,
            samples_per_step=config.train_batch_size * config.gradient_accumulation_steps * host.num_processes,
            fused=host.device.type == "cuda",
        )
        self._set_rates = make_schedule(config, self._optimizer, steps)
        self._scaler = torch.amp.GradScaler(host.device.type, enabled=config.mixed_precision == "fp16")
        self._ema = self._make_ema() if config.use_ema else None
        self._losses: list[float] = []
        self._pending: list[Tensor] = []
        self._reached: list[nn.Parameter] | None = None  # by the loss, in any process; of an encoder it may be not all

    @property
    def losses(self) -> list[float]:
        """Of each step so far."""
        return self._losses

    def resume(self, checkpoint: Path) -> list[str]:
        """Go on from a checkpoint; returns the settings that were others then.

        Raises:
            SVDiffError: it cannot be read, or does not fit this run. Nothing is changed.
        """
        found = state.load(checkpoint)
        changed = differences(found.config, self._config)
        for name in _FIXED:
            if found.config[name] != getattr(self._config, name):
                raise SVDiffError(f"{checkpoint} is of a run with {name} {found.config[name]}: resume with that")
        if found.step > self._steps:
            raise SVDiffError(f"{checkpoint} is beyond the {self._steps} steps asked for: raise max_train_steps")
        wanted = {name: tuple(p.shape) for name, p in self._parameters.items()}
        shapes = {name: tuple(found.tensors[f"parameter.{name}"].shape) for name in found.values["parameters"]}
        if shapes != wanted:
            settings = ", ".join(changed) or "another model"
            raise SVDiffError(
                f"{checkpoint} is of a run that trained something else ({settings}): resume with the same"
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(found.tensors[f"parameter.{name}"])
            if self._ema is not None:
                self._ema.optimization_step = found.values.get("ema_steps", 0)
                for (name, parameter), mean in zip(self._parameters.items(), self._ema.shadow_params, strict=True):
                    mean.copy_(found.tensors.get(f"ema.{name}", parameter))
        found_out = state.unflatten(found.tensors, found.values["optimizer"])
        restore_optimizer(self._optimizer, self._parameters, found_out)
        if self._scaler.is_enabled() and found.values["scaler"]:  # nothing if that run had none
            self._scaler.load_state_dict(found.values["scaler"])
        self._losses = list(found.values["losses"])
        return changed

    def run(self, told: Notice) -> None:
        """Take the steps that are left, or, if told to end, save a checkpoint and leave.

        Raises:
            SVDiffError: the loss is no longer finite, or a checkpoint cannot be written; earlier ones stay.
        """
        config, micro = self._config, self._config.gradient_accumulation_steps
        run: Callable[..., Tensor] = self._forward_and_backward
        if config.cuda_graphs:
            run = GraphedStep(self._loss, self._backward, list(self._parameters.values()))
        bar = progress_bar(range(len(self._losses) + 1, self._steps + 1), "Training", done=len(self._losses))
        self._set_training(True)
        agree = Agreement(self._host)
        for step in bar:
            self._set_rates(step - 1)
            total = torch.zeros((), device=self._host.device)
            for number in range((step - 1) * micro, step * micro):
                torch.manual_seed(seed_of(config.seed, "dropout", number, self._host.process_index))
                total += run(*self._objective.draw(number))
            self._take_step()
            self._pending.append(total / micro)
            if step % _LOG_EVERY == 0 or step in (1, self._steps):
                self._log(step, bar)
            saving = step % config.checkpointing_steps == 0
            if saving:
                self._save(step, bar)
            if config.validation_prompt and (step % config.validation_steps == 0 or step == self._steps):
                self._set_training(False)
                with self._as_saved():
                    self._validate(step, told)
                self._set_training(True)
            if agree(told()):
                if not saving:
                    self._save(step, bar)
                bar.close()
                say(f"stopped after step {step}: --resume_from_checkpoint latest goes on from there")
                told.leave()
        self._set_training(False)
        self._check_finite(self._steps)
        if self._ema is not None:
            self._ema.copy_to(self._parameters.values())

    def _loss(self, *batch: Tensor) -> Tensor:
        with autocast(self._config.mixed_precision, self._host.device):
            return self._objective.loss(*batch) + self._method.penalty()

    def _backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss / self._config.gradient_accumulation_steps).backward()

    def _forward_and_backward(self, *batch: Tensor) -> Tensor:
        loss = self._loss(*batch)
        self._backward(loss)
        return loss.detach()

    def _take_step(self) -> None:
        self._average_gradients()
        self._scaler.unscale_(self._optimizer)
        if self._config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._method.after_step()
        self._optimizer.zero_grad(set_to_none=not self._config.cuda_graphs)
        if self._ema is not None:
            self._ema.step(self._parameters.values())

    def _average_gradients(self) -> None:
        """As one vector: for spectral shifts there is but a megabyte to send."""
        if self._host.num_processes == 1:
            return
        with torch.no_grad():
            if self._reached is None:
                has_grad = [float(p.grad is not None) for p in self._parameters.values()]
                anywhere = self._host.reduce(torch.tensor(has_grad, device=self._host.device), "sum").tolist()
                self._reached = [p for p, count in zip(self._parameters.values(), anywhere, strict=True) if count]
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._reached]
            mean = self._host.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
            parts = mean.split([grad.numel() for grad in grads])
            for parameter, grad, part in zip(self._reached, grads, parts, strict=True):
                parameter.grad = grad
                grad.copy_(part.view_as(grad))

    def _log(self, step: int, bar: Any) -> None:
        """Read the losses of the steps since the last time."""
        if not self._pending:
            return
        losses = self._host.reduce(torch.stack(self._pending), "mean").tolist()
        for number, loss in enumerate(losses, start=len(self._losses) + 1):
            if not abs(loss) < float("inf"):
                raise self._diverged(f"the loss became {loss} at step {number}")
        self._losses += losses
        self._pending.clear()
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        with writing(self._directory / self._config.logging_dir):
            self._host.log({"loss": losses[-1], "lr": self._optimizer.param_groups[0]["lr"]}, step=step)

    def _check_finite(self, step: int) -> None:
        """A step can spoil what trains although its loss was a number."""
        for name, parameter in self._parameters.items():
            if not parameter.isfinite().all():
                raise self._diverged(f"{name} became NaN or infinite at step {step}")

    def _diverged(self, how: str) -> SVDiffError:
        found = state.checkpoints(self._directory)
        advice = f", and go on from {found[-1].name} with --resume_from_checkpoint latest" if found else ""
        return SVDiffError(f"{how}: lower learning_rate, or use mixed_precision no{advice}")

    def _save(self, step: int, bar: Any) -> None:
        self._log(step, bar)
        self._check_finite(step)
        by_the_first(self._host, lambda: self._write_checkpoint(step))

    def _write_checkpoint(self, step: int) -> None:
        tensors, optimizer = state.flatten("optimizer", optimizer_state(self._optimizer, self._parameters))
        values = {"optimizer": optimizer, "scaler": self._scaler.state_dict(), "losses": self._losses}
        values["parameters"] = list(self._parameters)
        tensors |= {f"parameter.{name}": parameter for name, parameter in self._parameters.items()}
        if self._ema is not None:
            tensors |= {
                f"ema.{name}": mean for name, mean in zip(self._parameters, self._ema.shadow_params, strict=True)
            }
            values["ema_steps"] = self._ema.optimization_step
        state.save(
            self._directory,
            state.State(step, asdict(self._config), tensors, values),
            lambda folder: self._save_learnt(folder, step),
            limit=self._config.checkpoints_total_limit,
        )

    def _save_learnt(self, folder: Path, step: int) -> None:
        with self._as_saved():
            self._method.save(folder, step=step)

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """What trains is as it would be if the run ended now: its exponential mean, if that is wanted."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters.values())
        self._ema.copy_to(self._parameters.values())
        try:
            yield
        finally:
            self._ema.restore(self._parameters.values())

    def _make_ema(self) -> Any:
        from diffusers.training_utils import EMAModel

        return EMAModel(self._parameters.values(), decay=self._config.ema_decay)

    def _set_training(self, training: bool) -> None:
        for model in self._method.models:
            model.train(training)
