"""What comes before the first step: decomposing weights of real shapes, and reading them back from the cache."""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from svdiff.bench import BenchConfig
from torch import Tensor

from svdiff_kernels import FactorCache, Factors, decompose

from . import registry, runner
from .models import filled


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure every distinct weight shape of a model; the first timing of each group is what `decompose` does."""
    timings: list[runner.Timing] = []
    for (M, N), count in shapes(bench.model).items():
        W = filled((M, N), N**-0.5, bench.device)
        with tempfile.TemporaryDirectory() as folder:
            cache = FactorCache(folder)
            cache.get(W)
            steps: dict[str, runner.Step] = {
                "decompose": partial(decompose, W),
                "torch.linalg.svd, fp32": partial(torch.linalg.svd, W, full_matrices=False),
                "torch.linalg.svd, fp64": partial(torch.linalg.svd, W.double(), full_matrices=False),
                "read from the cache": partial(_read, cache, W),
            }
            timings += runner.interleave(steps, bench.rounds, subject=f"{count} x {M}x{N}", device=bench.device)
    return timings


def _read(cache: FactorCache, W: Tensor) -> Factors:
    return cache.get(W).to(W.device)


def shapes(model: str) -> dict[tuple[int, int], int]:
    """``(M, N)`` of each weight, with how often it occurs."""
    found: dict[tuple[int, int], int] = {}
    for layer, count in registry.layers(model).items():
        found[layer.M, layer.N] = found.get((layer.M, layer.N), 0) + count
    return found
