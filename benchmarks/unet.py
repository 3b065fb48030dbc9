"""One training step of a UNet of Stable Diffusion 1.5's size: ours, svdiff-pytorch's arithmetic, LoRA, frozen.

A step is forward, backward and AdamW on what trains, with random weights. All contenders live in one process and share
the frozen weights and the factors, so that they can be interleaved on a machine of ordinary size.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import svdiff
import torch
from diffusers import UNet2DConditionModel
from svdiff.bench import BenchConfig
from torch import Tensor, nn

from svdiff_kernels import FactorCache, Factors

from . import baselines, runner

CONFIG = Path(__file__).parent / "configs" / "sd15_unet.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure, interleaved; the first timing is ours, to whose seconds the ratios refer."""
    dtype = DTYPES[bench.dtype]
    dense = random_unet(Path(bench.config or CONFIG), dtype)
    dense.requires_grad_(False)
    names = [name for name, m in dense.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    lora, spectral = twin(dense), twin(dense)
    lora_parameters = baselines.add_lora(lora, names, bench.lora_rank)
    adapter = svdiff.attach(spectral, one_dim=bench.one_dim, cache=RandomFactors())
    naive = twin(dense)
    naive_parameters = baselines.recompose(naive, {name: spectral.get_submodule(name) for name in names})
    inputs = Inputs.random(bench, dense.config.in_channels, dense.config.cross_attention_dim, dtype)
    steps = {
        "svdiff": training_step(spectral, [p for group in adapter.param_groups() for p in group["params"]], inputs),
        f"lora r={bench.lora_rank}": training_step(lora, lora_parameters, inputs),
        "svdiff-pytorch's arithmetic": training_step(naive, naive_parameters, inputs),
        "frozen (forward and dx)": training_step(dense, [], inputs),
    }
    timings = runner.interleave(steps, bench.rounds)
    if bench.output:
        settings = {
            "latents": bench.latents,
            "batch": bench.batch,
            "dtype": bench.dtype,
            "one_dim": bench.one_dim,
            "matrices": len(names),
        }
        runner.write_lines(Path(bench.output), timings, level="unet step", **settings)
    return timings


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


class RandomFactors(FactorCache):
    """Stands in for the cache: factors of the right shapes and magnitudes, since timing needs no decomposition."""

    def get(self, weight: Tensor, rank: int | None = None) -> Factors:
        rows, columns = weight.shape[0], weight[0].numel()
        r = min(rows, columns, rank or rows)
        sigma = torch.linspace(1.5, 0.1, r)
        return Factors(filled((rows, r), rows**-0.5), sigma, filled((r, columns), columns**-0.5))


def random_unet(config: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet with random weights, made without the minutes that the usual initialisation takes."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(json.loads(config.read_text()))
    model.to_empty(device="cpu")
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.data = filled(tuple(parameter.shape), parameter[0].numel() ** -0.5).to(dtype)
            else:
                parameter.data = torch.full_like(parameter.data, 1.0 if name == "weight" else 0.0, dtype=dtype)
    return model


def filled(shape: tuple[int, ...], std: float) -> Tensor:
    """Random numbers, repeated past the first million."""
    count = torch.Size(shape).numel()
    pool = torch.randn(min(count, 1_000_003), generator=torch.Generator().manual_seed(count)) * std
    return pool.repeat(-(-count // len(pool)))[:count].view(shape)


def twin(model: nn.Module) -> nn.Module:
    """A second model, with modules and parameters of its own, that shares the memory of the first one's weights."""
    return copy.deepcopy(
        model, {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    )
