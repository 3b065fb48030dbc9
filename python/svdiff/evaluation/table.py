"""The figures of an evaluation: what each is called, which way is better, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .intervals import Estimate


@dataclass(frozen=True)
class Kind:
    """What there is to say of a metric.

    Attributes:
        title: in tables and plots.
        higher: whether more is better.
        scale: what it is multiplied by where people read it.
        digits: after the point, there.
        share: whether it is one, of pictures.
    """

    title: str
    higher: bool
    scale: float = 1.0
    digits: int = 3
    share: bool = False


KINDS = {
    "text_alignment": Kind("text alignment", higher=True),
    "image_alignment": Kind("image alignment", higher=True),
    "kid": Kind("KID x 1000", higher=False, scale=1000.0, digits=2),
    "fid": Kind("FID", higher=False, digits=2),
    "diversity": Kind("diversity", higher=True),
    "drift": Kind("drift of class prompts", higher=False),
    "class_kid": Kind("KID x 1000 of class prompts", higher=False, scale=1000.0, digits=2),
    "class_fid": Kind("FID of class prompts", higher=False, digits=2),
    "subject_shown": Kind("subject shown", higher=True, share=True),
    "captions_read": Kind("captions read back", higher=True, share=True),
    "class_captions_read": Kind("class prompts read back", higher=True, share=True),
}
"""Every metric, by its name for ``--metrics``."""


@dataclass(frozen=True)
class Figure:
    """One metric of one entry.

    Attributes:
        entry: whose.
        metric: a key of `KINDS`.
        features: what it was computed from, such as CLIP.
        estimate: the figure.
    """

    entry: str
    metric: str
    features: str
    estimate: Estimate

    @property
    def title(self) -> str:
        """The metric and its features, as a table's row is called."""
        return f"{KINDS[self.metric].title} ({self.features})"

    def as_json(self) -> dict[str, Any]:
        """As ``metrics.json`` holds it."""
        told = {"entry": self.entry, "metric": self.metric, "features": self.features}
        return told | asdict(self.estimate) | {"better": "higher" if KINDS[self.metric].higher else "lower"}

    def written(self) -> tuple[str, str]:
        """The value and its interval as people read them."""
        kind, e = KINDS[self.metric], self.estimate
        numbers = [kind.scale * number for number in (e.value, e.low, e.high)]
        digits = 0 if max(map(abs, numbers)) >= 1000 else kind.digits
        value, low, high = (f"{number:.{digits}f}" for number in numbers)
        return value, f"{low} to {high}"


def rows(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """The figures of each row of a table, by its title, in the order of `KINDS`."""
    order = list(KINDS)
    found: dict[str, list[Figure]] = {}
    for figure in sorted(figures, key=lambda figure: order.index(figure.metric)):
        found.setdefault(figure.title, []).append(figure)
    return found


def text_table(figures: Sequence[Figure]) -> str:
    """The table for a terminal."""
    entries = list(dict.fromkeys(figure.entry for figure in figures))
    lines = [["", *entries]]
    for title, row in rows(figures).items():
        cells = {figure.entry: "{} [{}]".format(*figure.written()) for figure in row}
        arrow = "higher" if KINDS[row[0].metric].higher else "lower"
        lines.append([f"{title}, {arrow} is better", *(cells.get(entry, "-") for entry in entries)])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
