"""Training pictures: found in a folder or a dataset, captioned, checked, and cut to size."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class PictureDataset:
    """A dataset's training split; a picture is read when it is asked for.

    Args:
        name: of the dataset on the hub, or a folder that `datasets` can read.
        config_name: which of its configurations.
        image_column: where the pictures are.
        caption_column: where the captions are; None for none.

    Raises:
        SVDiffError: it cannot be loaded, lacks a column, or is empty.
    """

    def __init__(self, name: str, config_name: str | None, *, image_column: str, caption_column: str | None) -> None:
        import datasets

        self.name, self._image_column, self._caption_column = name, image_column, caption_column
        with self._loading():
            rows: Any = datasets.load_dataset(name, config_name, split="train")
            for column in (image_column, *([caption_column] if caption_column else [])):
                if column not in rows.column_names:
                    raise SVDiffError(f"dataset {name} has no column {column!r}, only {', '.join(rows.column_names)}")
            self._rows = rows.cast_column(image_column, datasets.Image(decode=False))
            self.captions: list[Any] = list(rows[caption_column]) if caption_column else [None] * len(rows)
        if not self.captions:
            raise SVDiffError(f"dataset {name} has no pictures")

    def pictures(self, numbers: Sequence[int], prompt: str | None = None) -> list[Picture]:
        """Some of its pictures; `prompt` is the caption of those without one.

        Raises:
            SVDiffError: one is not there, or has no caption, or one that is no text.
        """
        with self._loading():
            images = [row[self._image_column] for row in self._rows.select(numbers)]
        pictures = []
        for number, image in zip(numbers, images, strict=True):
            where, caption = f"{self.name}[{number}]", self.captions[number] or prompt
            if image is None:
                raise SVDiffError(f"{where} has no picture in column {self._image_column!r}")
            if caption is not None and not isinstance(caption, str):
                kind = type(caption).__name__
                raise SVDiffError(f"{where} has in column {self._caption_column!r} no text, but {kind}")
            if not caption or not caption.strip():
                raise SVDiffError(f"{where} has no caption: give caption_column or instance_prompt")
            content = image["bytes"]
            pictures.append(Picture(Path(image["path"] if content is None else where), caption.strip(), content))
        return pictures

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except SVDiffError:
            raise
        except Exception as error:  # of a library that asks the network, the disk and other people's scripts
            raise SVDiffError(f"cannot load the dataset {self.name}: {' '.join(str(error).split())}") from error


def dataset_pictures(
    name: str, config_name: str | None = None, *, image_column: str, caption_column: str | None, prompt: str | None
) -> list[Picture]:
    """Every picture of a dataset's training split, with its caption, or else `prompt`; see `PictureDataset`."""
    dataset = PictureDataset(name, config_name, image_column=image_column, caption_column=caption_column)
    return dataset.pictures(range(len(dataset.captions)), prompt)


@dataclass(frozen=True)
class Loaded:
    """A picture in memory.

    Attributes:
        image: upright, in RGB, scaled to cover `bucket`, or a multiple of it.
        original: height and width of the file's.
        bucket: which of the training sizes is most like it.
    """

    image: Image.Image
    original: Size
    bucket: Size


def load_picture(picture: Picture, buckets: Sequence[Size], *, detail: float = 1.0) -> Loaded:
    """Read a picture for training at one of some sizes.

    Args:
        picture: which.
        buckets: the sizes.
        detail: how many times the size it is kept at, for those that will be enlarged.

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
    kept = (round(bucket[0] * detail), round(bucket[1] * detail))
    return Loaded(_covering(image, kept), original, bucket)


@dataclass(frozen=True)
class Cut:
    """A piece of a picture.

    Attributes:
        pixels: ``[3, h, w]`` in -1..1.
        original: height and width of the whole picture, before it was scaled.
        corner: top and left of the piece, in the scaled picture.
        place: top, left, bottom and right of the piece in `pixels`, if it does not fill them.
    """

    pixels: Tensor
    original: Size
    corner: Size
    place: tuple[int, int, int, int] | None = None


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
        corner.append(free // 2 if center else _anywhere(free, rng))
    return _piece(_pixels(image), picture, (corner[0], corner[1]), size, flip)


def resized(
    picture: Loaded, canvas: Size, ratio: float, *, step: int, center: bool, flip: bool, rng: torch.Generator
) -> Cut:
    """What `cut` gives, made smaller and put somewhere on gray; or larger, and a piece of that.

    Args:
        picture: what it is of.
        canvas: size of what is returned.
        ratio: how large, for `cut` gives 1.
        step: a smaller one's sides and place are multiples of it.
        center: see `cut`; where a smaller one is, and what is cut from a larger one, is always left to chance.
        flip: whether it is mirrored.
        rng: chance.
    """
    height, width = (max(step, round(side * ratio / step) * step) for side in canvas)
    whole = cut(picture, (height, width), center=center, flip=False, rng=rng)
    if ratio > 1:
        top, left = _anywhere(height - canvas[0], rng), _anywhere(width - canvas[1], rng)
        return _piece(whole.pixels, picture, (top, left), canvas, flip, within=whole.corner)
    top, left = (step * _anywhere((side - own) // step, rng) for side, own in zip(canvas, (height, width), strict=True))
    pixels = torch.zeros(3, *canvas)  # gray, as the authors of Custom Diffusion have it
    pixels[:, top : top + height, left : left + width] = whole.pixels.flip(-1) if flip else whole.pixels
    return replace(whole, pixels=pixels, place=(top, left, top + height, left + width))


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


def _piece(pixels: Tensor, picture: Loaded, corner: Size, size: Size, flip: bool, *, within: Size = (0, 0)) -> Cut:
    (top, left), (height, width) = corner, size
    piece = pixels[:, top : top + height, left : left + width]
    return Cut(piece.flip(-1) if flip else piece, picture.original, (top + within[0], left + within[1]))


def _anywhere(free: int, rng: torch.Generator) -> int:
    """How much of the free room comes first; chance is asked only if there is any."""
    return int(torch.randint(free + 1, (), generator=rng)) if free else 0
