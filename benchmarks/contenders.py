"""One UNet in every way that it can be trained: ours, naive recomposition, LoRA, frozen.

All share the memory of the frozen weights and of the factors, so that many fit into one process and can be interleaved.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import svdiff
import torch
from svdiff.bench import RIVALS, BenchConfig
from svdiff.targets import select
from torch import nn
from torch.utils._pytree import tree_map_only

from . import baselines, cost, registry, runner
from .models import RandomFactors, random_unet, twin

Inputs = dict[str, Any]
Trained = tuple[nn.Module, list[nn.Parameter]]


class Contenders:
    """Makes the models that a level compares.

    Args:
        bench: which UNet, in which dtype; LoRA's rank, and ours.
    """

    def __init__(self, bench: BenchConfig) -> None:
        self.bench = bench
        self.dtype = runner.DTYPES[bench.dtype]
        self.config = Path(bench.config) if bench.config else registry.CONFIGS / registry.MODELS[bench.model]
        self.dense = random_unet(self.config, self.dtype, bench.device).requires_grad_(False)
        self.names = [n for n, module in self.dense.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]

    @cached_property
    def _attached(self) -> tuple[nn.Module, svdiff.Adapter]:
        model = twin(self.dense)
        bench = self.bench
        return model, svdiff.attach(model, one_dim=bench.one_dim, rank=bench.rank, cache=RandomFactors())

    @property
    def spectral(self) -> nn.Module:
        """Our model."""
        return self._attached[0]

    def label(self, name: str) -> str:
        """What a contender is called in tables and result files."""
        rank = self.bench.lora_rank
        return {
            "lora": f"lora r={rank}",
            "lora-attention": f"lora r={rank}, attention only",
            "lora-compiled": f"lora r={rank}, torch.compile",
            "naive": runner.NAIVE,
            "broadcast": runner.BROADCAST,
            "parametrize": runner.PARAMETRIZE,
            "frozen": runner.FROZEN,
        }[name]

    def ours(self) -> Trained:
        """The spectral model and what trains in it."""
        model, adapter = self._attached
        return model, [p for group in adapter.param_groups() for p in group["params"]]

    def rival(self, name: str) -> Trained:
        """One of `RIVALS`: a model, and what trains in it."""
        if name == "frozen":
            return self.dense, []
        model: Any = twin(self.dense)
        if name.startswith("lora"):
            attention = [*select(self.dense, r"attn\d\.to_")]
            parameters = baselines.add_lora(
                model, attention if name == "lora-attention" else self.names, self.bench.lora_rank
            )
            if name == "lora-compiled":
                model.compile()
            return model, parameters
        layers = {name: self.spectral.get_submodule(name) for name in self.names}
        way: baselines.Way = "diag" if name == "naive" else name  # type: ignore[assignment]
        return model, baselines.recompose(model, layers, way, baselines.master(self.dtype, self.bench.device))

    def inputs(self) -> Inputs:
        """Arguments of the UNet for one batch: noisy latents, timesteps, text states, and what SDXL adds."""
        bench, config = self.bench, self.dense.config
        torch.manual_seed(0)
        batch, side = bench.batch, bench.latents
        inputs: Inputs = {
            "sample": torch.randn(batch, config.in_channels, side, side).to(self.dtype),
            "timestep": torch.randint(0, 1000, (batch,)),
            "encoder_hidden_states": torch.randn(batch, registry.TEXT_TOKENS, config.cross_attention_dim).to(
                self.dtype
            ),
        }
        if added := registry.added_conditions(config, batch):
            inputs["added_cond_kwargs"] = {key: value.to(self.dtype) for key, value in added.items()}
        return tree_map_only(torch.Tensor, lambda t: t.to(bench.device), inputs)

    def costs(self) -> dict[str, cost.Cost]:
        """By label, what the linear and conv layers of a step cost by count; the rest of the model is left out."""
        size, rank, lora = self.dtype.itemsize, self.bench.rank, self.bench.lora_rank
        names = [name for name in RIVALS if name not in ("lora-attention", "lora-compiled")]
        total = {label: cost.Cost(0, 0) for label in (runner.OURS, *map(self.label, names))}
        for layer, count in registry.layers(self.config, 8 * self.bench.latents).items():
            shape, fold = (layer.M, layer.N, layer.T * self.bench.batch, size), layer.fold
            full = rank is None or rank >= min(layer.M, layer.N)
            each = {
                "lora": cost.lora(*shape, lora, fold),
                "naive": cost.svdiff_pytorch(*shape, fold),
                "parametrize": cost.svdiff_pytorch(*shape, fold),
                "broadcast": cost.recomposed(*shape, fold=fold),
                "frozen": cost.frozen(*shape, fold),
            }
            ours = cost.factored(*shape, fold=fold) if full else cost.residual(*shape, rank or 0, fold)
            total[runner.OURS] += count * ours
            for name, one in each.items():
                total[self.label(name)] += count * one
        return total


def training_step(model: nn.Module, parameters: list[nn.Parameter], inputs: Inputs) -> runner.Step:
    """Forward, loss, backward, AdamW; without parameters the gradient goes to the input, as through a frozen model."""
    on_gpu = inputs["sample"].is_cuda  # where the step may be captured in a graph
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=on_gpu) if parameters else None

    def step() -> None:
        sample = inputs["sample"].clone().requires_grad_(optimizer is None)
        model(**{**inputs, "sample": sample}).sample.float().square().mean().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step
