"""svdiff train: DreamBooth by spectral shifts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdiff_kernels import SVDiffError

from .outputs import RUN_FILE, resumable_directory, write_run_file, writing
from .pipelines import check_resolution, default_resolution, load_pipeline, side_multiple
from .processes import by_the_first, check_same, failing_once, say
from .targets import select
from .termination import deferred_exit
from .training import state
from .training.concepts import concepts_of, instance_pictures
from .training.config import TrainConfig, check
from .training.data import Picture, Size, buckets_of, load_picture
from .training.families import Family, family_of
from .training.host import make_host, start_trackers
from .training.hub import push, write_model_card
from .training.loop import Loop
from .training.methods import METHODS, Method
from .training.objective import make_objective
from .training.optimizers import rehearse
from .training.precision import DTYPES
from .training.prior import classes_of
from .training.retrieval import real_classes
from .training.sharding import shard_frozen
from .training.validation import validate

__all__ = ["TrainConfig", "TrainResult", "train"]

CLASS_PICTURES = "class_images"
"""Folder in output_dir for those that have no folder of their own."""


@dataclass(frozen=True)
class TrainResult:
    """What `train` made.

    Attributes:
        output_dir: the folder, with the files in it.
        files: what has been learnt, of spectral shifts the delta files; the first process names them.
        steps: optimiser steps taken, those before a stop included.
        loss: mean of the last tenth of the steps.
        losses: of each step.
        num_parameters: how many numbers were trained.
        seconds: from the first step to the last of this process, without loading and drawing class pictures.
        repository: on the hub, if it was pushed there.
    """

    output_dir: Path
    files: list[Path]
    steps: int
    loss: float
    losses: list[float]
    num_parameters: int
    seconds: float
    repository: str | None = None

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in self.files)
        pushed = f", pushed to {self.repository}" if self.repository else ""
        return (
            f"{self.num_parameters:,} numbers ({size:,} bytes) in {self.output_dir} after {self.steps} steps, "
            f"{self.seconds:.0f} s, loss {self.loss:.4f}{pushed}"
        )


@failing_once()
def train(config: TrainConfig) -> TrainResult:
    """Teach a model a subject, or several.

    Under ``accelerate launch`` every process calls this, and the first writes. If one fails, all do: the one that
    failed first raises its error, the others `processes.FailedElsewhereError`.

    Raises:
        SVDiffError: anything wrong with the settings, the pictures or the model, or a loss that is not finite. What
            there was in output_dir is there still, and no new folder unless it holds a checkpoint. Or the hub refuses
            the result, which stays.
    """
    check(config)
    concepts = concepts_of(config)
    instances = [list(instance_pictures(config, concept)) for concept in concepts]
    captions = {picture.caption for pictures in instances for picture in pictures}
    if unused := [word for word in config.modifier_token or [] if not any(word in caption for caption in captions)]:
        raise SVDiffError(f"modifier_token: {unused[0]} is in no caption, so that nothing would be learnt of it")
    with make_host(config) as host, _directory(config, host) as directory:
        checkpoint = _checkpoint(config, directory)
        rehearse(config, host.device)
        for pictures in instances:
            for picture in pictures:
                load_picture(picture, [(64, 64)])  # a damaged one need not wait for the model to load
        family = _load(config)
        buckets = _buckets(config, family.pipeline)
        if config.real_prior:
            classes = real_classes(config, host, family, concepts, directory)
        else:
            classes = classes_of(config, host, family.pipeline, concepts, directory / CLASS_PICTURES)
        check_same(host, "pictures", [(p.path.name, p.caption) for pool in (*instances, *classes) for p in pool])
        method = _prepared(config, family, host.device, [picture for pictures in instances for picture in pictures])
        objective = make_objective(config, host, family, concepts, instances, classes, buckets, method.readers.keys())
        for model in method.models if config.shard_factors else []:
            shard_frozen(model, host.device)
        loop = Loop(
            config,
            host,
            method,
            objective,
            steps=_steps(config, sum(map(len, instances)), host.num_processes),
            directory=directory,
            validate=partial(validate, config, host, family.pipeline, directory),
        )
        if checkpoint is not None:
            changed = loop.resume(checkpoint)
            told_settings = f" with other settings: {', '.join(changed)}" if changed else ""
            say(f"going on from {checkpoint.name}{told_settings}")
        check_same(host, "checkpoints", len(loop.losses))
        if host.is_main_process:
            write_run_file(directory, "train", asdict(config))  # an earlier run is no longer what it was
        start = time.perf_counter()
        with deferred_exit() as told:
            loop.run(told)
            objective.release()
            last = loop.losses[-max(1, len(loop.losses) // 10) :]
            result = TrainResult(
                output_dir=Path(config.output_dir),
                files=[],
                steps=len(loop.losses),
                loss=sum(last) / len(last),
                losses=loop.losses,
                num_parameters=sum(p.numel() for p in method.parameters().values()),
                seconds=time.perf_counter() - start,
            )
            if host.is_main_process:
                prompts = sorted({picture.caption for pictures in instances for picture in pictures})
                result = _written(config, directory, method, result, prompts)
    if config.push_to_hub and result.files:  # of the first process
        result = replace(result, repository=push(directory, config))
    return result


def _written(
    config: TrainConfig, directory: Path, method: Method, result: TrainResult, prompts: list[str]
) -> TrainResult:
    with writing(directory):
        files = method.save(directory, instance_prompts=prompts, class_prompts=config.class_prompt or [])
        write_model_card(directory, config, prompts=prompts, steps=result.steps, num_parameters=result.num_parameters)
    told = {"loss": result.loss, "steps": result.steps, "seconds": round(result.seconds, 3)}
    write_run_file(directory, "train", asdict(config), **told)
    return replace(result, files=[result.output_dir / file.relative_to(directory) for file in files])


@contextmanager
def _directory(config: TrainConfig, host: Any) -> Iterator[Path]:
    """Where the run writes; the first process makes it."""
    directory = Path(config.output_dir).expanduser().absolute()
    with ExitStack() as stack:

        def make() -> None:
            stack.enter_context(
                resumable_directory(
                    directory,
                    overwrite=config.overwrite,
                    resume=config.resume_from_checkpoint is not None,
                    keep=lambda path: bool(state.checkpoints(path)),
                    spare=lambda path: any((path / CLASS_PICTURES).rglob("*.png")),
                )
            )
            state.sweep(directory)
            if not (directory / RUN_FILE).exists():
                write_run_file(directory, "train", asdict(config))
            start_trackers(config, host, directory)

        by_the_first(host, make)
        yield directory


def _load(config: TrainConfig) -> Family:
    pipeline = load_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
    family = family_of(pipeline, max_sequence_length=config.max_sequence_length, guidance_scale=config.guidance_scale)
    check_resolution(pipeline, config.resolution or default_resolution(pipeline))
    select(family.denoiser, config.targets)  # a wrong expression need not wait for the class pictures
    kind = type(pipeline).__name__
    for name in ("snr_gamma", "noise_offset"):
        if family.flow and getattr(config, name):
            raise SVDiffError(f"{name}: a {kind} matches flows, and takes a weighting_scheme instead")
    if config.unmix_loss_weight and not family.has_cross_attention:
        raise SVDiffError(f"unmix_loss_weight: a {kind} has no cross-attention to look at")
    return family


def _prepared(config: TrainConfig, family: Family, device: torch.device, pictures: Sequence[Picture]) -> Method:
    """The models are where they compute, and what trains is in them."""
    for part in family.pipeline.components.values():
        if isinstance(part, nn.Module):  # a denoiser to be sharded waits: there may be no room for all of it
            part.to("cpu" if config.shard_factors and part is family.denoiser else device)
    method = METHODS[config.method](config, family, pictures)
    if config.init_from is not None:
        method.start_from(Path(config.init_from).expanduser())
    if config.mixed_precision != "no":
        method.cast(DTYPES[config.mixed_precision])
    if config.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()
        for encoder in method.readers.values():
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile is not None:
        family.denoiser.compile(mode=config.compile)
    return method


def _buckets(config: TrainConfig, pipeline: Any) -> list[Size]:
    side = config.resolution or default_resolution(pipeline)
    if config.aspect_ratio_buckets is None:
        return [(side, side)]
    buckets = buckets_of(config.aspect_ratio_buckets, side, side_multiple(pipeline))
    check_resolution(pipeline, *(length for size in buckets for length in size))
    return buckets


def _steps(config: TrainConfig, num_pictures: int, processes: int) -> int:
    if config.num_train_epochs is None:
        return config.max_train_steps
    per_step = config.train_batch_size * config.gradient_accumulation_steps * processes
    return math.ceil(config.num_train_epochs * config.repeats * num_pictures / per_step)


def _checkpoint(config: TrainConfig, directory: Path) -> Path | None:
    """Where to go on from."""
    if config.resume_from_checkpoint is None:
        return None
    found = state.find(directory, config.resume_from_checkpoint)
    if found is None:
        say(f"no checkpoint in {directory} yet: starting anew")
    return found
