"""The op under pytest-benchmark: `pytest benchmarks`, with its --benchmark-compare and --benchmark-autosave."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import op

SHAPES = [(320, 320, 1024), (640, 640, 256), (1280, 1280, 64), (2560, 320, 1024), (320, 320, 77)]


@pytest.mark.parametrize(("M", "r", "T"), SHAPES, ids=lambda n: str(n))
@pytest.mark.parametrize("contender", op.contenders(3, 2, 1, torch.float32)[op.BOTH][0])
def test_forward_and_backward(benchmark: BenchmarkFixture, contender: str, M: int, r: int, T: int) -> None:
    benchmark.group = f"{r} to {M}, T={T}"
    benchmark(op.contenders(M, r, T, torch.float32)[op.BOTH][0][contender])
