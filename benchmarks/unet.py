"""One training step of a UNet of Stable Diffusion 1.5's size: ours, svdiff-pytorch's arithmetic, LoRA, frozen.

A step is forward, backward and AdamW on what trains, with random weights. All contenders live in one process and share
the frozen weights and the factors, so that they can be interleaved on a machine of ordinary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import svdiff
import torch
from svdiff.bench import BenchConfig
from torch import Tensor, nn

from . import baselines, cost, registry, runner
from .models import RandomFactors, random_unet, twin


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure, interleaved; the first timing is ours, to whose seconds the ratios refer."""
    dtype = runner.DTYPES[bench.dtype]
    config = Path(bench.config or registry.CONFIGS / registry.MODELS[bench.model])
    dense = random_unet(config, dtype)
    dense.requires_grad_(False)
    names = [name for name, m in dense.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    lora, spectral = twin(dense), twin(dense)
    lora_parameters = baselines.add_lora(lora, names, bench.lora_rank)
    adapter = svdiff.attach(spectral, one_dim=bench.one_dim, cache=RandomFactors())
    naive = twin(dense)
    naive_parameters = baselines.recompose(naive, {name: spectral.get_submodule(name) for name in names})
    inputs = Inputs.random(bench, dense.config.in_channels, dense.config.cross_attention_dim, dtype)
    steps = {
        runner.OURS: training_step(spectral, [p for group in adapter.param_groups() for p in group["params"]], inputs),
        f"lora r={bench.lora_rank}": training_step(lora, lora_parameters, inputs),
        runner.NAIVE: training_step(naive, naive_parameters, inputs),
        runner.FROZEN: training_step(dense, [], inputs),
    }
    timings = runner.interleave(steps, bench.rounds, subject=config.stem, costs=_costs(config, bench))
    if bench.output:
        settings = {
            "latents": bench.latents,
            "batch": bench.batch,
            "one_dim": bench.one_dim,
            "matrices": len(names),
        }
        runner.write_lines(Path(bench.output), timings, level="unet step", dtype=bench.dtype, **settings)
    return timings


def _costs(config: Path, bench: BenchConfig) -> dict[str, cost.Cost]:
    """What the linear and conv layers of a step cost by count; attention, norms and the optimiser are left out."""
    size = runner.DTYPES[bench.dtype].itemsize
    total = dict.fromkeys((runner.OURS, runner.NAIVE, runner.FROZEN, f"lora r={bench.lora_rank}"), cost.Cost(0, 0))
    for layer, count in registry.layers(config, 8 * bench.latents).items():
        shape = layer.M, layer.N, layer.T * bench.batch, size
        total[runner.OURS] += count * cost.factored(*shape)
        total[runner.NAIVE] += count * cost.svdiff_pytorch(*shape)
        total[runner.FROZEN] += count * cost.frozen(*shape)
        total[f"lora r={bench.lora_rank}"] += count * cost.lora(*shape, bench.lora_rank)
    return total


@dataclass
class Inputs:
    """One batch of noisy latents `[B, C, s, s]`, timesteps `[B]` and text states `[B, 77, D]`."""

    sample: Tensor
    timesteps: Tensor
    text: Tensor

    @classmethod
    def random(cls, bench: BenchConfig, channels: int, width: int, dtype: torch.dtype) -> Inputs:
        torch.manual_seed(0)
        sample = torch.randn(bench.batch, channels, bench.latents, bench.latents)
        return cls(
            sample.to(dtype), torch.randint(0, 1000, (bench.batch,)), torch.randn(bench.batch, 77, width).to(dtype)
        )


def training_step(model: nn.Module, parameters: list[nn.Parameter], inputs: Inputs) -> runner.Step:
    """Forward, loss, backward, AdamW; without parameters the gradient goes to the input, as through a frozen model."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step() -> None:
        sample = inputs.sample.clone().requires_grad_(optimizer is None)
        model(sample, inputs.timesteps, inputs.text).sample.float().square().mean().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
