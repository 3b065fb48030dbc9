"""Training pictures: found in a folder or a dataset, captioned, checked, and cut to size."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from svdiff_kernels import SVDiffError

CAPTIONS_FILE = "metadata.jsonl"
"""One JSON object a line, ``{"file_name": ..., "text": ...}``: the captions of a folder, as `datasets` reads them."""


Size = tuple[int, int]
"""Height and width, in pixels."""


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        path: its file; of one from a dataset just what to call it.
        caption: what it shows.
        content: its bytes, where there is no file.
        phrase: what a mixture's caption calls what it shows, such as "a sleeping sks dog"; None for the concept's.
    """

    path: Path
    caption: str
    content: bytes | None = None
    phrase: str | None = None


def find_pictures(directory: str | Path, prompt: str | None = None) -> list[Picture]:
    """Every picture of a folder, by name, with its caption.

    A caption comes from ``metadata.jsonl``, where there may be a phrase too, else from a ``.txt`` file of the picture's
    name, else it is `prompt`.

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
    metadata = _read_metadata(directory)
    return [_captioned(path, metadata, prompt) for path in paths]


def find_picture(path: str | Path, prompt: str | None = None) -> Picture:
    """One picture, with its caption, as `find_pictures` finds it.

    Raises:
        SVDiffError: there is no such file, or it has no caption.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise SVDiffError(f"there is no picture {path}")
    return _captioned(path, _read_metadata(path.parent), prompt)


def _captioned(path: Path, metadata: dict[str, dict[str, str]], prompt: str | None) -> Picture:
    beside = path.with_suffix(".txt")
    told = metadata.get(path.name, {})
    caption = told.get("text") or (_read_text(beside) if beside.is_file() else None) or prompt
    if not caption or not caption.strip():
        raise SVDiffError(f"{path} has no caption: give a prompt, or write a caption into {beside.name}")
    return Picture(path, caption.strip(), phrase=told.get("phrase"))


def dataset_pictures(
    name: str, config_name: str | None = None, *, image_column: str, caption_column: str | None, prompt: str | None
) -> list[Picture]:
    """Every picture of a dataset's training split, with its caption.

    Args:
        name: of the dataset on the hub, or a folder that `datasets` can read.
        config_name: which of its configurations.
        image_column: where the pictures are.
        caption_column: where the captions are; None for `prompt`.
        prompt: caption of pictures without one.

    Raises:
        SVDiffError: the dataset cannot be loaded, lacks a column, or has a picture with no caption.
    """
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, config_name, split="train")
        for column in (image_column, *([caption_column] if caption_column else [])):
            if column not in rows.column_names:
                raise SVDiffError(f"dataset {name} has no column {column!r}, only {', '.join(rows.column_names)}")
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
        found = [(row[image_column], (row[caption_column] if caption_column else None) or prompt) for row in rows]
    except SVDiffError:
        raise
    except Exception as error:  # of a library that asks the network, the disk and other people's scripts
        raise SVDiffError(f"cannot load the dataset {name}: {' '.join(str(error).split())}") from error
    pictures = []
    for i, (image, caption) in enumerate(found):
        where = f"{name}[{i}]"
        if image is None:
            raise SVDiffError(f"{where} has no picture in column {image_column!r}")
        if caption is not None and not isinstance(caption, str):
            raise SVDiffError(f"{where} has in column {caption_column!r} no text, but {type(caption).__name__}")
        if not caption or not caption.strip():
            raise SVDiffError(f"{where} has no caption: give caption_column or instance_prompt")
        content = image["bytes"]
        pictures.append(Picture(Path(image["path"] if content is None else where), caption.strip(), content))
    if not pictures:
        raise SVDiffError(f"dataset {name} has no pictures")
    return pictures


@dataclass(frozen=True)
class Loaded:
    """A picture in memory.

    Attributes:
        image: upright, in RGB, scaled to cover `bucket`.
        original: height and width of the file's.
        bucket: which of the training sizes is most like it.
    """

    image: Image.Image
    original: Size
    bucket: Size


def load_picture(picture: Picture, buckets: Sequence[Size]) -> Loaded:
    """Read a picture for training at one of some sizes.

    Raises:
        SVDiffError: the file is no picture, or a damaged one.
    """
    try:
        with Image.open(picture.path if picture.content is None else io.BytesIO(picture.content)) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SVDiffError(f"cannot read the picture {picture.path}: {type(error).__name__}") from error
    original = (image.height, image.width)
    bucket = bucket_of(original, buckets)
    return Loaded(_covering(image, bucket), original, bucket)


@dataclass(frozen=True)
class Cut:
    """A piece of a picture.

    Attributes:
        pixels: ``[3, h, w]`` in -1..1.
        original: height and width of the whole picture, before it was scaled.
        corner: top and left of the piece, in the scaled picture.
    """

    pixels: Tensor
    original: Size
    corner: Size


def centre_of(image: Image.Image, side: int) -> Image.Image:
    """The square in the middle of a picture."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def leaves_no_choice(image: Image.Image, size: Size) -> bool:
    """Whether the picture, scaled to cover `size`, has just that size."""
    return _covering_size(image, size) == size


def cut(picture: Loaded, size: Size, *, center: bool, flip: bool, rng: torch.Generator) -> Cut:
    """The picture scaled to cover `size`, and of that a piece: its centre, or a place drawn from `rng`."""
    image = _covering(picture.image, size)
    corner = []
    for free in (image.height - size[0], image.width - size[1]):
        corner.append(free // 2 if center or not free else int(torch.randint(free + 1, (), generator=rng)))
    return _piece(_pixels(image), picture, (corner[0], corner[1]), size, flip)


class Half(NamedTuple):
    """Of a canvas.

    Attributes:
        axis: -1: left or right; -2: upper or lower.
        side: 0: left or upper; 1: right or lower.
    """

    axis: int
    side: int

    def size(self, canvas: Size) -> Size:
        """Of the half, in pixels."""
        height, width = canvas
        return (height, width // 2) if self.axis == -1 else (height // 2, width)

    def of(self, canvas: Tensor) -> Tensor:
        """This half of ``[..., h, w]``."""
        return canvas.chunk(2, dim=self.axis)[self.side]


def half(picture: Loaded, canvas: Size, place: Half) -> Cut:
    """A canvas with a piece of the picture in one half, and the same mirrored in the other.

    Of the picture scaled to cover the half it is the piece with most to be seen in it: subjects are not always in the
    middle. What there is to be seen is told by how much neighbouring pixels differ. Where the halves meet, the canvas
    goes on as a picture does: a VAE that saw but the half would take its edge for a picture's, and leave a seam.
    """
    size = place.size(canvas)
    pixels = _pixels(_covering(picture.image, size))
    detail = pixels.diff(dim=1).abs().sum(0)[:, :-1] + pixels.diff(dim=2).abs().sum(0)[:-1]
    corner = _richest(detail.sum(1), size[0]), _richest(detail.sum(0), size[1])
    piece = _piece(pixels, picture, corner, size, flip=False)
    sides = [piece.pixels.flip(place.axis)] * 2
    sides[place.side] = piece.pixels
    return replace(piece, pixels=torch.cat(sides, dim=place.axis))


def buckets_of(text: str, resolution: int, multiple: int) -> list[Size]:
    """The sizes that a setting names: ``height,width;height,width``, or ``auto``.

    Args:
        text: see above. auto: about the area of a square of `resolution`, from 1:2 to 2:1, in steps of a sixteenth of
            its side: pictures of like shapes share a bucket, and so batches.
        resolution: see above.
        multiple: what every side must be a multiple of.

    Raises:
        SVDiffError: another text, or a side that is no such multiple.
    """
    if text == "auto":
        step = max(1, resolution // 16 // multiple) * multiple
        shorts = [side for side in range(step, resolution + 1, step) if 2 * side**2 >= resolution**2]
        wide = [(side, round(resolution**2 / side / step) * step) for side in shorts]
        return sorted({*wide, *((width, height) for height, width in wide)})
    try:
        found = [(int(height), int(width)) for height, width in (part.split(",") for part in text.split(";") if part)]
    except ValueError:
        found = []
    if not found:
        raise SVDiffError(f"aspect_ratio_buckets {text!r} is neither auto nor height,width;height,width;...")
    for side in (side for size in found for side in size):
        if side < 1 or side % multiple:
            raise SVDiffError(f"aspect_ratio_buckets: {side} is not a multiple of {multiple}")
    return found


def bucket_of(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is most like `size`."""
    wanted = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(np.log(bucket[0] / bucket[1] / wanted)))


def _richest(detail: Tensor, length: int) -> int:
    """Where a window of so many entries holds most, the middle one of several."""
    sums = torch.nn.functional.pad(detail, (1, 1)).cumsum(0)
    found = sums[length:] - sums[: len(sums) - length]
    best = (found >= found.max() * (1 - 1e-6)).nonzero().flatten()
    return int(best[len(best) // 2])


def _read_metadata(directory: Path) -> dict[str, dict[str, str]]:
    file = directory / CAPTIONS_FILE
    found = {}
    for number, line in enumerate(_read_text(file).splitlines() if file.is_file() else [], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            phrase = {"phrase": str(entry["phrase"])} if "phrase" in entry else {}
            found[entry["file_name"]] = {"text": str(entry["text"])} | phrase
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"file_name": ..., "text": ...}'
            raise SVDiffError(f"{file}, line {number}: expected {wanted}") from error
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SVDiffError(f"cannot read {path}: {error}") from error


def _covering(image: Image.Image, size: Size) -> Image.Image:
    """The picture, scaled so that one side is that of `size` and none is shorter."""
    height, width = _covering_size(image, size)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _covering_size(image: Image.Image, size: Size) -> Size:
    height, width = size
    shrink = max(height / image.height, width / image.width)
    return max(height, round(image.height * shrink)), max(width, round(image.width * shrink))


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 127.5 - 1


def _piece(pixels: Tensor, picture: Loaded, corner: Size, size: Size, flip: bool) -> Cut:
    (top, left), (height, width) = corner, size
    piece = pixels[:, top : top + height, left : left + width]
    return Cut(piece.flip(-1) if flip else piece, picture.original, corner)
