"""Reads a picture of the miniature's world back, by rule: palette, connected components, template overlap.

No trained model takes part, so it can judge one. The border gives the background; what differs from it falls into
components; each is told by its place, its extent, its most frequent palette colour, and by the drawing that overlaps it
best once both are scaled to the same square. Colours are told by hue: backgrounds have none, so a rim that is blended
with one keeps its own. It never reads the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from .world import BACKGROUNDS, COLORS, IMAGE_SIZE, OUTLINES, SIZES, SUBJECTS, Item, Scene, render

_GRID = 24  # side of the square that objects and templates are scaled to, in cells
_FOREGROUND = 50.0  # RGB distance from the background above which a pixel belongs to an object
_MIN_AREA = 24  # pixels; smaller specks are noise
# Share of the union's cells that must carry the subject's colour: every rendered subject passes, and not one in a
# hundred plain shapes or abstract toys.
_SUBJECT_AGREEMENT = 0.65

_COLOR_NAMES = tuple(COLORS)
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_PALETTE -= _PALETTE.mean(-1, keepdims=True)  # without their gray
_HUES = _PALETTE / np.linalg.norm(_PALETTE, axis=-1, keepdims=True)  # [colors, 3], unit vectors

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """One object as read: `item.shape` is the best of the plain shapes, `subject` a key of `SUBJECTS` if it is one."""

    item: Item
    subject: str | None
    shape_overlap: float  # intersection over union with the best shape's template, in [0, 1]
    subject_agreement: float  # share of cells that agree in colour with the best subject's template, in [0, 1]


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str
    style: str
    seen: tuple[Seen, ...]  # from left to right


def read(image: Image.Image) -> Reading:
    """Read an RGB picture of 64x64 pixels (others are resized to it)."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)  # [64, 64, 3]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    background = min(BACKGROUNDS, key=lambda name: float(np.abs(ground - np.array(BACKGROUNDS[name])).sum()))
    foreground = np.linalg.norm(pixels - ground, axis=-1) > _FOREGROUND
    labels, count = ndimage.label(foreground, structure=np.ones((3, 3)))
    seen, filled = [], []
    for k in range(1, count + 1):
        mask = labels == k
        if mask.sum() >= _MIN_AREA:
            seen.append(_read_object(pixels, ground, mask))
            filled.append(mask.sum() / ndimage.binary_fill_holes(mask).sum())
    style = "outline" if filled and float(np.mean(filled)) < 0.9 else "solid"
    order = sorted(range(len(seen)), key=lambda i: ("left", "center", "right").index(seen[i].item.position))
    return Reading(background, style, tuple(seen[i] for i in order))


def agrees(image: Image.Image, scene: Scene) -> bool:
    """Whether `image` shows the objects of `scene` and no others: shape, colour and position of each."""

    def key(item: Item) -> tuple[str, str, str]:
        return (item.position, item.shape, item.color)

    return sorted(key(seen.item) for seen in read(image).seen) == sorted(key(item) for item in scene.items)


def shows_subject(image: Image.Image, subject: str) -> bool:
    """Whether some object of `image` is `subject`, wherever it stands and whatever else is there."""
    return any(seen.subject == subject for seen in read(image).seen)


def _read_object(pixels: Array, ground: Array, mask: npt.NDArray[np.bool_]) -> Seen:
    rows, columns = np.nonzero(mask)
    center = (columns.min() + columns.max() + 1) / 2
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    position = "left" if center < 24 else "right" if center > 40 else "center"
    size = "small" if side < 23 else "large"

    nearest = _nearest_color(pixels)
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    votes = nearest[mask & (contrast >= np.median(contrast[mask]))]  # the rim is blended with the background
    color = _COLOR_NAMES[np.bincount(votes, minlength=len(COLORS)).argmax()]

    silhouette = _to_grid(ndimage.binary_fill_holes(mask)) > 0.5
    overlaps = {name: _overlap(silhouette, template) for name, template in _shape_templates().items()}
    shape = max(overlaps, key=overlaps.__getitem__)

    painted = _painted(mask, nearest)
    agreement = {
        name: max(_agreement(painted, template) for template in templates)
        for name, templates in _subject_templates().items()
    }
    subject = max(agreement, key=agreement.__getitem__)
    return Seen(
        Item(shape, color, position, size),
        subject if agreement[subject] >= _SUBJECT_AGREEMENT else None,
        overlaps[shape],
        agreement[subject],
    )


def _to_grid(mask: npt.NDArray[np.bool_], like: npt.NDArray[np.bool_] | None = None) -> Array:
    """`mask` cut to the bounding box of `like` (its own by default) and scaled to the grid, as coverage in [0, 1]."""
    rows, columns = np.nonzero(mask if like is None else like)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    image = Image.fromarray(mask.astype(np.float32)).crop(box)
    return np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BILINEAR))


def _nearest_color(pixels: Array) -> npt.NDArray[np.int64]:
    """The palette colour of nearest hue for each pixel ``[64, 64, 3]``: what is left without the gray, by angle."""
    return ((pixels - pixels.mean(-1, keepdims=True)) @ _HUES.T).argmax(-1)


def _painted(mask: npt.NDArray[np.bool_], nearest: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The palette colour of each cell of the grid over an object, -1 where it does not cover half of the cell."""
    shares = np.stack([_to_grid(mask & (nearest == c), like=mask) for c in range(len(COLORS))])  # [colors, 24, 24]
    return np.where(shares.sum(0) > 0.5, shares.argmax(0), -1)


def _overlap(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def _agreement(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> float:
    union = (a >= 0) | (b >= 0)
    return float(((a == b) & union).sum() / union.sum())


@cache
def _shape_templates() -> dict[str, npt.NDArray[np.bool_]]:
    return {name: _to_grid(_drawn(Item(name, "blue", "center"))[0]) > 0.5 for name in OUTLINES}


@cache
def _subject_templates() -> dict[str, list[npt.NDArray[np.int64]]]:
    return {name: [_painted(*_drawn(Item(name, "", "center", size))) for size in SIZES] for name in SUBJECTS}


def _drawn(item: Item) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Mask and nearest palette colours of one object on white."""
    pixels = np.asarray(render(Scene((item,))), dtype=np.float32)
    return np.linalg.norm(pixels - np.array(BACKGROUNDS["white"]), axis=-1) > _FOREGROUND, _nearest_color(pixels)
