"""What a call costs before any arithmetic: layers so small that nothing but dispatch takes time.

Forward and backward through a chain of layers; the rivals are torch's own layers, and our arithmetic in plain torch
operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from svdiff.bench import BenchConfig
from torch import Tensor, nn

from svdiff_kernels import Bank
from svdiff_kernels.nn import SpectralLinear

from . import runner
from .layer import spectral_layer

LAYERS = 50
PLAIN = "the same in plain torch operations"


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure; the first timing of each group is ours."""
    dtype = runner.DTYPES[bench.dtype]
    torch.manual_seed(0)
    chains: dict[str, tuple[nn.Sequential, Tensor]] = {
        f"{LAYERS} linear layers 8x8 T=4": (
            nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS))),
            torch.randn(4, 8),
        ),
        f"{LAYERS} convs 8x72 T=16": (
            nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(LAYERS))),
            torch.randn(1, 8, 4, 4),
        ),
    }
    timings: list[runner.Timing] = []
    for subject, (dense, x) in chains.items():
        dense.to(bench.device, dtype).requires_grad_(False)
        steps = _steps(dense, x.to(bench.device, dtype))
        timings += runner.interleave(steps, 20 * bench.rounds, subject=subject, warmup=5, device=bench.device)
    return timings


def _steps(dense: nn.Sequential, x: Tensor) -> dict[str, runner.Step]:
    layers = [spectral_layer(layer) for layer in dense if isinstance(layer, nn.Linear | nn.Conv2d)]
    spectral = nn.Sequential(*layers)
    bank = Bank({str(i): layer for i, layer in enumerate(layers)}, root=spectral)
    shifts = bank.trained[0]
    scales = torch.ones(LAYERS, layers[0].rank, device=x.device, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        for layer, scale in zip(layers, scales.to(x.dtype).unbind(), strict=True):
            if isinstance(layer, SpectralLinear):
                x = F.linear(F.linear(x, layer.Vh) * scale, layer.U, layer.bias)
            else:
                z = F.conv2d(x, layer.Vh, padding=1) * scale[:, None, None]
                x = F.conv2d(z, layer.U[:, :, None, None], layer.bias)
        return x

    def step(run: Callable[[Tensor], Tensor], *trained: Tensor) -> runner.Step:
        leaf = x.clone().requires_grad_()
        dy = torch.ones_like(x)
        return lambda: torch.autograd.grad(run(leaf), (leaf, *trained), dy)

    return {
        runner.OURS: step(spectral, shifts),
        PLAIN: step(plain, scales),
        runner.FROZEN: step(dense),
    }
