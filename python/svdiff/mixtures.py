"""Mixtures and adapters as people write them: ``--mix "dog:0.7,ink:0.3"``, ``--spectral_shifts_ckpt ink=outputs/7``."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from svdiff_kernels import SVDiffError


def named_paths(given: str | Sequence[str], what: str = "adapter") -> dict[str, str]:
    """Adapters, or what else they are, by name: each is ``name=path``, or a path whose last part is the name.

    Raises:
        SVDiffError: two have one name, or a name could not be written in a mixture.
    """
    found: dict[str, str] = {}
    for text in [given] if isinstance(given, str) else given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).expanduser().absolute().name.removesuffix(".safetensors"), text
        if not name or not path or set(name) & set(":,"):
            raise SVDiffError(f"{text!r}: each {what} is given as name=path, with neither ':' nor ',' in the name")
        if name in found:
            raise SVDiffError(f"two {what}s are called {name!r} ({found[name]}, {path}): say name=path")
        found[name] = path
    return found


def parse_mix(text: str, names: Collection[str]) -> dict[str, float]:
    """``"dog:0.7,ink:0.3"`` as ``{"dog": 0.7, "ink": 0.3}``; no number is 1, and an empty text is the base model.

    Raises:
        SVDiffError: an unknown or repeated name, or what is no finite number.
    """
    mix: dict[str, float] = {}
    for term in filter(None, map(str.strip, text.split(","))):
        name, colon, number = map(str.strip, term.partition(":"))
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise SVDiffError(f"mix {text!r}: {number!r} is no weight")
        if name not in names:
            raise SVDiffError(
                f"mix {text!r}: there is no adapter {name!r}, only {', '.join(names) or 'the base model'}"
            )
        if name in mix:
            raise SVDiffError(f"mix {text!r} names {name!r} twice")
        mix[name] = weight
    return mix
