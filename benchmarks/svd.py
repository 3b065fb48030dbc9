"""Decomposing all weights of a model; the naive rival is LAPACK's SVD of each in fp32, as existing code does at load.

Batch by batch, each in every way before the next, so that a machine's drift hits all. One round of Stable Diffusion 1.5
takes minutes, nearly all of them LAPACK's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import torch
from svdiff.bench import BenchConfig
from torch import Tensor
from tqdm.auto import tqdm

from svdiff_kernels import decompose
from svdiff_kernels.decompose import BAR_FORMAT, batches, cost

from . import device as devices
from . import registry, runner

_OURS, LAPACK = "decompose", "torch.linalg.svd, one by one"


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure; the first timing is what `decompose` does to all the weights."""
    places = [torch.empty(shape, device="meta") for shape in shapes(bench.model)]
    seconds: dict[str, list[float]] = {}
    rng = random.Random(0)
    with tqdm(total=bench.rounds * sum(cost(place) for place in places), bar_format=BAR_FORMAT) as bar:
        for _ in range(bench.rounds):
            taken: dict[str, float] = {}
            for batch in batches(places):
                weights = [_random(places[i], seed=i, device=bench.device) for i in batch]
                ways = _ways(weights, "naive" in bench.rivals)
                for name in rng.sample(list(ways), len(ways)):
                    taken[name] = taken.get(name, 0.0) + devices.seconds(bench.device, ways[name])
                bar.update(sum(cost(weight) for weight in weights))
            for name in (_OURS, *(name for name in taken if name != _OURS)):
                seconds.setdefault(name, []).append(taken[name])
    return runner.summarise(seconds, subject=f"{bench.model}, {len(places)} weights")


def _ways(weights: Sequence[Tensor], naive: bool) -> dict[str, devices.Step]:
    ways: dict[str, devices.Step] = {
        _OURS: partial(decompose, weights),
        runner.CONTROL: partial(decompose, weights),
    }
    if naive:
        ways[LAPACK] = lambda: [torch.linalg.svd(weight, full_matrices=False) for weight in weights]
    return ways


def _random(place: Tensor, seed: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(place.shape, generator=generator).mul_(place.shape[1] ** -0.5).to(device)


def shapes(model: str) -> list[tuple[int, int]]:
    """``(M, N)`` of each weight."""
    return [(layer.M, layer.N) for layer, count in registry.layers(model).items() for _ in range(count)]
