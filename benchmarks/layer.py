"""One layer of a real model at a time: forward, dx and the gradient of what trains, in every way that there is.

The ratios of a model's layers, weighted by how often each occurs, say where a whole step goes.
"""

from __future__ import annotations

import torch
from svdiff.bench import BenchConfig
from torch import nn

from svdiff_kernels.nn import SpectralConv2d, SpectralLinear

from . import baselines, cost, registry, runner
from .models import RandomFactors, filled, twin

RESIDUAL_RANK = 64
LORA_RANKS = (4, 16, 64)


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure every distinct layer of a model; the first timing of each group is ours."""
    dtype = runner.DTYPES[bench.dtype]
    shapes = registry.layers(bench.model, bench.latents * 8)
    timings: list[runner.Timing] = []
    for layer, count in shapes.items():
        steps, costs = contenders(layer, bench.batch, dtype, device=bench.device)
        subject = f"{count} x {layer}"
        timings += runner.interleave(
            steps, bench.rounds, subject=subject, costs=costs, device=bench.device, graph=bench.graph
        )
    return timings


def contenders(
    layer: registry.Layer,
    batch: int,
    dtype: torch.dtype,
    ranks: tuple[int, ...] = LORA_RANKS,
    device: str = "cpu",
) -> tuple[dict[str, runner.Step], dict[str, cost.Cost]]:
    """Steps of one layer by name, and what each costs by count; without PEFT there is no LoRA."""
    dense = dense_layer(layer, dtype, device)
    spectral = spectral_layer(dense)
    x = filled((batch, *layer.inputs[1:]), 1.0, device).to(dtype)
    M, N, T, size, fold = layer.M, layer.N, layer.T * batch, dtype.itemsize, layer.fold
    steps = {runner.OURS: _step(spectral, x)}
    costs = {runner.OURS: cost.factored(M, N, T, size, fold=fold)}
    if min(M, N) > RESIDUAL_RANK:
        name = f"svdiff residual r={RESIDUAL_RANK}"
        steps[name] = _step(spectral_layer(dense, rank=RESIDUAL_RANK), x)
        costs[name] = cost.residual(M, N, T, size, RESIDUAL_RANK, fold)
    for way in ("diag", "broadcast", "parametrize"):
        naive = nn.ModuleDict({"layer": twin(dense)})
        baselines.recompose(naive, {"layer": spectral}, way, baselines.master(dtype, device))
        name = {"diag": runner.NAIVE, "parametrize": runner.PARAMETRIZE, "broadcast": runner.BROADCAST}[way]
        steps[name] = _step(naive["layer"], x)
        count = cost.recomposed if way == "broadcast" else cost.svdiff_pytorch
        costs[name] = count(M, N, T, size, fold=fold)
    for rank in ranks if baselines.has_peft() else ():
        adapted = nn.ModuleDict({"layer": twin(dense)})
        baselines.add_lora(adapted, ["layer"], rank)
        steps[f"lora r={rank}"] = _step(adapted["layer"], x)
        costs[f"lora r={rank}"] = cost.lora(M, N, T, size, rank, fold)
    steps[runner.FROZEN] = _step(dense, x)
    costs[runner.FROZEN] = cost.frozen(M, N, T, size, fold)
    return steps, costs


def dense_layer(layer: registry.Layer, dtype: torch.dtype, device: str = "cpu") -> nn.Linear | nn.Conv2d:
    """A frozen layer of this shape with random weights."""
    dense = layer.module(dtype)
    weight = filled(tuple(dense.weight.shape), dense.weight[0].numel() ** -0.5, device).to(dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = nn.Parameter(torch.zeros(layer.M, dtype=dtype, device=device), requires_grad=False)
    return dense


def spectral_layer(dense: nn.Linear | nn.Conv2d, rank: int | None = None) -> SpectralLinear | SpectralConv2d:
    """Its spectral form, with random factors."""
    factors = RandomFactors().get(dense.weight)
    if isinstance(dense, nn.Linear):
        return SpectralLinear.from_module(dense, factors, rank=rank)
    return SpectralConv2d.from_module(dense, factors, rank=rank)


def _step(layer: nn.Module, x: torch.Tensor) -> runner.Step:
    """Forward and backward; what trains in the layer loses its gradient afterwards."""
    x = x.clone().requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        dy = torch.ones_like(layer(x))

    def step() -> None:
        layer(x).backward(dy)
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    return step
