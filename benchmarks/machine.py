"""What this machine can do at most: the two lines of its roofline, measured, not read off a data sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from . import device as devices
from .cost import Cost

_SECONDS = 0.6  # of trying, for each line
_SIDE, _BYTES = {"cpu": 2048, "cuda": 8192}, {"cpu": 1 << 26, "cuda": 1 << 30}


@dataclass(frozen=True)
class Peak:
    """Operations a second of a large GEMM, and bytes a second of a large copy."""

    flops: float
    bandwidth: float

    def bound(self, cost: Cost) -> float:
        """Seconds below which no program with this cost can go here."""
        return max(cost.flop / self.flops, cost.bytes / self.bandwidth)


_best: dict[tuple[torch.dtype, str], Peak] = {}


def measure(dtype: torch.dtype, device: str = "cpu") -> None:
    """Look how fast the machine is just now, with as many threads as torch uses; the best look counts.

    In half precision a GEMM in fp32 counts too: where it is the faster of the two, a kernel may convert.
    """
    source = torch.ones(_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = max(_gemm(t, device) for t in ({dtype, torch.float32} if dtype.itemsize < 4 else {dtype}))
    bandwidth = 2 * _BYTES[device] / _fastest(device, lambda: target.copy_(source))
    before = _best.get((dtype, device), Peak(0.0, 0.0))
    _best[dtype, device] = Peak(max(before.flops, flops), max(before.bandwidth, bandwidth))


def peak(dtype: torch.dtype, device: str = "cpu") -> Peak:
    """The most that `measure` has seen in this process."""
    if (dtype, device) not in _best:
        measure(dtype, device)
    return _best[dtype, device]


def _gemm(dtype: torch.dtype, device: str) -> float:
    side = _SIDE[device]
    # Random on a GPU, which multiplies ones faster: it draws less power.
    a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return 2 * side**3 / _fastest(device, lambda: torch.mm(a, b, out=c))


def _fastest(device: str, call: devices.Step) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        best = min(best, devices.seconds(device, call))
    return best
