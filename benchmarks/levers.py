"""What joining work across the layers of a model would save: measured before it is built.

Each subject is one lever; its first timing is what the library does now, the second what the lever would make of it,
for all the layers of a model that it concerns.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from svdiff.bench import BenchConfig
from torch import Tensor, nn

from . import registry, runner
from .contenders import Contenders, training_step
from .models import filled

_JOINED = "joined"


@dataclass(frozen=True)
class Group:
    """Layers that share an input of T rows and N columns, by their ranks; `count` such groups are in the model."""

    T: int
    N: int
    ranks: tuple[int, ...]
    count: int = 1


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure each lever, interleaved."""
    contenders = Contenders(bench)
    groups = _groups(contenders)
    timings: list[runner.Timing] = []
    for subject, found in groups.items():
        backward = subject.startswith("q, k, v")  # text and time need no dx while their encoders are frozen
        steps: dict[str, runner.Step] = {
            runner.OURS: _projections(found, bench, joined=False, backward=backward),
            _JOINED: _projections(found, bench, joined=True, backward=backward),
        }
        timings += runner.interleave(steps, 5 * bench.rounds, subject=subject)
    inputs = contenders.inputs()
    model, parameters = contenders.ours()
    steps = {runner.OURS: training_step(model, parameters, inputs)}
    other: Any = Contenders(bench)
    other.dense.to(memory_format=torch.channels_last)
    model, parameters = other.ours()
    model.to(memory_format=torch.channels_last)
    last = {**inputs, "sample": inputs["sample"].contiguous(memory_format=torch.channels_last)}
    steps["channels last"] = training_step(model, parameters, last)
    return timings + runner.interleave(steps, bench.rounds, subject=f"whole step, {Path(contenders.config).stem}")


def _groups(contenders: Contenders) -> dict[str, list[Group]]:
    """Read off the model: which projections share an input."""
    self_attention: Counter[Group] = Counter()
    text: list[int] = []
    time: list[int] = []
    width = contenders.dense.config.cross_attention_dim
    seen: dict[str, Tensor] = {}
    modules = {name: m for name, m in contenders.dense.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, m in modules.items()
    ]
    with torch.no_grad():
        contenders.dense(**contenders.inputs())
    for hook in hooks:
        hook.remove()
    for name, module in modules.items():
        rank = min(module.weight.shape)
        if name.endswith("attn1.to_q"):
            rows = seen[name].shape[:-1].numel()
            self_attention[Group(rows, module.in_features, (rank,) * 3)] += 1
        elif name.endswith(("attn2.to_k", "attn2.to_v")):
            text.append(rank)
        elif name.endswith("time_emb_proj"):
            time.append(rank)
    batch = contenders.bench.batch
    channels = modules["time_embedding.linear_2"].out_features
    return {
        "q, k, v of self-attention": [Group(g.T, g.N, g.ranks, n) for g, n in self_attention.items()],
        "text K, V of the whole model": [Group(registry.TEXT_TOKENS * batch, width, tuple(text))],
        "time embedding of the whole model": [Group(batch, channels, tuple(time))],
    }


def _projections(groups: list[Group], bench: BenchConfig, *, joined: bool, backward: bool) -> runner.Step:
    """``z = x Vh`` of every group, and dx, one product per layer or one per group."""
    dtype = runner.DTYPES[bench.dtype]
    work = []
    for group in groups:
        x = filled((group.T, group.N), 1.0).to(dtype)
        Vh = [filled((r, group.N), 1.0).to(dtype) for r in group.ranks]
        dz = [filled((group.T, r), 1.0).to(dtype) for r in group.ranks]
        work.append((x, [torch.cat(Vh)] if joined else Vh, dz, group.count))

    def step() -> None:
        for x, factors, dz, count in work:
            for _ in range(count):
                for Vh in factors:
                    F.linear(x, Vh)
                if backward and joined:
                    torch.cat(dz, dim=1) @ factors[0]
                elif backward:
                    dx = dz[0] @ factors[0]
                    for d, Vh in zip(dz[1:], factors[1:], strict=True):
                        dx += d @ Vh

    return step
