"""``report.html``: tables, plots and pictures of an evaluation in one file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from .pictures import Judged, open_picture
from .table import KINDS, Figure, rows

SHOWN = 12
"""Pictures of a strip."""

_SIDE = 128  # pixels of a picture there

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1e293b; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; } h3 { margin: 1.2rem 0 .3rem; font-size: 1rem; }
table { border-collapse: collapse; }
th, td { padding: .4rem .9rem; border-bottom: 1px solid #e2e8f0; text-align: right }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #94a3b8; }
td.best { font-weight: 600; background: #fff7ed; } .range, .hint, figcaption { color: #64748b; font-size: .8rem; }
.range, .hint { display: block; font-weight: normal; } img.plot { max-width: 100%; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; } figure { margin: 0; width: 128px; }
figure img { width: 128px; height: 128px; object-fit: contain; background: #f1f5f9; image-rendering: pixelated; }
figure img.large { image-rendering: auto; } figcaption { overflow-wrap: anywhere; }
"""


def page(
    figures: Sequence[Figure],
    plot: bytes,
    strips: Mapping[str, Sequence[Judged]],
    *,
    sources: Mapping[str, str],
    left_out: Mapping[str, str],
    confidence: float,
) -> str:
    """The HTML.

    Args:
        figures: all of them.
        plot: a PNG.
        strips: pictures to show, by the title above them; the first `SHOWN` of each, different prompts first.
        sources: where each kind of features comes from.
        left_out: metrics that were not computed, and why.
        confidence: of the intervals.
    """
    parts = [
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>Evaluation</title>",
        f"<style>{_STYLE}</style></head><body>\n<h1>Evaluation</h1>",
        f"<p>Below each figure the interval that holds {confidence:.0%} of resamples of the pictures. "
        "The best of a row is marked; where intervals overlap, that may be chance.</p>",
        _table(figures),
        f'<h2>Plots</h2>\n<img class=plot alt="the figures as plots" src="{_data(plot, "png")}">',
        "<h2>Pictures</h2>",
        *(_strip(title, pictures) for title, pictures in strips.items()),
        "<h2>Features</h2>\n<ul>",
        *(f"<li>{escape(name)}: {escape(source)}</li>" for name, source in sources.items()),
        "</ul>",
    ]
    if left_out:
        reasons = (f"<li>{escape(KINDS[metric].title)}: {escape(why)}</li>" for metric, why in left_out.items())
        parts += ["<h2>Not measured</h2>\n<ul>", *reasons, "</ul>"]
    return "\n".join([*parts, "</body></html>\n"])


def _table(figures: Sequence[Figure]) -> str:
    entries = list(dict.fromkeys(figure.entry for figure in figures))
    head = "".join(f"<th>{escape(entry)}</th>" for entry in entries)
    lines = [f"<table>\n<thead><tr><th></th>{head}</tr></thead>\n<tbody>"]
    for title, row in rows(figures).items():
        higher = KINDS[row[0].metric].higher
        values = {figure.estimate.value for figure in row}
        best = (max if higher else min)(values)
        hint = f"<span class=hint>{'higher' if higher else 'lower'} is better</span>"
        by_entry = {figure.entry: figure for figure in row}
        cells = []
        for entry in entries:
            if entry not in by_entry:
                cells.append("<td></td>")
                continue
            value, interval = by_entry[entry].written()
            mark = " class=best" if len(values) > 1 and by_entry[entry].estimate.value == best else ""
            cells.append(f"<td{mark}>{value}<span class=range>{interval}</span></td>")
        lines.append(f"<tr><td>{escape(title)}{hint}</td>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _strip(title: str, pictures: Sequence[Judged]) -> str:
    shown = "\n".join(_thumbnail(picture) for picture in chosen(pictures))
    return f"<h3>{escape(title)}</h3>\n<div class=strip>\n{shown}\n</div>"


def chosen(pictures: Sequence[Judged], count: int = SHOWN) -> list[Judged]:
    """The pictures to show: the first of each prompt, then the second of each, and so on; in their order."""
    seen: dict[str | None, int] = {}
    turns = []
    for i, picture in enumerate(pictures):
        seen[picture.prompt] = seen.get(picture.prompt, 0) + 1
        turns.append((seen[picture.prompt], i))
    return [pictures[i] for i in sorted(i for _, i in sorted(turns)[:count])]


def _thumbnail(picture: Judged) -> str:
    image = open_picture(picture)
    large = max(image.size) > _SIDE
    if large:
        image.thumbnail((2 * _SIDE, 2 * _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "jpeg" if large else "png"
    image.save(buffer, kind, **({"quality": 85} if large else {}))
    caption = escape(picture.prompt or "")
    name = " class=large" if large else ""
    shown = f'<img{name} alt="{caption}" src="{_data(buffer.getvalue(), kind)}">'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
