"""Folders of pictures to be judged, with the prompts they were drawn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from svdiff_kernels import SVDiffError

from ..outputs import RUN_FILE
from ..training.data import find_pictures

_UNTOLD = "\0"  # a prompt that nobody gives


@dataclass(frozen=True)
class Judged:
    """A picture to be judged.

    Attributes:
        path: its file.
        prompt: what it was to show, if that is told.
        seed: of its noise, if that is told.
    """

    path: Path
    prompt: str | None = None
    seed: int | None = None


def judged_pictures(directory: str | Path) -> list[Judged]:
    """The pictures of a folder: those that its run file lists, with prompts and seeds, else every picture by name.

    Without a run file, prompts are captions as training folders have them (``metadata.jsonl``, or a ``.txt`` file).

    Raises:
        SVDiffError: there is no such folder, no picture in it, or one is missing.
    """
    directory = Path(directory).expanduser()
    if (listed := _listed(directory)) is not None:
        for picture in listed:
            if not picture.path.is_file():
                raise SVDiffError(f"{directory / RUN_FILE} lists {picture.path.name}, which is not there")
        return listed
    found = find_pictures(directory, prompt=_UNTOLD)
    return [Judged(picture.path, None if picture.caption == _UNTOLD else picture.caption) for picture in found]


def open_picture(picture: Judged | Path | Image.Image) -> Image.Image:
    """A picture upright and in RGB.

    Raises:
        SVDiffError: the file is no picture, or a damaged one.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    path = picture.path if isinstance(picture, Judged) else picture
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SVDiffError(f"cannot read the picture {path}: {type(error).__name__}") from error


def check_pairs(pictures: Sequence[Judged], base: Sequence[Judged], name: str) -> None:
    """Raises SVDiffError if the pictures of two models are not of the same prompts and seeds, in this order."""
    if len(pictures) != len(base):
        raise SVDiffError(
            f"class pictures of {name}: {len(pictures)}, but {len(base)} of the base model; draw both from the same "
            "prompts and seeds"
        )
    for ours, theirs in zip(pictures, base, strict=True):
        for what in ("prompt", "seed"):
            one, other = getattr(ours, what), getattr(theirs, what)
            if one != other and None not in (one, other):
                raise SVDiffError(
                    f"class pictures of {name}: {ours.path.name} has the {what} {one!r}, but the base model's "
                    f"{theirs.path.name} {other!r}"
                )


def _listed(directory: Path) -> list[Judged] | None:
    """The pictures that ``run.json`` tells of, if there is one that does."""
    try:
        run = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
        return [Judged(directory / p["file"], p["prompt"], p.get("seed")) for p in run["pictures"]] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None
