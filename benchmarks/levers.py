"""What the levers that are not built would save: measured before they are.

Each subject is one lever; its first timing is what the library does now, the second what the lever would make of it,
for all the layers of a model that it concerns.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from svdiff.bench import BenchConfig
from torch import nn

from . import cost, registry, runner
from .contenders import Contenders, Inputs, training_step
from .layer import dense_layer, spectral_layer
from .models import calls_of, filled

_JOINED, _RECOMPOSED, _KEPT, _LAST = "joined", "recomposed", "memory is kept", "channels last"
_ACCUMULATED = 4  # micro-batches
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's mallopt


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
    inputs = contenders.inputs()
    timings: list[runner.Timing] = []
    for subject, groups in _groups(contenders, inputs).items():
        backward = subject.startswith("q, k, v")  # text and time need no dx while their encoders are frozen
        steps: dict[str, runner.Step] = {
            runner.OURS: _projections(groups, bench, joined=False, backward=backward),
            _JOINED: _projections(groups, bench, joined=True, backward=backward),
        }
        timings += runner.interleave(steps, 5 * bench.rounds, subject=subject)
    shapes = registry.layers(contenders.config, 8 * bench.latents)
    for micro_batches in (1, _ACCUMULATED):
        timings += _recomposed(shapes, bench, micro_batches)
    return timings + _whole_steps(contenders, inputs)


def _groups(contenders: Contenders, inputs: Inputs) -> dict[str, list[Group]]:
    """Read off the model: which projections share an input."""
    self_attention: Counter[Group] = Counter()
    text: list[int] = []
    time: list[int] = []
    width, batch = contenders.dense.config.cross_attention_dim, contenders.bench.batch
    linears = {name: m for name, m in contenders.dense.named_modules() if isinstance(m, nn.Linear)}
    queries = [name for name in linears if name.endswith("attn1.to_q")]
    seen = calls_of(contenders.dense, queries, inputs)
    for name, module in linears.items():
        rank = min(module.weight.shape)
        if name in seen:
            rows = seen[name].args[0].shape[:-1].numel()
            self_attention[Group(rows, module.in_features, (rank,) * 3)] += 1
        elif name.endswith(("attn2.to_k", "attn2.to_v")):
            text.append(rank)
        elif name.endswith("time_emb_proj"):
            time.append(rank)
    channels = linears["time_embedding.linear_2"].out_features
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


def _recomposed(shapes: dict[registry.Layer, int], bench: BenchConfig, micro_batches: int) -> list[runner.Timing]:
    """The layers whose weight the cost rule would rebuild, once per optimiser step of so many micro-batches."""
    dtype = runner.DTYPES[bench.dtype]
    factored: list[runner.Step] = []
    rebuilt: list[runner.Step] = []
    costs = {runner.OURS: cost.Cost(0, 0), _RECOMPOSED: cost.Cost(0, 0)}
    for layer, count in shapes.items():
        T = layer.T * bench.batch
        if not cost.prefers_recomposed(layer.M, layer.N, T, micro_batches):
            continue
        steps = _one_recomposed(layer, bench.batch, dtype, micro_batches)
        factored += [steps[0]] * count
        rebuilt += [steps[1]] * count
        shape, times = (layer.M, layer.N, T, dtype.itemsize), count * micro_batches
        costs[runner.OURS] += times * cost.factored(*shape)
        costs[_RECOMPOSED] += times * cost.recomposed(*shape, micro_batches)
    if not factored:
        return []
    batches = "1 micro-batch" if micro_batches == 1 else f"{micro_batches} micro-batches"
    return runner.interleave(
        {runner.OURS: _each(factored), _RECOMPOSED: _each(rebuilt)},
        bench.rounds,
        subject=f"{len(factored)} layers picked by the cost rule, {batches}",
        costs=costs,
    )


def _one_recomposed(
    layer: registry.Layer, batch: int, dtype: torch.dtype, micro_batches: int
) -> tuple[runner.Step, runner.Step]:
    dense = dense_layer(layer, dtype)
    spectral = spectral_layer(dense)
    x = filled((batch, *layer.inputs[1:]), 1.0).to(dtype).requires_grad_()
    dy = torch.ones_like(dense(x))
    U, Vh = spectral.U, spectral.Vh.flatten(1)

    def factored() -> None:
        for _ in range(micro_batches):
            spectral(x).backward(dy)
        x.grad = None
        spectral.zero_grad()

    def recomposed() -> None:
        gain = spectral.one_gain().detach().to(dtype)
        dense.weight.data = ((U * gain) @ Vh).view_as(dense.weight)
        dense.weight.requires_grad_()
        for _ in range(micro_batches):
            dense(x).backward(dy)
        dW = dense.weight.grad
        assert dW is not None
        ((dW.flatten(1) @ Vh.T) * U).sum(0)
        x.grad = dense.weight.grad = None

    return factored, recomposed


def _each(steps: list[runner.Step]) -> runner.Step:
    def step() -> None:
        for one in steps:
            one()

    return step


def _whole_steps(contenders: Contenders, inputs: Inputs) -> list[runner.Timing]:
    """In another memory layout; and with an allocator that keeps everything, the most that reused buffers can save."""
    bench = contenders.bench
    ours = training_step(*contenders.ours(), inputs)
    other: Any = Contenders(bench)
    other.dense.to(memory_format=torch.channels_last)
    model, parameters = other.ours()
    model.to(memory_format=torch.channels_last)
    last = {**inputs, "sample": inputs["sample"].contiguous(memory_format=torch.channels_last)}
    steps = {runner.OURS: ours, _LAST: training_step(model, parameters, last)}
    if keep := _allocator():
        steps = {name: _under(keep, False, step) for name, step in steps.items()} | {_KEPT: _under(keep, True, ours)}
    return runner.interleave(steps, bench.rounds, subject=f"whole step, {Path(contenders.config).stem}")


def _under(keep: Callable[[bool], None], kept: bool, step: runner.Step) -> runner.Step:
    def under() -> None:
        keep(kept)
        step()

    return under


def _allocator() -> Callable[[bool], None] | None:
    """Tells glibc to keep all memory, or to give large blocks back as it ends up doing by itself; None elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return None

    def keep(kept: bool) -> None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_MMAP_MAX, 0 if kept else 1 << 16)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1 if kept else 64 << 20)

    return keep
