"""The one op alone on the shapes of a real model: ours, plain torch, and what any layer of U's shape must cost.

Forward and backward with autograd, as a layer calls them; and each by itself against the vendor's plain product of the
same shape, which no kernel of ours can be expected to beat.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from svdiff.bench import BenchConfig
from torch import Tensor

from svdiff_kernels import backends, reference
from svdiff_kernels.ops import expand, expand_backward

from . import registry, runner
from .cost import Cost, gemm
from .models import filled

DENSE = "dense layer, r to M"
GEMM = "plain product of the same shape"
PLAIN = "plain torch, without autograd"
FP16 = ", factors in fp16"
BOTH, FORWARD, BACKWARD = "", ", forward", ", backward"
"""What follows the shape in a subject."""

Measured = tuple[dict[str, runner.Step], dict[str, Cost]]


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure every distinct shape of a model; the first timing of each group is the backend that serves."""
    dtype = runner.DTYPES[bench.dtype]
    timings: list[runner.Timing] = []
    for (M, r, T), count in shapes(bench.model, bench.latents * 8).items():
        T *= bench.batch
        for part, (steps, costs) in contenders(M, r, T, dtype, bench.device).items():
            timings += runner.interleave(
                steps,
                bench.rounds,
                subject=f"{count} x expand {r} to {M}, T={T}{part}",
                costs=costs,
                device=bench.device,
                graph=bench.graph,
            )
    return timings


def shapes(model: str, pixels: int) -> dict[tuple[int, int, int], int]:
    """``(M, r, T)`` of each layer at full rank, with how often it occurs."""
    found: dict[tuple[int, int, int], int] = {}
    for layer, count in registry.layers(model, pixels).items():
        key = (layer.M, min(layer.M, layer.N), layer.T)
        found[key] = found.get(key, 0) + count
    return found


def contenders(M: int, r: int, T: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Measured]:
    """Forward and backward of the op by backend, and of a dense layer of U's shape; then each way by itself."""
    z, U = filled((T, r), 1.0, device).to(dtype), filled((M, r), M**-0.5, device).to(dtype)
    dy = filled((T, M), 1.0, device).to(dtype)
    scale, bias = filled((1, r), 1.0, device), filled((M,), 1.0, device).to(dtype)
    ours = backends.serving(device)

    def dispatched() -> None:
        leaf, trained = z.detach().requires_grad_(), scale.detach().requires_grad_()
        expand(leaf, U, trained, bias).backward(dy)

    def plain() -> None:
        reference.expand(z, U, scale, bias)
        reference.expand_backward(dy, z, U, scale, True)

    def dense() -> None:
        leaf: Tensor = z.detach().requires_grad_()
        F.linear(leaf, U, bias).backward(dy)

    both: dict[str, runner.Step] = {ours: dispatched, PLAIN: plain, DENSE: dense}
    forward: dict[str, runner.Step] = {
        ours: partial(expand, z, U, scale, bias),
        GEMM: partial(F.linear, z, U, bias),
    }
    backward: dict[str, runner.Step] = {
        ours: partial(expand_backward, dy, z, U, scale, True),
        GEMM: partial(torch.mm, dy, U),
    }
    if device == "cuda" and dtype == torch.bfloat16:
        z16, U16 = z.half(), U.half()
        forward[ours + FP16] = partial(expand, z16, U16, scale, bias, dtype=dtype)
        backward[ours + FP16] = partial(expand_backward, dy, z16, U16, scale, True)
    up, down = gemm(T, r, M, dtype.itemsize), gemm(T, M, r, dtype.itemsize)
    measured = {BOTH: (both, up + down), FORWARD: (forward, up), BACKWARD: (backward, down)}
    return {part: (steps, dict.fromkeys(steps, cost)) for part, (steps, cost) in measured.items()}
