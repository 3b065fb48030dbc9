"""svdiff generate: pictures from a base model, with or without spectral shifts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from svdiff_kernels import FactorCache, SVDiffError
from svdiff_kernels.backends import outruns_plain_layers

from . import checkpoint, custom_diffusion
from .attach import Form, load
from .mixtures import named_paths, parse_mix
from .outputs import run_directory, write_run_file
from .pipelines import (
    DTYPES,
    check_resolution,
    default_resolution,
    device_of_choice,
    load_pipeline,
    set_scheduler,
)
from .sampling import grid, sample, save_picture, save_pictures, wanted_pictures
from .tokens import add_token, read_tokens

FUSED_FROM = 100_000
"""Latent pixels that the denoiser computes with one mix, from which it is faster to fuse it first.

A spectral layer of ``min(M, N) = m`` and ``max(M, N) = X`` takes ``2 T m^2`` operations more than a plain one for T
rows, and fusing it ``2 m^2 X``. Summed over the layers of SD 1.5 or SDXL they are even at 45,000 to 48,000 latent
pixels, at any resolution; by the clock at twice as many, since fusing reads and writes every weight, too. Where
`backends.outruns_plain_layers`, it never pays."""


@dataclass
class GenerateConfig:
    """Settings of `generate`; each is a flag of ``svdiff generate``."""

    pretrained_model_name_or_path: str = field(metadata={"help": "folder, hub id, or miniature"})
    prompt: list[str] = field(metadata={"help": "what to draw; several prompts may be given"})
    output_dir: str = field(default="outputs/generate", metadata={"help": "a new folder for the pictures"})
    spectral_shifts_ckpt: list[str] | None = field(
        default=None,
        metadata={"help": "folders or files with trained shifts, also as name=path; without any the base model draws"},
    )
    spectral_shifts_scale: float = field(default=1.0, metadata={"help": "weight of the shifts, if no mix is given"})
    custom_diffusion_ckpt: str | None = field(
        default=None,
        metadata={"help": "instead of shifts: a folder or file with Custom Diffusion's weights, of one run or merged"},
    )
    learned_embeds: list[str] | None = field(
        default=None,
        metadata={"help": "folders or files with learned tokens; those beside shifts or weights need not be named"},
    )
    mix: list[str] | None = field(
        default=None,
        metadata={
            "help": 'how much of which shifts, "dog:0.7,ink:0.3": for all prompts, or one for each; a folder is called '
            'by its last part, "" is the base model'
        },
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "what not to draw"})
    num_images_per_prompt: int = field(default=1, metadata={"help": "pictures of each prompt"})
    batch_size: int = field(default=4, metadata={"help": "pictures drawn at a time"})
    num_inference_steps: int = field(default=50, metadata={"help": "steps of the scheduler"})
    guidance_scale: float | None = field(
        default=None,
        metadata={"help": "classifier-free guidance; 1 is none; default: the pipeline's own, 7.5 for SD 1.x"},
    )
    scheduler_type: str | None = field(
        default=None, metadata={"help": "ddim, dpm++, euler, ...; default: the model's own"}
    )
    height: int | None = field(default=None, metadata={"help": "pixels; default: what the model was trained at"})
    width: int | None = field(default=None, metadata={"help": "pixels; default: what the model was trained at"})
    seed: int = field(default=0, metadata={"help": "of the first picture; the next has the next seed"})
    dtype: Literal["fp32", "fp16", "bf16"] = field(default="fp32", metadata={"help": "precision of the model"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto: the accelerator, if there is one"})
    form: Form = field(
        default="auto",
        metadata={"help": "how spectral layers compute; auto fuses one mix for all into the weights if that is faster"},
    )
    svd_cache_dir: str | None = field(
        default=None, metadata={"help": "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    variant: str | None = field(default=None, metadata={"help": "of the weight files, such as fp16"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})


@dataclass(frozen=True)
class GenerateResult:
    """What `generate` made.

    Attributes:
        output_dir: the folder.
        pictures: files, prompt by prompt.
        grid: one file with all of them, a row per prompt.
    """

    output_dir: Path
    pictures: list[Path]
    grid: Path

    def __str__(self) -> str:
        return f"{len(self.pictures)} pictures in {self.output_dir}, all of them in {self.grid.name}"


def generate(config: GenerateConfig) -> GenerateResult:
    """Draw pictures into a new folder, which appears when all are done.

    Raises:
        SVDiffError: anything wrong with the settings, the model or the shifts; no folder is made then.
    """
    mixes = check(config)
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        device = device_of_choice(config.device)
        pipeline = load_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
        side = default_resolution(pipeline)
        resolution = config.height or side, config.width or side
        check_resolution(pipeline, *resolution)
        is_flux = type(pipeline).__name__.startswith("Flux")
        if config.negative_prompt is not None and is_flux:
            raise SVDiffError(f"negative_prompt: a {type(pipeline).__name__} is guided without one")
        if config.scheduler_type is not None:
            set_scheduler(pipeline, config.scheduler_type)
        for token, vectors in _learned(config).items():
            add_token(pipeline, token, vectors)
        if config.custom_diffusion_ckpt is not None:
            custom_diffusion.load(pipeline, config.custom_diffusion_ckpt)
        adapter = None
        if mixes:
            paths = named_paths(config.spectral_shifts_ckpt or [])
            adapter = load(pipeline, paths, form=config.form, cache=FactorCache(config.svd_cache_dir))
        pipeline.to(device)
        if config.dtype != "fp32":
            pipeline.to(DTYPES[config.dtype])  # after the shifts: factors are made from fp32 weights

        count = config.num_images_per_prompt
        wanted = wanted_pictures(config.prompt, count, config.seed)
        latent_pixels = math.prod(resolution) / pipeline.vae_scale_factor**2 * len(wanted)
        if not is_flux and (config.guidance_scale is None or config.guidance_scale > 1):
            latent_pixels *= 2  # classifier-free guidance computes each with the prompt and without
        if adapter is not None and all(mix == mixes[0] for mix in mixes):
            adapter.set_adapters(list(mixes[0]), list(mixes[0].values()))
            work = latent_pixels * config.num_inference_steps
            fast = outruns_plain_layers(DTYPES[config.dtype], device)
            if config.form == "auto" and work >= FUSED_FROM and not fast:
                adapter.fuse()
            adapter = None
        images = sample(
            pipeline,
            [picture.prompt for picture in wanted],
            [picture.seed for picture in wanted],
            batch_size=config.batch_size,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            resolution=resolution,
            negative_prompt=config.negative_prompt,
            adapter=adapter,
            mixes=[mix for mix in mixes for _ in range(count)],
        )
        drawn = save_pictures(images, wanted, staging)
        save_picture(grid(drawn, count if len(config.prompt) > 1 else min(count, 8)), staging / "grid.png")
        write_run_file(staging, "generate", asdict(config), pictures=[asdict(picture) for picture in wanted])
    output_dir = Path(config.output_dir)
    return GenerateResult(output_dir, [output_dir / picture.file for picture in wanted], output_dir / "grid.png")


def check(config: GenerateConfig) -> list[dict[str, float]]:
    """Raises SVDiffError if something makes no sense, before a model is loaded; returns the mixture of each prompt."""
    if not config.prompt or not all(prompt.strip() for prompt in config.prompt):
        raise SVDiffError("a prompt is empty: say what to draw")
    for name in ("num_images_per_prompt", "batch_size", "num_inference_steps"):
        if getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.dtype not in DTYPES:
        raise SVDiffError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    paths = named_paths(config.spectral_shifts_ckpt or [])
    for path in paths.values():
        checkpoint.read_all(path)  # a bad file need not wait for the model to load
    if config.custom_diffusion_ckpt is not None:
        custom_diffusion.read(config.custom_diffusion_ckpt)
        if paths:
            raise SVDiffError("custom_diffusion_ckpt and spectral_shifts_ckpt exclude each other: choose one")
    _learned(config)
    if config.mix is None:
        if len(paths) > 1:
            raise SVDiffError(f"mix is missing: how much of {', '.join(paths)} is wanted?")
        return [dict.fromkeys(paths, config.spectral_shifts_scale)] * len(config.prompt) if paths else []
    if not paths:
        raise SVDiffError("mix needs spectral_shifts_ckpt, which it mixes")
    if config.spectral_shifts_scale != 1.0:
        raise SVDiffError("spectral_shifts_scale and mix exclude each other: weights are part of the mix")
    if len(config.mix) not in (1, len(config.prompt)):
        raise SVDiffError(f"mix: {len(config.mix)} for {len(config.prompt)} prompts; give one for all, or one for each")
    mixes = [parse_mix(text, paths) for text in config.mix]
    return mixes * len(config.prompt) if len(mixes) == 1 else mixes


def _learned(config: GenerateConfig) -> dict[str, dict[str, Tensor]]:
    """The learned tokens that are asked for, and those beside the shifts."""
    found: dict[str, dict[str, Tensor]] = {}
    for path in config.learned_embeds or []:
        own = read_tokens(path)
        if not own:
            raise SVDiffError(f"learned_embeds: there is no learned_embeds.safetensors in {path}")
        found |= own
    beside = [*named_paths(config.spectral_shifts_ckpt or []).values(), config.custom_diffusion_ckpt]
    for path in filter(None, beside):
        folder = Path(path).expanduser()
        found = read_tokens(folder if folder.is_dir() else folder.parent) | found
    return found
