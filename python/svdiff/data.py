"""Training pictures: found in a folder, captioned, checked, and cut to the training resolution."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from svdiff_kernels import SVDiffError

CAPTIONS_FILE = "metadata.jsonl"
"""One JSON object a line, ``{"file_name": ..., "text": ...}``: the captions of a folder, as `datasets` reads them."""


@dataclass(frozen=True)
class Picture:
    """A picture file and what it shows."""

    path: Path
    caption: str


def find_pictures(directory: str | Path, prompt: str | None = None) -> list[Picture]:
    """Every picture of a folder, by name, with its caption.

    A caption comes from ``metadata.jsonl``, else from a ``.txt`` file of the picture's name, else it is `prompt`.

    Raises:
        SVDiffError: there is no such folder, no picture in it, or a picture with no caption.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise SVDiffError(f"there is no picture folder {directory}")
    suffixes = Image.registered_extensions()
    paths = sorted(p for p in directory.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    if not paths:
        raise SVDiffError(f"no pictures in {directory}: put .png or .jpg files there")
    captions = _read_captions(directory)
    pictures = []
    for path in paths:
        beside = path.with_suffix(".txt")
        caption = captions.get(path.name) or (_read_text(beside) if beside.is_file() else None) or prompt
        if not caption or not caption.strip():
            raise SVDiffError(f"{path} has no caption: give a prompt, or write a caption into {beside.name}")
        pictures.append(Picture(path, caption.strip()))
    return pictures


def load_picture(path: Path, resolution: int) -> Tensor:
    """The picture as ``[3, h, w]`` uint8, upright, its shorter side `resolution` pixels long.

    Raises:
        SVDiffError: the file is no picture, or a damaged one.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SVDiffError(f"cannot read the picture {path}: {type(error).__name__}") from error
    shrink = resolution / min(image.size)
    size = (max(resolution, round(image.width * shrink)), max(resolution, round(image.height * shrink)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop(image: Tensor, resolution: int, *, center: bool, flip: bool, rng: torch.Generator) -> Tensor:
    """A square of the picture, ``[3, resolution, resolution]`` in -1..1: its centre, or a place drawn from `rng`."""
    corner = []
    for side in image.shape[-2:]:
        free = side - resolution
        corner.append(free // 2 if center or not free else int(torch.randint(free + 1, (), generator=rng)))
    top, left = corner
    square = image[:, top : top + resolution, left : left + resolution]
    if flip:
        square = square.flip(-1)
    return square.to(torch.float32) / 127.5 - 1


def _read_captions(directory: Path) -> dict[str, str]:
    file = directory / CAPTIONS_FILE
    captions = {}
    for number, line in enumerate(_read_text(file).splitlines() if file.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[entry["file_name"]] = str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"file_name": ..., "text": ...}'
            raise SVDiffError(f"{file}, line {number}: expected {wanted}") from error
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SVDiffError(f"cannot read {path}: {error}") from error
