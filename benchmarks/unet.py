"""One training step of a whole UNet (forward, backward, AdamW), against what users would pick instead."""

from __future__ import annotations

from svdiff.bench import BenchConfig

from . import device as devices
from . import runner
from .contenders import Contenders, training_step

GRAPH = ", as a CUDA graph"


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure, interleaved; the first timing is ours, to whose seconds the ratios refer."""
    contenders = Contenders(bench)
    inputs = contenders.inputs()
    steps = {runner.OURS: runner.slowed(training_step(*contenders.ours(), inputs), bench.handicap)}
    for name in bench.rivals:
        steps[contenders.label(name)] = training_step(*contenders.rival(name), inputs)
    costs = contenders.costs()
    if bench.graph:
        costs |= {f"{name}{GRAPH}": costs[name] for name in steps if name in costs}
        steps |= {f"{name}{GRAPH}": devices.graphed(step) for name, step in steps.items()}
    return runner.interleave(steps, bench.rounds, subject=contenders.config.stem, costs=costs, device=bench.device)
