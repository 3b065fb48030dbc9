"""The rendered world that the miniature model is pretrained on: captioned scenes of plain objects, 64x64 pixels.

A `Scene` is what is to be seen, `caption` says it in words, `render` draws it. One object stands left, in the centre or
right; two stand left and right. `SUBJECTS` are objects that no pretraining scene contains: what personalisation
teaches.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

IMAGE_SIZE = 64
_SUPERSAMPLING = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (245, 205, 30),
    "purple": (145, 50, 175),
    "orange": (245, 130, 25),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
POSITIONS: dict[str, float] = {"left": 15.5, "center": 32.0, "right": 48.5}  # x of the object's centre, in pixels
SIZES: dict[str, float] = {"small": 20.0, "large": 26.0}  # side of the object's bounding square, in pixels
STYLES = ("solid", "outline")

RARE_TOKENS = ("sks", "zwx", "qrl", "vtn")  # words without a meaning, free to be given one
CLASS_NOUN = "toy"  # any object, whatever its shape: the class that subjects belong to

Point = tuple[float, float]
Part = tuple[str, Sequence[Point]]  # color, polygon in the unit square (y down)


@dataclass(frozen=True)
class Item:
    """One object of a scene.

    `shape` is one of `SHAPES`; or a key of `SUBJECTS`, or `CLASS_NOUN` with a `drawing` (then `color` does not matter).
    """

    shape: str
    color: str
    position: str
    size: str = "large"
    drawing: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Scene:
    """What is to be seen."""

    items: tuple[Item, ...]
    background: str = "white"
    style: str = "solid"


def _ellipse(cx: float, cy: float, rx: float, ry: float, points: int = 40, turn: float = 0.0) -> list[Point]:
    turns = [turn + 2 * math.pi * i / points for i in range(points)]
    return [(cx + rx * math.cos(t), cy + ry * math.sin(t)) for t in turns]


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star() -> list[Point]:
    points = []
    for i in range(10):
        radius, angle = (0.5 if i % 2 == 0 else 0.21), math.pi * i / 5 - math.pi / 2
        points.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return points


def _heart() -> list[Point]:
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + x / 33, 0.46 - y / 30))
    return points


_CROSS = [(0.34, 0), (0.66, 0), (0.66, 0.34), (1, 0.34), (1, 0.66), (0.66, 0.66),
          (0.66, 1), (0.34, 1), (0.34, 0.66), (0, 0.66), (0, 0.34), (0.34, 0.34)]  # fmt: skip

OUTLINES: dict[str, list[Point]] = {
    "circle": _ellipse(0.5, 0.5, 0.5, 0.5),
    "square": _box(0.04, 0.04, 0.96, 0.96),
    "triangle": [(0.5, 0.02), (1.0, 0.98), (0.0, 0.98)],
    "star": _star(),
    "cross": [(float(x), float(y)) for x, y in _CROSS],
    "heart": _heart(),
}

SUBJECTS: dict[str, list[Part]] = {
    "mushroom": [
        ("yellow", _box(0.34, 0.5, 0.66, 1.0)),
        ("red", [*_ellipse(0.5, 0.5, 0.5, 0.48)[20:], (1.0, 0.58), (0.0, 0.58)]),
    ],
    "house": [("blue", _box(0.1, 0.45, 0.9, 1.0)), ("orange", [(0.5, 0.0), (1.0, 0.48), (0.0, 0.48)])],
    "flower": [("green", _box(0.3, 0.6, 0.7, 1.0)), ("yellow", _ellipse(0.5, 0.32, 0.42, 0.32))],
    "fish": [("orange", _ellipse(0.36, 0.5, 0.36, 0.42)), ("purple", [(0.5, 0.5), (1.0, 0.05), (1.0, 0.95)])],
    "robot": [("purple", _box(0.1, 0.42, 0.9, 1.0)), ("green", _box(0.28, 0.0, 0.72, 0.42))],
    "lolly": [("orange", _box(0.42, 0.5, 0.58, 1.0)), ("blue", _ellipse(0.5, 0.32, 0.32, 0.32))],
}


def abstract_drawing(rng: random.Random) -> tuple[Part, ...]:
    """Up to three random ellipses and polygons that fill the unit square together.

    They are what else a toy may be: a class wide enough for subjects that no scene shows.
    """
    parts: list[Part] = []
    for _ in range(rng.randint(1, 3)):
        cx, cy, rx, ry = (
            rng.uniform(0.25, 0.75),
            rng.uniform(0.25, 0.75),
            rng.uniform(0.12, 0.5),
            rng.uniform(0.12, 0.5),
        )
        corners = rng.choice((3, 4, 5, 40))
        turn = rng.uniform(0, 2 * math.pi)
        parts.append((rng.choice(tuple(COLORS)), _ellipse(cx, cy, rx, ry, corners, turn)))
    across, down = zip(*(point for _, polygon in parts for point in polygon), strict=True)
    left, top, width, height = min(across), min(down), max(across) - min(across), max(down) - min(down)
    return tuple((color, [((x - left) / width, (y - top) / height) for x, y in polygon]) for color, polygon in parts)


def render(scene: Scene, rng: random.Random | None = None) -> Image.Image:
    """Draw `scene` as a 64x64 RGB image.

    With `rng` the objects are moved by up to 1.5 pixels across and 4 down and their size varies by 6 %; without, they
    stand exactly where named.
    """
    scale = _SUPERSAMPLING
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        dx, dy, grow = (rng.uniform(-1.5, 1.5), rng.uniform(-4, 4), rng.uniform(0.94, 1.06)) if rng else (0.0, 0.0, 1.0)
        side = SIZES[item.size] * grow
        left, top = POSITIONS[item.position] + dx - side / 2, IMAGE_SIZE / 2 + dy - side / 2
        parts = item.drawing or SUBJECTS.get(item.shape) or [(item.color, OUTLINES[item.shape])]
        for color, polygon in parts:
            points = [((left + x * side) * scale, (top + y * side) * scale) for x, y in polygon]
            draw.polygon(points, fill=COLORS[color])
            if scene.style == "outline":
                draw.polygon(_scaled(points, 0.55), fill=BACKGROUNDS[scene.background])
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _scaled(points: Sequence[Point], factor: float) -> list[Point]:
    """`points` shrunk towards their mean."""
    cx, cy = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return [(cx + factor * (x - cx), cy + factor * (y - cy)) for x, y in points]


def held_out(scene: Scene) -> bool:
    """Whether pretraining never sees `scene`: one in five, told by its full caption."""
    return zlib.crc32(caption(scene).encode()) % 5 == 0


def sample_scene(rng: random.Random, objects: int | None = None, *, held_out_only: bool = False) -> Scene:
    """A random scene of one or two objects (either by chance, if not said), held out from pretraining or not."""
    while True:
        scene = _any_scene(rng, objects)
        if held_out(scene) == held_out_only:
            return scene


def _any_scene(rng: random.Random, objects: int | None) -> Scene:
    count = objects or rng.choice((1, 2))
    positions = (rng.choice(tuple(POSITIONS)),) if count == 1 else ("left", "right")
    items = tuple(
        Item(rng.choice(SHAPES), rng.choice(tuple(COLORS)), position, rng.choice(tuple(SIZES)))
        for position in positions
    )
    return Scene(items, rng.choice(tuple(BACKGROUNDS)), rng.choice(STYLES))


def with_toys(scene: Scene, rng: random.Random, share: float) -> Scene:
    """`scene` with that share of its objects replaced by toys that no word but `CLASS_NOUN` names, and then solid."""
    items = tuple(
        replace(item, shape=CLASS_NOUN, drawing=abstract_drawing(rng)) if rng.random() < share else item
        for item in scene.items
    )
    return replace(scene, items=items, style="solid") if any(item.drawing for item in items) else scene


def place(position: str) -> str:
    """`on the left`, `in the center`, `on the right`."""
    return f"in the {position}" if position == "center" else f"on the {position}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Say `scene` in words.

    Without `rng` everything is said. With it, size, background and style are each left out now and then, two objects
    are named in either order, an object is now and then just a `CLASS_NOUN`, and the opening varies, as captions do.
    """

    def said(chance: float = 0.75) -> bool:
        return rng is None or rng.random() < chance

    items = list(scene.items)
    if rng is not None:
        rng.shuffle(items)
    size_said = said()
    phrases = []
    for item in items:
        words = [item.size] if size_said else []
        if item.drawing:
            words += [CLASS_NOUN]
        elif rng is not None and rng.random() < 0.1:  # the class noun: some object or other
            words += [rng.choice(RARE_TOKENS)] if rng.random() < 0.2 else []
            words += [item.color, CLASS_NOUN] if rng.random() < 0.5 else [CLASS_NOUN]
        else:
            words += [item.color, item.shape]
        phrases.append(f"a {' '.join(words)} {place(item.position)}")
    text = " and ".join(phrases)
    if rng is not None and rng.random() < 0.3:
        text = rng.choice(("a photo of ", "a picture of ")) + text
    if said():
        text += f", {scene.background} background"
    if said():
        text += f", {scene.style}"
    return text


def with_rare_tokens(scene: Scene, tokens: Mapping[str, str]) -> str:
    """The prompt for a scene of subjects: `a large sks toy on the left, black background`."""
    phrases = [f"a {item.size} {tokens[item.shape]} {CLASS_NOUN} {place(item.position)}" for item in scene.items]
    return f"{' and '.join(phrases)}, {scene.background} background"


def subject_scenes(subject: str) -> list[Scene]:
    """Every scene of `subject` alone, solid: each position, size and background once."""
    base = Scene((Item(subject, "", "left"),))
    return [
        replace(base, items=(Item(subject, "", position, size),), background=background)
        for position in POSITIONS
        for size in SIZES
        for background in BACKGROUNDS
    ]
