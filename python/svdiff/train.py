"""svdiff train: DreamBooth by spectral shifts."""

# ruff: noqa: RUF009 (_flag makes a dataclass field)

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from svdiff_kernels import FactorCache, SVDiffError

from .adapter import Adapter
from .attach import Form, OneDim, attach
from .data import Picture, find_pictures, load_picture
from .dreambooth import DreamBooth
from .graphs import GraphedStep
from .outputs import run_directory, write_run_file
from .pipelines import check_resolution, default_resolution, load_pipeline, set_scheduler
from .prior import class_pictures
from .progress import progress_bar
from .sampling import grid, sample, save_picture
from .sources import Captions, Latents
from .targets import select

_LOG_EVERY = 10  # steps; reading a loss waits for the device


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """Settings of `train`; each is a flag of ``svdiff train``."""

    pretrained_model_name_or_path: str = field(metadata={"help": "folder, hub id, or miniature"})
    instance_data_dir: str = field(
        metadata={"help": "folder with the subject's pictures; captions in metadata.jsonl or a .txt beside a picture"}
    )
    instance_prompt: str | None = _flag(None, "caption of pictures without one, such as 'a photo of sks dog'")
    output_dir: str = _flag("outputs/train", "a new folder for the shifts")
    overwrite: bool = _flag(False, "replace an earlier run in output_dir")
    revision: str | None = _flag(None, "branch, tag or commit on the hub")
    variant: str | None = _flag(None, "of the weight files, such as fp16")

    with_prior_preservation: bool = _flag(False, "train on pictures of the class too, so that it is not forgotten")
    prior_loss_weight: float = _flag(1.0, "weight of their loss")
    class_data_dir: str | None = _flag(None, "folder with class pictures; default: class_images in output_dir")
    class_prompt: list[str] | None = _flag(None, "what the class is called; several prompts are taken in turn")
    num_class_images: int = _flag(100, "class pictures; those missing are drawn by the base model")
    sample_batch_size: int = _flag(4, "pictures drawn at a time")
    prior_generation_scheduler_type: str | None = _flag(None, "ddim, dpm++, ...; default: the model's own")
    prior_generation_num_inference_steps: int = _flag(50, "steps per class picture")
    prior_generation_guidance_scale: float = _flag(7.5, "classifier-free guidance of class pictures")

    targets: str = _flag("all", "all, cross_attn, cross_attn_kv, up, down, mid, or a regular expression of paths")
    rank: int | None = _flag(None, "train this many largest singular values of each weight; default: all")
    form: Form = _flag("auto", "how spectral layers compute")
    one_dim: OneDim = _flag("vector", "how weights of norms move")
    train_text_encoder: bool = _flag(False, "train shifts of the text encoder too")
    svd_cache_dir: str | None = _flag(None, "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache")

    resolution: int | None = _flag(None, "side of the training pictures; default: what the model was trained at")
    center_crop: bool = _flag(False, "cut pictures at the centre, not anywhere")
    random_flip: bool = _flag(False, "mirror pictures by chance")
    cache_latents: bool = _flag(True, "encode pictures once, unless they are cut at random")
    train_batch_size: int = _flag(1, "subject pictures per step; as many class pictures come on top")
    max_train_steps: int = _flag(800, "optimiser steps")
    gradient_accumulation_steps: int = _flag(1, "batches per optimiser step")
    gradient_checkpointing: bool = _flag(False, "less memory, more time")
    mixed_precision: Literal["no", "fp16", "bf16"] = _flag("no", "of the frozen model; shifts are always fp32")
    learning_rate: float = _flag(1e-3, "of the shifts of matrices and kernels")
    learning_rate_1d: float = _flag(1e-6, "of the shifts of norms")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = _flag("constant", "course of the learning rates")
    lr_warmup_steps: int = _flag(0, "steps of warm-up")
    lr_num_cycles: int = _flag(1, "of cosine_with_restarts")
    lr_power: float = _flag(1.0, "of polynomial")
    adam_beta1: float = _flag(0.9, "of AdamW")
    adam_beta2: float = _flag(0.999, "of AdamW")
    adam_weight_decay: float = _flag(1e-2, "of AdamW")
    adam_epsilon: float = _flag(1e-8, "of AdamW")
    max_grad_norm: float = _flag(1.0, "gradients are clipped to this norm; 0: not at all")
    seed: int = _flag(0, "the same seed gives the same shifts, bit for bit, on one machine")

    validation_prompt: list[str] | None = _flag(None, "prompts to draw while training, into validation/")
    validation_steps: int = _flag(100, "steps between drawings")
    num_validation_images: int = _flag(4, "pictures of each prompt")
    validation_num_inference_steps: int = _flag(25, "steps per picture")
    validation_guidance_scale: float = _flag(7.5, "classifier-free guidance")
    cuda_graphs: bool = _flag(False, "replay a step as one CUDA graph: faster for small batches, on an NVIDIA GPU")
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = _flag(
        None, "a mode of torch.compile for the UNet; minutes before the first step"
    )
    report_to: Literal["auto", "tensorboard", "none"] = _flag("auto", "where curves go; auto: tensorboard if installed")


@dataclass(frozen=True)
class TrainResult:
    """What `train` made.

    Attributes:
        output_dir: the folder, with the delta files in it.
        files: the delta files.
        steps: optimiser steps taken.
        loss: mean of the last tenth of the steps.
        losses: of each step.
        num_parameters: how many numbers were trained.
        seconds: from the first step to the last, without loading and drawing class pictures.
    """

    output_dir: Path
    files: list[Path]
    steps: int
    loss: float
    losses: list[float]
    num_parameters: int
    seconds: float

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in self.files)
        rate = self.steps / self.seconds
        return (
            f"{self.num_parameters:,} shifts ({size:,} bytes) in {self.output_dir} after {self.steps} steps, "
            f"{rate:.1f} a second, loss {self.loss:.4f}"
        )


def train(config: TrainConfig) -> TrainResult:
    """Teach a model a subject; writes a new folder, which appears when all is done.

    Raises:
        SVDiffError: anything wrong with the settings, the pictures or the model, or a loss that is not finite. No
            folder is made then.
    """
    _check(config)
    instance = find_pictures(config.instance_data_dir, config.instance_prompt)
    for picture in instance:
        load_picture(picture.path, config.resolution or 64)  # a damaged one need not wait for the model to load
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging, _accelerator(config, staging) as host:
        pipeline = _load(config)
        pipeline.to(host.device)
        pictures = instance + _class_pictures(config, pipeline, staging)
        adapter = attach(
            pipeline,
            targets=config.targets,
            rank=config.rank,
            form=config.form,
            one_dim=config.one_dim,
            cache=None if config.svd_cache_dir is None else FactorCache(config.svd_cache_dir),
            text_encoder=config.train_text_encoder,
        )
        objective = _objective(config, host, pipeline, pictures, num_instance=len(instance))
        start = time.perf_counter()
        losses = _optimise(config, host, pipeline, adapter, objective, staging)
        seconds = time.perf_counter() - start

        files = adapter.save_weights(
            staging, instance_prompts=sorted({p.caption for p in instance}), class_prompts=config.class_prompt or []
        )
        tail = losses[-max(1, len(losses) // 10) :]
        loss = sum(tail) / len(tail)
        write_run_file(staging, "train", asdict(config), loss=loss, steps=len(losses), seconds=round(seconds, 3))
        count = adapter.num_parameters()
    output_dir = Path(config.output_dir)
    return TrainResult(output_dir, [output_dir / f.name for f in files], len(losses), loss, losses, count, seconds)


def _check(config: TrainConfig) -> None:
    if config.instance_prompt is not None and not config.instance_prompt.strip():
        raise SVDiffError("instance_prompt is empty: say what the pictures show")
    if config.with_prior_preservation and not config.class_prompt:
        raise SVDiffError("with_prior_preservation needs a class_prompt")
    for name in ("class_prompt", "validation_prompt"):
        if not all(prompt.strip() for prompt in getattr(config, name) or ["-"]):
            raise SVDiffError(f"{name} is empty")
    at_least_one = (
        "num_class_images sample_batch_size prior_generation_num_inference_steps train_batch_size max_train_steps "
        "gradient_accumulation_steps validation_steps num_validation_images validation_num_inference_steps"
    )
    for name in at_least_one.split():
        if getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.resolution is not None and config.resolution < 1:
        raise SVDiffError(f"resolution must be positive, not {config.resolution}")
    for name in ("learning_rate", "learning_rate_1d", "prior_loss_weight", "adam_weight_decay", "max_grad_norm"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise SVDiffError(f"{name} must be a finite number, not below 0, not {getattr(config, name)}")
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise SVDiffError("mixed_precision fp16 needs an accelerator: use bf16 or no on a CPU")
    if config.cuda_graphs and not _has_cuda():
        raise SVDiffError("cuda_graphs needs an NVIDIA GPU, and torch sees none")
    for name in ("compile", "gradient_checkpointing"):
        if config.cuda_graphs and getattr(config, name):
            raise SVDiffError(f"cuda_graphs and {name} exclude each other: choose one")
    if config.report_to == "tensorboard" and not _has_tensorboard():
        raise SVDiffError("report_to tensorboard: it is not installed (pip install tensorboard)")


@contextmanager
def _accelerator(config: TrainConfig, directory: Path) -> Iterator[Any]:
    """accelerate's handle on device, precision and trackers; its process-wide state is given back."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    tracked = config.report_to == "tensorboard" or (config.report_to == "auto" and _has_tensorboard())
    host = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with="tensorboard" if tracked else None,
        project_dir=str(directory),
    )
    try:
        if host.num_processes > 1:
            raise SVDiffError("svdiff train runs in one process: start it without accelerate launch")
        set_seed(config.seed)
        if tracked:
            settings = {key: value for key, value in asdict(config).items() if isinstance(value, int | float | str)}
            host.init_trackers("logs", config=settings)
        yield host
    finally:
        host.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)  # or the next precision would be refused


def _load(config: TrainConfig) -> Any:
    from diffusers import UNet2DConditionModel

    pipeline = load_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
    if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel) or hasattr(pipeline, "text_encoder_2"):
        raise SVDiffError(
            f"{config.pretrained_model_name_or_path} is a {type(pipeline).__name__}: "
            "svdiff train knows Stable Diffusion 1.x and 2.x so far"
        )
    check_resolution(pipeline, config.resolution or default_resolution(pipeline))
    select(pipeline.unet, config.targets)  # a wrong expression need not wait for the class pictures
    return pipeline


def _class_pictures(config: TrainConfig, pipeline: Any, staging: Path) -> list[Picture]:
    if not config.with_prior_preservation:
        return []
    assert config.class_prompt is not None
    own_scheduler = pipeline.scheduler
    if config.prior_generation_scheduler_type is not None:
        set_scheduler(pipeline, config.prior_generation_scheduler_type)
    pictures = class_pictures(
        pipeline,
        Path(config.class_data_dir or staging / "class_images").expanduser(),
        config.class_prompt,
        config.num_class_images,
        batch_size=config.sample_batch_size,
        num_inference_steps=config.prior_generation_num_inference_steps,
        guidance_scale=config.prior_generation_guidance_scale,
        resolution=config.resolution or default_resolution(pipeline),
        seed=config.seed,
    )
    pipeline.scheduler = own_scheduler
    return pictures


def _objective(
    config: TrainConfig, host: Any, pipeline: Any, pictures: list[Picture], *, num_instance: int
) -> DreamBooth:
    from diffusers import DDPMScheduler

    resolution = config.resolution or default_resolution(pipeline)
    if config.mixed_precision != "no":
        dtype = torch.float16 if config.mixed_precision == "fp16" else torch.bfloat16
        pipeline.unet.to(dtype)
        pipeline.text_encoder.to(dtype)
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        if config.train_text_encoder:
            pipeline.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return DreamBooth(
        pipeline.unet,
        DDPMScheduler.from_config(pipeline.scheduler.config),
        Latents(
            pipeline.vae,
            [load_picture(picture.path, resolution) for picture in progress_bar(pictures, "Reading pictures", delay=3)],
            resolution,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            cache=config.cache_latents,
        ),
        Captions(
            pipeline.tokenizer,
            pipeline.text_encoder,
            [picture.caption for picture in pictures],
            cache=not config.train_text_encoder,
        ),
        num_instance=num_instance,
        num_class=len(pictures) - num_instance,
        batch_size=config.train_batch_size,
        prior_weight=config.prior_loss_weight,
        rng=torch.Generator().manual_seed(config.seed),
    )


def _optimise(
    config: TrainConfig, host: Any, pipeline: Any, adapter: Adapter, objective: DreamBooth, staging: Path
) -> list[float]:
    """The loop; returns the loss of each step."""
    from diffusers.optimization import get_scheduler

    groups = adapter.param_groups(config.learning_rate, config.learning_rate_1d)
    parameters = [parameter for group in groups for parameter in group["params"]]
    plain = torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=host.device.type == "cuda",
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        plain,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    models = [pipeline.unet, *([pipeline.text_encoder] if config.train_text_encoder else [])]
    *models, optimizer = host.prepare(*models, plain)
    if config.compile is not None:
        pipeline.unet.compile(mode=config.compile)

    def eager_step(*batch: Tensor) -> Tensor:
        loss = objective.loss(*batch)
        host.backward(loss)
        return loss.detach()

    run = GraphedStep(objective.loss, host.backward, parameters) if config.cuda_graphs else eager_step
    pending: list[Tensor] = []
    losses: list[float] = []
    bar = progress_bar(range(1, config.max_train_steps + 1), "Training")
    _set_training(models, True)
    for step in bar:
        total = torch.zeros((), device=host.device)
        for _ in range(config.gradient_accumulation_steps):
            with host.accumulate(*models):
                total += run(*objective.draw())
                if host.sync_gradients and config.max_grad_norm > 0:
                    host.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=not config.cuda_graphs)
        schedule.step()
        pending.append(total / config.gradient_accumulation_steps)
        if step % _LOG_EVERY == 0 or step in (1, config.max_train_steps):
            losses += _finite(torch.stack(pending).tolist(), len(losses))
            pending.clear()
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            host.log({"loss": losses[-1], "lr": schedule.get_last_lr()[0]}, step=step)
        if config.validation_prompt and (step % config.validation_steps == 0 or step == config.max_train_steps):
            _set_training(models, False)
            _validate(config, pipeline, staging / "validation" / f"step_{step:06d}.png")
            _set_training(models, True)
    _set_training(models, False)
    return losses


def _finite(losses: list[float], before: int) -> list[float]:
    for step, loss in enumerate(losses, start=before + 1):
        if not abs(loss) < float("inf"):
            raise SVDiffError(f"the loss became {loss} at step {step}: lower learning_rate, or use mixed_precision no")
    return losses


def _validate(config: TrainConfig, pipeline: Any, path: Path) -> None:
    """A grid, one row per prompt; always the same noise, so that the rows of two grids can be compared."""
    assert config.validation_prompt is not None
    count = config.num_validation_images
    side = config.resolution or default_resolution(pipeline)
    images = sample(
        pipeline,
        [prompt for prompt in config.validation_prompt for _ in range(count)],
        [config.seed + i for _ in config.validation_prompt for i in range(count)],
        batch_size=config.sample_batch_size,
        num_inference_steps=config.validation_num_inference_steps,
        guidance_scale=config.validation_guidance_scale,
        resolution=(side, side),
    )
    path.parent.mkdir(exist_ok=True)
    save_picture(grid(list(images), count), path)


def _set_training(models: list[Any], training: bool) -> None:
    for model in models:
        model.train(training)


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None
