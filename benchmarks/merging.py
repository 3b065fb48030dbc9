"""What the closed forms of `svdiff merge` take: ``python -m benchmarks.merging --output FILE``.

Keys and values of a UNet of Stable Diffusion 1.5's sizes, two concepts, 1,000 captions, padding included; all of random
numbers, which the arithmetic does not mind. Seconds are medians over rounds, in which the parts take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from svdiff.attached import weight_of
from svdiff.closed_form import directions, merge_shifts, shares_of, summary
from svdiff.targets import select

from . import registry
from .runner import environment

_CAPTIONS, _LENGTH, _CONCEPTS = 1000, 77, 2
_CAPTION_WEIGHT = 0.1


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="How long does a merge take?")
    parser.add_argument("--output", type=Path, help="also write the JSON line into this file")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    options = parser.parse_args()
    line = json.dumps(measured(options.rounds))
    print(line)
    if options.output:
        options.output.write_text(line + "\n")
    return 0


def measured(rounds: int) -> dict[str, Any]:
    """Seconds of each part, for all layers."""
    shapes = _shapes()
    rng = torch.Generator().manual_seed(0)
    width = shapes[0][1]
    captions = torch.randn(_CAPTIONS * _LENGTH, width, generator=rng)
    words = [torch.randn(_LENGTH - 2, width, generator=rng) for _ in range(_CONCEPTS)]
    few = [one[:4] for one in words]
    weights = [torch.randn(shape, generator=rng, dtype=torch.float64) / shape[1] ** 0.5 for shape in shapes]
    tuned = [[W + 0.01 * torch.randn(W.shape, generator=rng) for _ in words] for W in weights]
    spectra = [torch.linalg.svd(W, full_matrices=False)[1:] for W in weights]
    deltas = [[0.01 * torch.randn(len(sigma), generator=rng) for _ in words] for sigma, _ in spectra]
    known = summary(captions)

    def exactly() -> None:
        update = directions(torch.cat(few), known)
        for W, own in zip(weights, tuned, strict=True):
            wanted = torch.cat([c.double() @ (one - W).T for c, one in zip(few, own, strict=True)])
            W + wanted.T @ update

    def by_least_squares() -> None:
        shares = shares_of(words, known, _CAPTION_WEIGHT)
        for W, own in zip(weights, tuned, strict=True):
            W + sum((one - W) @ share for one, share in zip(own, shares, strict=True))

    def of_shifts() -> None:
        for (sigma, Vh), own in zip(spectra, deltas, strict=True):
            merge_shifts(Vh, sigma, own, words, known)

    parts: dict[str, Callable[[], object]] = {
        "summary": lambda: summary(captions),
        "weights exactly": exactly,
        "weights by least squares": by_least_squares,
        "shifts": of_shifts,
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            taken[name].append(time.perf_counter() - start)
    found = {name: round(statistics.median(seconds), 3) for name, seconds in taken.items()}
    return {"seconds": found, "layers": len(shapes), "captions": _CAPTIONS, **environment()}


def _shapes() -> list[torch.Size]:
    """Of the keys and values of Stable Diffusion 1.5, without their numbers."""
    from diffusers import UNet2DConditionModel

    config = json.loads((registry.CONFIGS / "sd15_unet.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return [weight_of(layer).shape for layer in select(unet, "cross_attn_kv", one_dim=False).values()]


if __name__ == "__main__":
    sys.exit(main())
