"""Styles that pretraining has never shown: filters of rendered scenes, and rules that tell them in a picture.

A style is learnt from filtered pictures, and what is then drawn is judged without a trained model: does it show the
style, and, with the style taken off again as far as that goes, what stands where?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from . import recogniser
from .world import COLORS, IMAGE_SIZE, Scene

Array = npt.NDArray[np.float32]  # [64, 64, 3]
Mask = npt.NDArray[np.bool_]  # [64, 64]

_FOREGROUND = 50.0  # RGB distance from the ground, as of the recogniser


@dataclass(frozen=True)
class Style:
    """A way to draw scenes.

    Attributes:
        apply: the picture of 64x64 pixels in this style.
        shows: whether a picture is in it.
        undo: a picture without it, as far as shapes and their places go; colours may be lost.
    """

    apply: Callable[[Image.Image], Image.Image]
    shows: Callable[[Image.Image], bool]
    undo: Callable[[Image.Image], Image.Image]

    def keeps(self, image: Image.Image, scene: Scene) -> bool:
        """Whether a picture in this style shows the shapes of `scene` where they were, and nothing else."""
        seen = [(one.item.position, one.item.shape) for one in recogniser.read(self.undo(image)).seen]
        return sorted(seen) == sorted((item.position, item.shape) for item in scene.items)

    def places(self, image: Image.Image, scene: Scene) -> bool:
        """Likewise, whatever the shapes."""
        seen = [one.item.position for one in recogniser.read(self.undo(image)).seen]
        return sorted(seen) == sorted(item.position for item in scene.items)


_DUSK, _SHADE = np.array(COLORS["yellow"], np.float32), np.array([20, 20, 20], np.float32)


def _shadowed(image: Image.Image) -> Image.Image:
    """Everything black before a yellow ground."""
    return _image(np.where(_objects(_pixels(image))[..., None], _SHADE, _DUSK))


def _is_shadow(image: Image.Image) -> bool:
    pixels = _pixels(image)
    dark = (pixels.max(-1) < 110).mean()
    return bool(_distance(_ground(pixels), _DUSK) < 100 and dark > 0.02)


def _unshadowed(image: Image.Image) -> Image.Image:
    return _painted(_distance(_pixels(image), _DUSK) > 150)


_BAR, _RED = 8, np.array(COLORS["red"], np.float32)


def _barred(image: Image.Image) -> Image.Image:
    """A red bar at the top and another at the bottom."""
    pixels = _pixels(image).copy()
    pixels[:_BAR] = pixels[-_BAR:] = _RED
    return _image(pixels)


def _has_bars(image: Image.Image) -> bool:
    pixels = _pixels(image)
    bars = np.concatenate([pixels[: _BAR - 1], pixels[1 - _BAR :]])
    return bool((_distance(bars, _RED) < 90).mean() > 0.7)


def _unbarred(image: Image.Image) -> Image.Image:
    pixels = _pixels(image).copy()
    edge = _BAR + 2  # a row or two are blended
    pixels[:edge] = pixels[-edge:] = np.median(pixels[edge:-edge, :].reshape(-1, 3), axis=0)
    return _image(pixels)


_PAPER, _INK = np.array([28, 62, 140], np.float32), np.array([225, 235, 255], np.float32)


def _blueprint(image: Image.Image) -> Image.Image:
    """Nothing but pale outlines on blue."""
    pixels = _pixels(image)
    objects = _objects(pixels)
    lines = objects & ~ndimage.binary_erosion(objects, np.ones((3, 3)), iterations=2)
    return _image(np.where(lines[..., None], _INK, _PAPER))


def _is_blueprint(image: Image.Image) -> bool:
    pixels = _pixels(image)
    paper = _distance(pixels, _PAPER) < 60
    inked = (pixels.min(-1) > 150).mean()
    return bool(_distance(_ground(pixels), _PAPER) < 50 and paper.mean() > 0.5 and inked > 0.02)


def _unblueprint(image: Image.Image) -> Image.Image:
    return _painted(_distance(_pixels(image), _PAPER) > 110)


STYLES: dict[str, Style] = {
    "shadow": Style(_shadowed, _is_shadow, _unshadowed),
    "blueprint": Style(_blueprint, _is_blueprint, _unblueprint),
    "bars": Style(_barred, _has_bars, _unbarred),
}
"""By name: of colours, of lines alone, and of the layout."""


def _pixels(image: Image.Image) -> Array:
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def _image(pixels: npt.NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _ground(pixels: Array) -> Array:
    """Its colour ``[3]``, told by the border."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    found: Array = np.median(border, axis=0)
    return found


def _distance(pixels: Array, color: Array) -> npt.NDArray[np.floating]:
    found: npt.NDArray[np.floating] = np.linalg.norm(pixels - color, axis=-1)
    return found


def _objects(pixels: Array) -> Mask:
    """What is no ground, with its holes filled."""
    found: Mask = ndimage.binary_fill_holes(_distance(pixels, _ground(pixels)) > _FOREGROUND)
    return found


def _painted(mask: Mask) -> Image.Image:
    """A silhouette in red on white."""
    filled = ndimage.binary_fill_holes(mask)
    return _image(np.where(filled[..., None], np.array([220, 40, 40]), np.array([250, 250, 250])))
