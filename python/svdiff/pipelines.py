"""Base models: loaded from a folder, a hub id or the miniature, checked, and given schedulers by their common names."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdiff_kernels import SVDiffError
from svdiff_kernels.decompose import is_finite

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm_solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Names for ``--scheduler_type``: the class in diffusers, and settings that the name stands for."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def load_pipeline(name_or_path: str, *, revision: str | None = None, variant: str | None = None) -> Any:
    """A diffusers pipeline in fp32 on the CPU, from safetensors only, without a safety checker.

    Args:
        name_or_path: a folder, a hub id, or ``miniature``.
        revision: branch, tag or commit on the hub.
        variant: of the weight files, such as ``fp16``.

    Raises:
        SVDiffError: no such model, files missing, or a weight that holds NaN or inf.
    """
    if name_or_path == "miniature":
        from .miniature import load_pipeline as load_miniature

        with _quiet_loading():
            pipeline: Any = load_miniature()
        pipeline.register_to_config(_name_or_path=name_or_path)  # what delta files call their base
        return pipeline
    from diffusers import DiffusionPipeline

    where = _place_of(name_or_path)
    with loading(name_or_path):
        listed = DiffusionPipeline.load_config(where, revision=revision)
        left_out: dict[str, Any] = {part: None for part, kind in listed.items() if kind == [None, None]}
        if "safety_checker" in listed:
            left_out |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline = DiffusionPipeline.from_pretrained(
            where, revision=revision, variant=variant, torch_dtype=torch.float32, use_safetensors=True, **left_out
        )
    for part in (*DENOISERS, *TEXT_ENCODERS, "vae"):
        if isinstance(module := getattr(pipeline, part, None), nn.Module):
            _check_finite(part, module)
    return pipeline


def classes_of(pipeline: Any) -> dict[str, str]:
    """The class names of a pipeline's parts, and its own as ``pipeline``."""
    parts = {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None}
    return {**parts, "pipeline": type(pipeline).__name__}


def listed_classes(name_or_path: str) -> dict[str, str]:
    """`classes_of` what `load_pipeline` would load, without its weights.

    Raises:
        SVDiffError: see `load_pipeline`.
    """
    if name_or_path == "miniature":
        return classes_of(load_pipeline(name_or_path))
    from diffusers import DiffusionPipeline

    where = _place_of(name_or_path)
    with loading(name_or_path):
        listed = DiffusionPipeline.load_config(where)
    parts = {name: kind[1] for name, kind in listed.items() if isinstance(kind, list) and kind[1]}
    return {**parts, "pipeline": listed["_class_name"]}


def set_scheduler(pipeline: Any, scheduler_type: str) -> None:
    """Swap the pipeline's sampler for one of `SCHEDULERS`, with the noise schedule kept.

    Raises:
        SVDiffError: no scheduler of this name, a library that it needs is missing, or the model flows along straight
            lines, where these would mistake its answers.
    """
    import diffusers

    if scheduler_type not in SCHEDULERS:
        raise SVDiffError(f"scheduler_type {scheduler_type!r} is not one of {', '.join(SCHEDULERS)}")
    name, settings = SCHEDULERS[scheduler_type]
    if type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        if scheduler_type != "euler":
            raise SVDiffError(f"scheduler_type {scheduler_type}: a {type(pipeline).__name__} takes none but euler")
        name = "FlowMatchEulerDiscreteScheduler"
    try:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **settings)
    except ImportError as error:
        raise SVDiffError(f"scheduler_type {scheduler_type}: {' '.join(str(error).split())}") from error


def check_resolution(pipeline: Any, *sides: int) -> None:
    """Refuse pixel sizes that the pipeline cannot make.

    Raises:
        SVDiffError: a side is not a multiple of the VAE's factor and of 8, too small for the UNet's levels, or too
            large for the transformer's table of places.
    """
    factor, config = side_multiple(pipeline), denoiser_of(pipeline).config
    levels = len(getattr(config, "down_block_types", ())) or 1
    smallest = math.lcm(factor, pipeline.vae_scale_factor * 2 ** (levels - 1))
    places = getattr(config, "pos_embed_max_size", None)
    largest = places * config.patch_size * pipeline.vae_scale_factor if places else sys.maxsize
    for side in sides:
        if not smallest <= side <= largest or side % factor:
            bounds = f"at least {smallest}" + (f", at most {largest}" if places else "")
            raise SVDiffError(f"resolution {side} does not fit this model: it must be a multiple of {factor}, {bounds}")


def side_multiple(pipeline: Any) -> int:
    """What the sides of its pictures must be multiples of, in pixels."""
    patch = 1 if hasattr(pipeline, "unet") else int(getattr(denoiser_of(pipeline).config, "patch_size", 1))
    if type(pipeline).__name__.startswith("Flux"):
        patch = 2  # its pipeline packs latents, whatever the transformer's patch
    return math.lcm(pipeline.vae_scale_factor * patch, 8)  # diffusers' pipelines insist on eight


def default_resolution(pipeline: Any) -> int:
    """Side in pixels of the square pictures that the denoiser was trained on."""
    own = getattr(denoiser_of(pipeline).config, "sample_size", None)
    side = own or pipeline.default_sample_size  # FLUX's transformer tells none
    return int(side * pipeline.vae_scale_factor)


def denoiser_of(pipeline: Any) -> Any:
    """The pipeline's UNet or transformer.

    Raises:
        SVDiffError: it has none.
    """
    for name in DENOISERS:
        if isinstance(module := getattr(pipeline, name, None), nn.Module):
            return module
    raise SVDiffError(f"{type(pipeline).__name__} has neither a unet nor a transformer")


def text_encoders_of(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's text encoders by name."""
    found = {name: getattr(pipeline, name, None) for name in TEXT_ENCODERS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def device_of_choice(device: str = "auto") -> torch.device:
    """The named device, or for ``auto`` the machine's accelerator, else its CPU.

    Raises:
        SVDiffError: there is no such device here.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise SVDiffError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _place_of(name_or_path: str) -> str:
    """The folder of a model, or its hub id."""
    folder = Path(name_or_path).expanduser()
    if not name_or_path.strip():
        raise SVDiffError("the name of the pretrained model is empty: give a folder, a hub id, or miniature")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise SVDiffError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    return str(folder) if folder.is_dir() else name_or_path


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Within, whatever a damaged folder makes of the loaders of three libraries is one error, and there is no noise."""
    try:
        with _quiet_loading():
            yield
    except Exception as error:
        raise SVDiffError(f"cannot load the model {name}: {' '.join(str(error).split())}") from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Loaders' bars are for terminals; and newer diffusers deprecate the torch_dtype that older ones need."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_finite(part: str, module: nn.Module) -> None:
    for name, weight in module.named_parameters():
        if not is_finite(weight):
            raise SVDiffError(f"the base model is damaged: {part}.{name} holds NaN or inf")
