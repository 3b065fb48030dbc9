"""What this machine can do at most: the two lines of its roofline, measured, not read off a data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cost import Cost

_SECONDS = 0.6  # of trying, for each line
_SIDE, _BYTES = 2048, 1 << 26


@dataclass(frozen=True)
class Peak:
    """Operations a second of a large GEMM, and bytes a second of a large copy."""

    flops: float
    bandwidth: float

    def bound(self, cost: Cost) -> float:
        """Seconds below which no program with this cost can go here."""
        return max(cost.flop / self.flops, cost.bytes / self.bandwidth)


_best: dict[torch.dtype, Peak] = {}


def measure(dtype: torch.dtype) -> None:
    """Look how fast the machine is just now, with as many threads as torch uses; the best look counts.

    In half precision a GEMM in fp32 counts too: where it is the faster of the two, a kernel may convert.
    """
    source = torch.ones(_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    flops = max(_gemm(dtype), _gemm(torch.float32)) if dtype.itemsize < 4 else _gemm(dtype)
    bandwidth = 2 * _BYTES / _fastest(lambda: target.copy_(source))
    before = _best.get(dtype, Peak(0.0, 0.0))
    _best[dtype] = Peak(max(before.flops, flops), max(before.bandwidth, bandwidth))


def peak(dtype: torch.dtype) -> Peak:
    """The most that `measure` has seen in this process."""
    if dtype not in _best:
        measure(dtype)
    return _best[dtype]


def _gemm(dtype: torch.dtype) -> float:
    a, b, c = (torch.ones(_SIDE, _SIDE, dtype=dtype) for _ in range(3))
    return 2 * _SIDE**3 / _fastest(lambda: torch.mm(a, b, out=c))


def _fastest(call: Callable[[], object]) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
