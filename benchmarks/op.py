"""The one op alone, forward and backward, on the shapes of a real model: ours, plain torch, and a dense layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from svdiff.bench import BenchConfig
from torch import Tensor

from svdiff_kernels import backends, reference
from svdiff_kernels.ops import expand

from . import registry, runner
from .cost import Cost, gemm
from .models import filled

DENSE = "dense layer, r to M"


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure every distinct shape of a model; the first timing of each group is the backend that serves."""
    dtype = runner.DTYPES[bench.dtype]
    timings: list[runner.Timing] = []
    for (M, r, T), count in shapes(bench.model, bench.latents * 8).items():
        steps, costs = contenders(M, r, T * bench.batch, dtype)
        subject = f"{count} x expand {r} to {M}, T={T * bench.batch}"
        timings += runner.interleave(steps, bench.rounds, subject=subject, costs=costs)
    return timings


def shapes(model: str, pixels: int) -> dict[tuple[int, int, int], int]:
    """``(M, r, T)`` of each layer at full rank, with how often it occurs."""
    found: dict[tuple[int, int, int], int] = {}
    for layer, count in registry.layers(model, pixels).items():
        key = (layer.M, min(layer.M, layer.N), layer.T)
        found[key] = found.get(key, 0) + count
    return found


def contenders(M: int, r: int, T: int, dtype: torch.dtype) -> tuple[dict[str, runner.Step], dict[str, Cost]]:
    """Forward and backward of the op by backend, and of a dense layer of U's shape."""
    z, U, dy = filled((T, r), 1.0).to(dtype), filled((M, r), M**-0.5).to(dtype), filled((T, M), 1.0).to(dtype)
    scale, bias = filled((1, r), 1.0), filled((M,), 1.0).to(dtype)

    def dispatched() -> None:
        leaf, trained = z.detach().requires_grad_(), scale.detach().requires_grad_()
        expand(leaf, U, trained, bias).backward(dy)

    def plain() -> None:
        reference.expand(z, U, scale, bias)
        reference.expand_backward(dy, z, U, scale, True)

    def dense() -> None:
        leaf: Tensor = z.detach().requires_grad_()
        F.linear(leaf, U, bias).backward(dy)

    steps: dict[str, runner.Step] = {
        backends.serving("cpu"): dispatched,
        "plain torch, without autograd": plain,
        DENSE: dense,
    }
    cost = gemm(T, r, M, dtype.itemsize) + gemm(T, M, r, dtype.itemsize)
    return steps, dict.fromkeys(steps, cost)
