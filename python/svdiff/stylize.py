"""svdiff stylize: pictures in a style that has been learnt (InST, arXiv 2211.13203; with shifts SVD-InST).

Image-to-image: a picture is noised in part and drawn again, by a prompt with the style's word in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from svdiff_kernels import FactorCache, SVDiffError

from . import checkpoint
from .attach import load
from .latents import decoding_in_its_own_precision
from .outputs import run_directory, write_run_file
from .pipelines import (
    DTYPES,
    check_resolution,
    default_resolution,
    device_of_choice,
    load_pipeline,
    set_scheduler,
)
from .progress import progress_options
from .sampling import WantedPicture, grid, save_picture, save_pictures, slug
from .stochastic_inversion import inverting_stochastically
from .termination import exit_if_told
from .tokens import add_token, read_tokens, tokenizer_of
from .training.data import Picture, centre_of, find_picture, find_pictures, load_picture

_CAPTION = "{caption}"


@dataclass
class StylizeConfig:
    """Settings of `stylize`; each is a flag of ``svdiff stylize``."""

    pretrained_model_name_or_path: str = field(metadata={"help": "folder, hub id, or miniature"})
    image: list[str] = field(metadata={"help": "pictures to draw in the style, and folders of such"})
    output_dir: str = field(default="outputs/stylize", metadata={"help": "a new folder for the pictures"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})
    spectral_shifts_ckpt: str | None = field(
        default=None,
        metadata={"help": "folder or file with shifts that know the style, and its token beside them"},
    )
    spectral_shifts_scale: float = field(default=1.0, metadata={"help": "weight of the shifts"})
    learned_embeds: str | None = field(default=None, metadata={"help": "folder or file with the style's learned token"})
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "with {caption} for what metadata.jsonl or a .txt beside a picture says of it; default: "
            "'{caption}, in the style of TOKEN', and without a caption just the style"
        },
    )
    negative_prompt: str | None = field(default=None, metadata={"help": "what not to draw"})
    strength: float = field(default=0.8, metadata={"help": "0 leaves a picture as it is, 1 is all noise"})
    stochastic_inversion: bool = field(
        default=False, metadata={"help": "start from what the model takes for noise in the picture, which keeps more"}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "classifier-free guidance; 1 is none; default: the pipeline's own"}
    )
    num_inference_steps: int = field(default=50, metadata={"help": "of the whole way, of which strength is taken"})
    scheduler_type: str | None = field(
        default=None, metadata={"help": "ddim, dpm++, euler, ...; default: the model's own"}
    )
    num_images_per_picture: int = field(default=1, metadata={"help": "results of each picture"})
    batch_size: int = field(default=4, metadata={"help": "pictures drawn at a time"})
    resolution: int | None = field(
        default=None,
        metadata={"help": "side in pixels of the square cut from the middle; default: the model's"},
    )
    seed: int = field(default=0, metadata={"help": "of the first result; the next has the next seed"})
    dtype: Literal["fp32", "fp16", "bf16"] = field(default="fp32", metadata={"help": "precision of the model"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto: the accelerator, if there is one"})
    svd_cache_dir: str | None = field(
        default=None, metadata={"help": "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the hub"})
    variant: str | None = field(default=None, metadata={"help": "of the weight files, such as fp16"})


@dataclass(frozen=True)
class StylizeResult:
    """What `stylize` made.

    Attributes:
        output_dir: the folder.
        pictures: files, in the order of the pictures they are made of.
        grid: one file, a row per picture, each with its results behind it.
    """

    output_dir: Path
    pictures: list[Path]
    grid: Path

    def __str__(self) -> str:
        return f"{len(self.pictures)} pictures in {self.output_dir}, beside the originals in {self.grid.name}"


def stylize(config: StylizeConfig) -> StylizeResult:
    """Draw pictures in a style that has been learnt, into a new folder, which appears when all are done.

    Raises:
        SVDiffError: anything wrong with settings, pictures, the model or what was learnt; no folder is made then.
    """
    contents = check(config)
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        device = device_of_choice(config.device)
        pipeline = load_pipeline(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
        if config.negative_prompt is not None and type(pipeline).__name__.startswith("Flux"):
            raise SVDiffError(f"negative_prompt: a {type(pipeline).__name__} is guided without one")
        side = config.resolution or default_resolution(pipeline)
        check_resolution(pipeline, side)
        if config.scheduler_type is not None:
            set_scheduler(pipeline, config.scheduler_type)
        for token, vectors in _learned(config).items():
            add_token(pipeline, token, vectors)
            _check_room(pipeline, token, list(vectors), [picture.caption for picture in contents])
        if config.spectral_shifts_ckpt is not None:
            adapter = load(pipeline, config.spectral_shifts_ckpt, cache=FactorCache(config.svd_cache_dir))
            adapter.set_adapters("default", config.spectral_shifts_scale)
        pipeline.to(device)
        if config.dtype != "fp32":
            pipeline.to(DTYPES[config.dtype])  # after the shifts: factors are made from fp32 weights
        originals = [centre_of(load_picture(picture, [(side, side)]).image, side) for picture in contents]
        count = config.num_images_per_picture
        wanted = [
            WantedPicture(f"{i:03d}_{slug(picture.path.stem)}_seed{seed}.png", picture.caption, seed)
            for i, picture in enumerate(contents)
            for seed in range(config.seed + i * count, config.seed + (i + 1) * count)
        ]
        drawn = save_pictures(_drawn(config, pipeline, originals, wanted), wanted, staging)
        rows = [[original, *drawn[i * count : (i + 1) * count]] for i, original in enumerate(originals)]
        save_picture(grid([image for row in rows for image in row], count + 1), staging / "grid.png")
        told = [{**asdict(picture), "image": str(contents[i // count].path)} for i, picture in enumerate(wanted)]
        write_run_file(staging, "stylize", asdict(config), pictures=told)
    output_dir = Path(config.output_dir)
    return StylizeResult(output_dir, [output_dir / picture.file for picture in wanted], output_dir / "grid.png")


def stylized(
    pipeline: Any,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    strength: float = 0.8,
    stochastic_inversion: bool = False,
    guidance_scale: float | None = None,
    num_inference_steps: int = 50,
    negative_prompt: str | None = None,
) -> list[Image.Image]:
    """Draw pictures anew, in the style that prompts name.

    Args:
        pipeline: a text-to-image pipeline of diffusers, that knows the style.
        images: all of one size.
        prompts: for each.
        seeds: of each picture's noise.
        strength: see `StylizeConfig`; where it is less than one step, the pictures are given back.
        stochastic_inversion: see `stochastic_inversion`.
        guidance_scale: see `StylizeConfig`.
        num_inference_steps: see `StylizeConfig`.
        negative_prompt: what not to draw, in all pictures.

    Raises:
        SVDiffError: with stochastic_inversion, a pipeline that `svdiff train` does not know.
    """
    from diffusers import AutoPipelineForImage2Image

    if int(strength * num_inference_steps) < 1:
        return list(images)
    how: dict[str, Any] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if negative_prompt is not None:
        how["negative_prompt"] = [negative_prompt] * len(prompts)
    drawing = AutoPipelineForImage2Image.from_pipe(pipeline)
    drawing.set_progress_bar_config(desc="Drawing", leave=False, **progress_options())
    size = images[0].height, images[0].width
    if "height" in inspect.signature(drawing.__call__).parameters:  # SD3 and FLUX would take the model's own
        how |= {"height": size[0], "width": size[1]}
    inverting = inverting_stochastically(pipeline, prompts, size) if stochastic_inversion else nullcontext()
    with inverting, decoding_in_its_own_precision(pipeline.vae):
        found: list[Image.Image] = drawing(
            list(prompts),
            image=list(images),
            strength=strength,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **how,
        ).images
    return found


def check(config: StylizeConfig) -> list[Picture]:
    """Raises SVDiffError if something makes no sense, before a model is loaded; returns the pictures, with prompts."""
    for name in ("num_images_per_picture", "batch_size", "num_inference_steps"):
        if getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 1, not {getattr(config, name)}")
    if not 0 <= config.strength <= 1:
        raise SVDiffError(f"strength must be between 0 and 1, not {config.strength}")
    if config.dtype not in DTYPES:
        raise SVDiffError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    if config.prompt is not None and not config.prompt.strip():
        raise SVDiffError("the prompt is empty: say in what style to draw")
    if config.spectral_shifts_ckpt is not None:
        checkpoint.read_all(config.spectral_shifts_ckpt)  # a bad file need not wait for the model to load
    tokens = list(_learned(config))
    if config.prompt is None and len(tokens) != 1:
        raise SVDiffError(f"prompt is missing: one is made of one learned token, and there are {len(tokens)}")
    found = [picture for path in config.image for picture in _pictures(Path(path).expanduser())]
    if not found:
        raise SVDiffError("image is missing: which pictures shall be drawn in the style?")
    for picture in found:
        load_picture(picture, [(64, 64)])
    return [Picture(picture.path, _prompt(config.prompt, picture, tokens)) for picture in found]


def _pictures(path: Path) -> list[Picture]:
    """A file, or all of a folder, with captions where there are any, else `_CAPTION`."""
    return find_pictures(path, _CAPTION) if path.is_dir() else [find_picture(path, _CAPTION)]


def _prompt(template: str | None, picture: Picture, tokens: Sequence[str]) -> str:
    captioned = picture.caption != _CAPTION
    if template is None:
        return f"{f'{picture.caption}, ' if captioned else ''}in the style of {tokens[0]}"
    if _CAPTION in template and not captioned:
        raise SVDiffError(f"{picture.path} has no caption for the prompt's {_CAPTION}: write one into a .txt beside it")
    return template.replace(_CAPTION, picture.caption)


def _learned(config: StylizeConfig) -> dict[str, dict[str, torch.Tensor]]:
    """The token beside the shifts, and the one that is asked for."""
    found = {}
    if config.spectral_shifts_ckpt is not None:
        shifts = Path(config.spectral_shifts_ckpt).expanduser()
        found = read_tokens(shifts if shifts.is_dir() else shifts.parent)
    if config.learned_embeds is not None:
        own = read_tokens(config.learned_embeds)
        if not own:
            raise SVDiffError(f"learned_embeds: there is no learned_embeds.safetensors in {config.learned_embeds}")
        found |= own
    return found


def _check_room(pipeline: Any, token: str, encoders: Sequence[str], prompts: Sequence[str]) -> None:
    """Refuse prompts that are so long that the style would be cut off."""
    for tokenizer in (tokenizer_of(pipeline, encoder) for encoder in encoders):
        own = tokenizer.convert_tokens_to_ids(token)
        for prompt in prompts:
            if token in prompt and own not in tokenizer(prompt, truncation=True).input_ids:
                raise SVDiffError(f"the prompt {prompt!r} is too long: {token} would be cut off; give a shorter one")


def _drawn(
    config: StylizeConfig, pipeline: Any, originals: Sequence[Image.Image], wanted: Sequence[WantedPicture]
) -> Iterator[Image.Image]:
    for start in range(0, len(wanted), config.batch_size):
        exit_if_told()
        numbers = range(start, min(start + config.batch_size, len(wanted)))
        yield from stylized(
            pipeline,
            [originals[i // config.num_images_per_picture] for i in numbers],
            [wanted[i].prompt for i in numbers],
            [wanted[i].seed for i in numbers],
            strength=config.strength,
            stochastic_inversion=config.stochastic_inversion,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
            negative_prompt=config.negative_prompt,
        )
