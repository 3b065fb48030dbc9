"""svdiff edit: one picture, changed by words (CoSINE: SVDiff, section 3.4).

The model learns the picture with its prompt, without prior preservation, and then draws it with another prompt: from
noise that inversion finds in the picture, from the picture itself half noised, or from any noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from svdiff_kernels import FactorCache, SVDiffError

from .attach import load
from .inversion import check_invertible, invert
from .latents import decoding_in_its_own_precision, encode, slerp
from .outputs import run_directory, write_run_file
from .pipelines import default_resolution, device_of_choice, listed_classes, load_pipeline, set_scheduler
from .progress import progress_options
from .sampling import WantedPicture, grid, save_picture, save_pictures, wanted_pictures
from .termination import exit_if_told
from .train import TrainConfig, train
from .training.data import Picture, centre_of, load_picture

StartFrom = Literal["inversion", "image", "noise"]

_MOST_ETA = 0.9999
"""At 1, from noise that holds nothing of a picture, DDIM of diffusers takes the root of what rounding leaves of 0."""

SHIFTS = "shifts"
"""Folder in output_dir for what has been learnt of the picture."""


@dataclass
class EditConfig:
    """Settings of `edit`; each is a flag of ``svdiff edit``."""

    pretrained_model_name_or_path: str = field(metadata={"help": "folder, hub id, or miniature"})
    image: str = field(metadata={"help": "the picture to change"})
    prompt: str = field(metadata={"help": "what it shows"})
    target_prompt: list[str] = field(metadata={"help": "what it shall show; several prompts may be given"})
    output_dir: str = field(default="outputs/edit", metadata={"help": "a new folder for shifts and pictures"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})
    spectral_shifts_ckpt: str | None = field(
        default=None, metadata={"help": "what an earlier edit has learnt of the picture, instead of learning it"}
    )
    spectral_shifts_scale: float = field(default=1.0, metadata={"help": "weight of the shifts"})

    max_train_steps: int = field(default=500, metadata={"help": "of learning the picture"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of the shifts of matrices and kernels"})
    learning_rate_1d: float = field(default=1e-6, metadata={"help": "of the shifts of norms"})
    train_batch_size: int = field(default=1, metadata={"help": "noises of the picture per step"})
    train_text_encoder: bool = field(default=False, metadata={"help": "shift the text encoders too"})

    start_from: StartFrom = field(
        default="inversion",
        metadata={"help": "inversion keeps the structure; image: its noised self, by strength; noise: just any"},
    )
    eta: float = field(default=0.0, metadata={"help": "of DDIM: 0 adds no noise on the way, 1 as much as DDPM"})
    slerp_alpha: float = field(
        default=0.0, metadata={"help": "how far to turn what inversion finds towards fresh noise, 0 to 1"}
    )
    strength: float = field(default=0.6, metadata={"help": "of start_from image: 0 leaves it as it is, 1 is all noise"})
    guidance_scale: float = field(default=3.0, metadata={"help": "classifier-free guidance of the target prompt"})
    num_inference_steps: int = field(default=50, metadata={"help": "of DDIM, back and forth"})
    num_images_per_prompt: int = field(default=1, metadata={"help": "pictures of each target prompt"})
    batch_size: int = field(default=4, metadata={"help": "pictures drawn at a time"})
    resolution: int | None = field(default=None, metadata={"help": "side in pixels; default: the model's"})
    seed: int = field(default=0, metadata={"help": "of learning, and of the first picture; the next has the next seed"})
    svd_cache_dir: str | None = field(
        default=None, metadata={"help": "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache"}
    )


@dataclass(frozen=True)
class EditResult:
    """What `edit` made.

    Attributes:
        output_dir: the folder, with the shifts in ``shifts/``.
        pictures: files, prompt by prompt.
        grid: one file, a row per prompt, each after the picture itself.
    """

    output_dir: Path
    pictures: list[Path]
    grid: Path

    def __str__(self) -> str:
        return f"{len(self.pictures)} pictures in {self.output_dir}, beside the original in {self.grid.name}"


def edit(config: EditConfig) -> EditResult:
    """Learn one picture, and draw it with other prompts, into a new folder.

    Raises:
        SVDiffError: anything wrong with the settings, the picture, the model or the shifts; no folder is made then.
    """
    check(config)
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        shifts = config.spectral_shifts_ckpt
        if shifts is None:
            shifts = str(_learn(config, staging / SHIFTS))
        pipeline = load_pipeline(config.pretrained_model_name_or_path)
        side = config.resolution or default_resolution(pipeline)
        original = centre_of(load_picture(_picture(config), [(side, side)]).image, side)
        adapter = load(pipeline, shifts, cache=FactorCache(config.svd_cache_dir))
        adapter.set_adapters("default", config.spectral_shifts_scale)
        pipeline.to(device_of_choice())
        wanted = wanted_pictures(config.target_prompt, config.num_images_per_prompt, config.seed)
        drawn = save_pictures(_drawn(config, pipeline, original, wanted), wanted, staging)
        save_picture(original, staging / "original.png")
        count = config.num_images_per_prompt
        rows = [[original, *drawn[i : i + count]] for i in range(0, len(drawn), count)]
        save_picture(grid([image for row in rows for image in row], count + 1), staging / "grid.png")
        write_run_file(staging, "edit", asdict(config), pictures=[asdict(picture) for picture in wanted])
    output_dir = Path(config.output_dir)
    return EditResult(output_dir, [output_dir / picture.file for picture in wanted], output_dir / "grid.png")


def edited(
    pipeline: Any,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    start_from: StartFrom = "inversion",
    noise: Tensor | None = None,
    eta: float = 0.0,
    slerp_alpha: float = 0.0,
    strength: float = 0.6,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
) -> list[Image.Image]:
    """Draw pictures anew with other prompts, by a pipeline that knows them.

    Args:
        pipeline: a text-to-image pipeline of diffusers, with the shifts that were learnt of the pictures.
        images: all of one size.
        prompts: what each shall show.
        seeds: of each picture's noise, where there is any.
        start_from: see `EditConfig`.
        noise: ``[B, C, h, w]``, what `find_noise` has found in the pictures, if it is known; of start_from inversion.
        eta: see `EditConfig`.
        slerp_alpha: see `EditConfig`.
        strength: see `EditConfig`.
        guidance_scale: see `EditConfig`.
        num_inference_steps: see `EditConfig`.

    Raises:
        SVDiffError: the pipeline cannot be inverted.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if start_from == "inversion":
        if noise is None:
            noise = find_noise(pipeline, images, prompts, num_inference_steps=num_inference_steps)
        if slerp_alpha:
            fresh = torch.stack([torch.randn(noise.shape[1:], generator=rng) for rng in generators])
            noise = slerp(slerp_alpha, noise, fresh.to(noise))
    kept = pipeline.scheduler
    how: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "generator": generators,
    }
    try:
        if start_from == "image":
            from diffusers import AutoPipelineForImage2Image

            drawing = AutoPipelineForImage2Image.from_pipe(pipeline)
            how |= {"image": list(images), "strength": strength}
        else:
            if not type(kept).__name__.startswith("FlowMatch"):
                set_scheduler(pipeline, "ddim")
                how["eta"] = min(eta, _MOST_ETA)
            drawing = pipeline
            how |= {"height": images[0].height, "width": images[0].width, "latents": noise}
        drawing.set_progress_bar_config(desc="Drawing", leave=False, **progress_options())
        with decoding_in_its_own_precision(pipeline.vae):
            return list(drawing(list(prompts), **how).images)
    finally:
        pipeline.scheduler = kept


def find_noise(
    pipeline: Any, images: Sequence[Image.Image], prompts: Sequence[str], *, num_inference_steps: int = 50
) -> Tensor:
    """What inversion finds in pictures: noise ``[B, C, h, w]``, from which their prompts draw them again, or nearly so.

    Args:
        pipeline: see `edited`.
        images: see `edited`.
        prompts: see `edited`.
        num_inference_steps: see `EditConfig`.

    Raises:
        SVDiffError: the pipeline cannot be inverted.
    """
    latents, _ = encode(pipeline.vae, pipeline.image_processor.preprocess(list(images)))
    return invert(pipeline, latents, prompts, num_inference_steps=num_inference_steps)


def _drawn(
    config: EditConfig, pipeline: Any, original: Image.Image, wanted: Sequence[WantedPicture]
) -> Iterator[Image.Image]:
    """The pictures in batches; what inversion finds depends on the prompt, not on the seed, and is looked for once."""
    found: dict[str, Tensor] = {}
    for start in range(0, len(wanted), config.batch_size):
        exit_if_told()
        batch = wanted[start : start + config.batch_size]
        prompts = [picture.prompt for picture in batch]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if config.start_from == "inversion" and new:
            noise = find_noise(pipeline, [original] * len(new), new, num_inference_steps=config.num_inference_steps)
            found |= zip(new, noise, strict=True)
        yield from edited(
            pipeline,
            [original] * len(batch),
            prompts,
            [picture.seed for picture in batch],
            start_from=config.start_from,
            noise=torch.stack([found[prompt] for prompt in prompts]) if found else None,
            eta=config.eta,
            slerp_alpha=config.slerp_alpha,
            strength=config.strength,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
        )


def _learn(config: EditConfig, output_dir: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        original = Path(config.image).expanduser()
        (Path(folder) / f"image{original.suffix}").symlink_to(original.absolute())
        train(
            TrainConfig(
                pretrained_model_name_or_path=config.pretrained_model_name_or_path,
                instance_data_dir=folder,
                instance_prompt=config.prompt,
                output_dir=str(output_dir),
                resolution=config.resolution,
                max_train_steps=config.max_train_steps,
                checkpointing_steps=config.max_train_steps + 1,
                learning_rate=config.learning_rate,
                learning_rate_1d=config.learning_rate_1d,
                train_batch_size=config.train_batch_size,
                train_text_encoder=config.train_text_encoder,
                svd_cache_dir=config.svd_cache_dir,
                center_crop=True,
                seed=config.seed,
                report_to="none",
            )
        )
    return output_dir


def check(config: EditConfig) -> None:
    """Raises SVDiffError if something makes no sense, before a model is loaded."""
    if not config.prompt.strip() or not config.target_prompt or not all(p.strip() for p in config.target_prompt):
        raise SVDiffError("a prompt is empty: say what the picture shows, and what it shall show")
    if config.start_from not in get_args(StartFrom):
        raise SVDiffError(f"start_from {config.start_from!r} is not one of {', '.join(get_args(StartFrom))}")
    for name in ("num_images_per_prompt", "batch_size", "num_inference_steps", "max_train_steps", "train_batch_size"):
        if getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 1, not {getattr(config, name)}")
    for name in ("eta", "slerp_alpha", "strength"):
        if not 0 <= getattr(config, name) <= 1:
            raise SVDiffError(f"{name} must be between 0 and 1, not {getattr(config, name)}")
    defaults = EditConfig("", "", "", [])
    for name, start in (("slerp_alpha", "inversion"), ("strength", "image")):
        if config.start_from != start and getattr(config, name) != getattr(defaults, name):
            raise SVDiffError(f"{name} belongs to start_from {start}, not {config.start_from}")
    if config.start_from == "image" and config.eta:
        raise SVDiffError("eta belongs to start_from inversion or noise, not image")
    load_picture(_picture(config), [(64, 64)])  # a damaged one need not wait for the model to load
    if config.start_from == "inversion":
        check_invertible(listed_classes(config.pretrained_model_name_or_path))  # before learning


def _picture(config: EditConfig) -> Picture:
    return Picture(Path(config.image).expanduser(), config.prompt)
