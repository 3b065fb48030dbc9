"""What this machine can do at most: the two lines of its roofline, measured, not read off a data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .cost import Cost

_SECONDS = 0.6  # of trying, for each line


@dataclass(frozen=True)
class Peak:
    """Operations a second of a large GEMM, and bytes a second of a large copy."""

    flops: float
    bandwidth: float

    def bound(self, cost: Cost) -> float:
        """Seconds below which no program with this cost can go here."""
        return max(cost.flop / self.flops, cost.bytes / self.bandwidth)


@cache
def peak(dtype: torch.dtype) -> Peak:
    """Measure this machine, once per process, with as many threads as torch uses."""
    n = 2048
    a, b, c = (torch.ones(n, n, dtype=dtype) for _ in range(3))
    source = torch.ones(1 << 26, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Peak(
        2 * n**3 / _fastest(lambda: torch.mm(a, b, out=c)), 2 * source.numel() / _fastest(lambda: target.copy_(source))
    )


def _fastest(call: Callable[[], object]) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
