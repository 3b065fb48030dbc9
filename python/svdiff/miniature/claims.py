"""What a caption of the miniature's world says, and whether that is true of a scene or of what a picture shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import world
from .recogniser import Reading

_OF_ALL = frozenset([*world.BACKGROUNDS, *world.STYLES])
_OF_ONE = frozenset([*world.COLORS, *world.SHAPES, *world.SIZES])


@dataclass(frozen=True)
class Facts:
    """What is said, or what is so.

    Attributes:
        items: one an object: its position, and its size, colours and shape as far as they have names.
        of_all: background and style.
    """

    items: tuple[tuple[str, frozenset[str]], ...]
    of_all: frozenset[str]


def said(caption: str) -> Facts:
    """What a caption says; of a toy no shape. Words that say nothing of the world are passed over."""
    items: list[tuple[str, frozenset[str]]] = []
    words: set[str] = set()
    for word in caption.replace(",", " ").split():
        if word in world.POSITIONS:
            items.append((word, frozenset(words & _OF_ONE)))
            words = set()
        words.add(word)
    return Facts(tuple(sorted(items, key=_by_position)), frozenset(words & _OF_ALL))


def of_scene(scene: world.Scene) -> Facts:
    """What is so in a scene."""
    items = [(i.position, frozenset([i.size, *(colors(i) if i.drawing else (i.color, i.shape))])) for i in scene.items]
    return Facts(tuple(sorted(items, key=_by_position)), frozenset([scene.background, scene.style]))


def of_reading(reading: Reading) -> Facts:
    """What the recogniser has seen in a picture."""
    items = [(s.item.position, frozenset([s.item.size, s.item.color, s.item.shape])) for s in reading.seen]
    return Facts(tuple(sorted(items, key=_by_position)), frozenset([reading.background, reading.style]))


def true(claims: Facts, facts: Facts) -> bool:
    """Whether all that is claimed is so, of exactly the objects that are there."""
    if [position for position, _ in claims.items] != [position for position, _ in facts.items]:
        return False
    pairs = zip(claims.items, facts.items, strict=True)
    return claims.of_all <= facts.of_all and all(told <= seen for (_, told), (_, seen) in pairs)


def colors(item: world.Item) -> tuple[str, ...]:
    """The colours of a drawing, by name."""
    return tuple(sorted({color for color, _ in item.drawing}))


def _by_position(item: tuple[str, Iterable[str]]) -> int:
    return tuple(world.POSITIONS).index(item[0])
