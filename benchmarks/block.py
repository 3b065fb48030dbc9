"""One block of a UNet at a time, forward and backward, with the inputs that it sees inside the whole."""

from __future__ import annotations

from typing import Any

import torch
from svdiff.bench import BenchConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from . import runner
from .contenders import Contenders
from .models import calls_of


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure every block on the way down, in the middle and up; the first timing of each group is ours."""
    contenders = Contenders(bench)
    models = {runner.OURS: contenders.ours()[0]}
    models |= {contenders.label(name): contenders.rival(name)[0] for name in bench.rivals}
    blocks = [name for name, _ in contenders.dense.named_modules() if name == "mid_block" or is_numbered(name)]
    seen = calls_of(contenders.dense, blocks, contenders.inputs())
    timings: list[runner.Timing] = []
    for name in blocks:
        steps = {label: _step(model.get_submodule(name), *seen[name]) for label, model in models.items()}
        timings += runner.interleave(steps, bench.rounds, subject=name, device=bench.device)
    return timings


def is_numbered(name: str) -> bool:
    """Is it a block of the list on the way down or up?"""
    parent, _, number = name.rpartition(".")
    return parent in ("down_blocks", "up_blocks") and number.isdecimal()


def _step(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> runner.Step:
    """What trains in the block and its activations get gradients, which are dropped."""
    trained = [p for p in block.parameters() if p.requires_grad]

    def step() -> None:
        def fresh(t: Tensor) -> Tensor:
            return t.detach().requires_grad_(t.is_floating_point() and t.dim() == 4)

        outputs = block(*tree_map_only(Tensor, fresh, args), **tree_map_only(Tensor, fresh, kwargs))
        torch.stack([t.float().square().mean() for t in tree_leaves(outputs)]).sum().backward()
        for parameter in trained:
            parameter.grad = None

    return step
