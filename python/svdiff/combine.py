"""svdiff combine: delta files made of delta files: scaled, added, interpolated, mixed layer by layer (SVDiff, 3.4)."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from svdiff_kernels import FactorCache, SVDiffError

from . import checkpoint
from .adapter import Clamped
from .attach import load
from .checkpoint import DeltaFile
from .outputs import run_directory, write_run_file
from .pipelines import DTYPES, default_resolution, device_of_choice, load_pipeline
from .sampling import grid, sample, save_picture
from .targets import by_layer

_GRID = "grid.png"
_BATCH = 4

Operation = Literal["add", "scale", "subtract", "average", "interpolate", "style_mix"]
Shares = Callable[[str, Collection[str]], Mapping[str, Sequence[float]]]
"""Of a part of the pipeline and its module paths: how much of each input goes into each module."""


@dataclass
class CombineConfig:
    """Settings of `combine`; each is a flag of ``svdiff combine``."""

    spectral_shifts_ckpt: list[str] = field(metadata={"help": "folders or files with trained shifts, one or more"})
    operation: Operation = field(
        default="add",
        metadata={
            "help": "add or scale: the weighted sum; subtract: all others from the first; average: the weighted mean; "
            "interpolate: a path from the first to the second; style_mix: each layer from one of them"
        },
    )
    weights: list[float] | None = field(default=None, metadata={"help": "one for each; default: 1"})
    steps: int = field(default=5, metadata={"help": "points of the path of interpolate, both ends included"})
    layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "of style_mix, for each but the first: which layers are its own, such as up,cross_attn,level0,"
            "text_encoder, or a regular expression of paths"
        },
    )
    dtype: Literal["fp32", "fp16", "bf16"] = field(
        default="fp32",
        metadata={"help": "of the result; fp16 halves the file, and the memory of who holds many of them"},
    )
    output_dir: str = field(default="outputs/combine", metadata={"help": "a new folder for the result"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "the base: count the singular values that the result would clamp at zero"}
    )
    prompt: list[str] | None = field(
        default=None,
        metadata={"help": "draw these by the base: grid.png has a row for each, a column for each input and result"},
    )
    num_inference_steps: int = field(default=50, metadata={"help": "of the pictures"})
    guidance_scale: float | None = field(default=None, metadata={"help": "of the pictures; default: the pipeline's"})
    seed: int = field(default=0, metadata={"help": "of the noise of the first row; the next row has the next seed"})
    svd_cache_dir: str | None = field(
        default=None, metadata={"help": "where decompositions are kept; default: $SVDIFF_CACHE or the user's cache"}
    )


@dataclass(frozen=True)
class CombineResult:
    """What `combine` made.

    Attributes:
        folders: with delta files; several of a path.
        clamped: of each of them, if the base was given.
        grid: the pictures, if there were prompts.
    """

    folders: list[Path]
    clamped: list[Clamped]
    grid: Path | None = None

    def __str__(self) -> str:
        told = [
            f"{folder}: {one.count:,} of {one.total:,} singular values are clamped at zero, "
            f"{one.lost:.2%} of what the shifts would move"
            for folder, one in zip(self.folders, self.clamped, strict=False)
        ]
        return "\n".join([*(told or map(str, self.folders)), *([f"pictures: {self.grid}"] if self.grid else [])])


def combine(config: CombineConfig) -> CombineResult:
    """Make delta files of delta files, with the recipe in their metadata.

    A module that an input does not have is one that it does not shift.

    Raises:
        SVDiffError: settings that make no sense, a file that cannot be read, or files for different bases. No folder is
            made then.
    """
    recipes = _recipes(config)
    inputs = [checkpoint.read_all(path) for path in config.spectral_shifts_ckpt]
    roles = [role for role in checkpoint.FILE_NAMES if any(role in files for files in inputs)]
    layouts = {role: checkpoint.common_layout([files[role] for files in inputs if role in files]) for role in roles}
    origins = [_origin(path, files.values()) for path, files in zip(config.spectral_shifts_ckpt, inputs, strict=True)]
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        for name, shares_of in recipes.items():
            content = {}
            for role, layout in layouts.items():
                shares = shares_of(role, layout.shapes)
                deltas = blend([files[role].deltas if role in files else {} for files in inputs], layout.shapes, shares)
                recipe = {"operation": config.operation, "inputs": origins, "weights": _summary(shares)}
                file = staging / name / checkpoint.FILE_NAMES[role]
                content[file] = checkpoint.encode(deltas, layout, roles, {"recipe": recipe}, DTYPES[config.dtype])
            checkpoint.write(content)
        clamped = _seen_with_base(config, staging, recipes)
        told = {"clamped": [asdict(one) for one in clamped]} if clamped else {}
        write_run_file(staging, "combine", asdict(config), folders=list(recipes), **told)
    output_dir = Path(config.output_dir)
    return CombineResult(
        [output_dir / name for name in recipes], clamped, output_dir / _GRID if config.prompt else None
    )


def blend(
    inputs: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, torch.Size], shares: Mapping[str, Sequence[float]]
) -> dict[str, Tensor]:
    """For each module ``sum of share * delta`` over the inputs, summed in fp64.

    Args:
        inputs: deltas by module path; one that is not there is zero.
        shapes: of the modules of the result.
        shares: of each module, one number per input.
    """
    blended = {}
    for path, shape in shapes.items():
        total = torch.zeros(shape, dtype=torch.float64)
        for deltas, share in zip(inputs, shares[path], strict=True):
            if path in deltas and share:
                total += share * deltas[path].double()
        blended[path] = total.float()
    return blended


def _recipes(config: CombineConfig) -> dict[str, Shares]:
    """By folder, how much of each input goes into a module."""
    operation, count = config.operation, len(config.spectral_shifts_ckpt)
    weights = config.weights if config.weights is not None else [1.0] * count
    _check(config, weights)
    if operation == "interpolate":
        path = [i / (config.steps - 1) for i in range(config.steps)]
        return {f"step_{i:02d}": _everywhere([1 - t, t]) for i, t in enumerate(path)}
    if operation == "style_mix":
        return {"": _by_layer(weights, [expressions.split(",") for expressions in config.layers or []])}
    if operation == "subtract":
        weights = [weights[0], *(-weight for weight in weights[1:])]
    if operation == "average":
        weights = [weight / sum(weights) for weight in weights]
    return {"": _everywhere(weights)}


def _check(config: CombineConfig, weights: Sequence[float]) -> None:
    operation, count = config.operation, len(config.spectral_shifts_ckpt)
    if operation not in get_args(Operation):
        raise SVDiffError(f"operation {operation!r} is not one of {', '.join(get_args(Operation))}")
    if config.dtype not in DTYPES:
        raise SVDiffError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    least, most = {"add": (1, count), "scale": (1, 1), "interpolate": (2, 2)}.get(operation, (2, count))
    if not least <= count <= most:
        wanted = f"{least}" if least == most else f"{least} or more"
        raise SVDiffError(f"operation {operation} takes {wanted} of spectral_shifts_ckpt, not {count}")
    if len(weights) != count:
        raise SVDiffError(f"weights: {len(weights)} numbers for {count} of spectral_shifts_ckpt")
    if not all(map(math.isfinite, weights)):
        raise SVDiffError(f"weights: {weights} are not all finite")
    if config.prompt and config.pretrained_model_name_or_path is None:
        raise SVDiffError("prompt: pictures need pretrained_model_name_or_path, which draws them")
    if config.prompt is not None and not (config.prompt and all(prompt.strip() for prompt in config.prompt)):
        raise SVDiffError("a prompt is empty: say what to draw")
    if config.num_inference_steps < 1:
        raise SVDiffError(f"num_inference_steps must be at least 1, not {config.num_inference_steps}")
    if operation == "average" and not sum(weights):
        raise SVDiffError("weights of an average must not add up to 0")
    if operation == "interpolate" and config.weights is not None:
        raise SVDiffError("interpolate goes from the first to the second: it takes steps, no weights")
    if operation == "interpolate" and config.steps < 2:
        raise SVDiffError(f"steps must be at least 2, not {config.steps}")
    expected = count - 1 if operation == "style_mix" else 0
    if len(config.layers or []) != expected:
        raise SVDiffError(f"layers: {len(config.layers or [])} expressions; {operation} of {count} takes {expected}")


def _everywhere(shares: Sequence[float]) -> Shares:
    return lambda role, paths: dict.fromkeys(paths, shares)


def _by_layer(weights: Sequence[float], groups: Sequence[Sequence[str]]) -> Shares:
    """All of the last input to whose groups a layer belongs; of the first where it belongs to none."""

    entries = [(expression, i) for i, expressions in enumerate(groups, start=1) for expression in expressions]

    def shares(role: str, paths: Collection[str]) -> dict[str, list[float]]:
        owners = by_layer(entries, paths, default=0, part=role, parts=checkpoint.FILE_NAMES)
        return {path: [weight if i == own else 0.0 for i, weight in enumerate(weights)] for path, own in owners.items()}

    return shares


def _summary(shares: Mapping[str, Sequence[float]]) -> list[dict[str, object]]:
    """For people to read: which weights, and in how many modules."""
    return [{"weights": list(one), "modules": count} for one, count in Counter(map(tuple, shares.values())).items()]


def _origin(path: str, files: Iterable[DeltaFile]) -> dict[str, str]:
    """Which file went in: its name, since folders are private, and what it held."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.path.read_bytes())
    return {"name": Path(path).absolute().name, "sha256": digest.hexdigest()}


def _seen_with_base(config: CombineConfig, staging: Path, names: Collection[str]) -> list[Clamped]:
    """What each result clamps, and pictures of all, if the base is known."""
    if config.pretrained_model_name_or_path is None:
        return []
    pipeline = load_pipeline(config.pretrained_model_name_or_path)
    columns: dict[str, str | Path] = {}
    if config.prompt and config.operation != "interpolate":  # a path has both ends
        columns |= {f"input {i}": path for i, path in enumerate(config.spectral_shifts_ckpt)}
    results = {f"result {name}": staging / name for name in names}
    columns |= results
    adapter = load(pipeline, columns, cache=FactorCache(config.svd_cache_dir), lazy=not config.prompt)
    if config.prompt:
        side = default_resolution(pipeline)
        pipeline.to(device_of_choice())
        rows = [(prompt, config.seed + i) for i, prompt in enumerate(config.prompt)]
        wanted = [(prompt, seed, {name: 1.0}) for prompt, seed in rows for name in columns]
        prompts, seeds, mixes = zip(*wanted, strict=True)
        images = sample(
            pipeline,
            prompts,
            seeds,
            batch_size=_BATCH,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            resolution=(side, side),
            adapter=adapter,
            mixes=mixes,
        )
        save_picture(grid(list(images), len(columns)), staging / _GRID)
    return [adapter.clamped(name) for name in results]
