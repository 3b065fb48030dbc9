"""Time against the number of rows T, for square linear layers: where rebuilding the weight begins to pay."""

from __future__ import annotations

from svdiff.bench import BenchConfig

from . import layer, runner
from .registry import Layer

SIDES = (320, 640, 1280)
ROWS = (64, 256, 1024, 4096, 8192)


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure; the first timing of each group is ours."""
    timings: list[runner.Timing] = []
    for side in SIDES:
        for T in ROWS:
            shape = Layer("linear", side, side, T, (1, T, side))
            dtype, device = runner.DTYPES[bench.dtype], bench.device
            steps, costs = layer.contenders(shape, bench.batch, dtype, ranks=(bench.lora_rank,), device=device)
            timings += runner.interleave(
                steps, bench.rounds, subject=str(shape), costs=costs, device=device, graph=bench.graph
            )
    return timings
