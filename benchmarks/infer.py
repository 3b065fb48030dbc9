"""One forward pass of a UNet for a batch in which samples want different fine-tunes.

Ours reads a mix per sample; the rivals are PEFT's mixed batch (`adapter_names`), weights rebuilt for one delta after
the other, and one dense batch of the base, which is the floor.
"""

from __future__ import annotations

from typing import Any

import torch
from svdiff.bench import BenchConfig
from torch import nn

from . import baselines, cost, registry, runner
from .contenders import Contenders, Inputs
from .models import twin

COUNTS = (8, 1, 4, 16)
"""How many deltas act in a batch; with more than the batch has samples, each sample mixes several."""

PEFT_MIXED, REBUILT = "lora r={}, mixed batch", "weights rebuilt per sample"


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure, interleaved; the first timing is ours with 8 deltas."""
    contenders = Contenders(bench)
    inputs = contenders.inputs()
    steps: dict[str, runner.Step] = {}
    with torch.no_grad():
        bank: Any = contenders.spectral.get_submodule("spectral_bank")
        for i in range(max(COUNTS)):
            deltas = {name: 0.01 * torch.randn_like(d) for name, d in bank.delta_dict("default").items()}
            bank.load_delta_dict(f"a{i}", deltas)
    for count in COUNTS:
        steps[ours(count)] = _mixed(contenders.spectral, bank, mixes(count, bench.batch), inputs)
    steps[runner.DENSE] = _forward(contenders.dense, inputs)
    if baselines.has_peft():
        steps[PEFT_MIXED.format(bench.lora_rank)] = _peft(contenders, inputs)
    steps[REBUILT] = _rebuilt(contenders, inputs)
    subject, costs = contenders.config.stem, _costs(contenders)
    return runner.interleave(steps, bench.rounds, subject=subject, costs=costs, device=bench.device)


def ours(count: int) -> str:
    """Our name with so many deltas."""
    return f"{runner.OURS}, {count} delta{'s' if count > 1 else ''}"


def mixes(count: int, batch: int) -> list[dict[str, float]]:
    """A mixture for each sample, so that `count` deltas act in all: shared between samples, or several in one."""
    if count <= batch:
        return [{f"a{i * count // batch}": 1.0} for i in range(batch)]
    each = count // batch
    return [{f"a{i * each + j}": 1 / each for j in range(each)} for i in range(batch)]


def _forward(model: nn.Module, inputs: Inputs) -> runner.Step:
    @torch.no_grad()
    def step() -> None:
        model(**inputs)

    return step


def _mixed(model: nn.Module, bank: Any, rows: list[dict[str, float]], inputs: Inputs) -> runner.Step:
    @torch.no_grad()
    def step() -> None:
        bank.set_mix(rows[0] if all(row == rows[0] for row in rows) else rows)
        model(**inputs)

    return step


def _peft(contenders: Contenders, inputs: Inputs) -> runner.Step:
    from peft import LoraConfig, get_peft_model

    batch, rank = contenders.bench.batch, contenders.bench.lora_rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=contenders.names)
    model: Any = get_peft_model(twin(contenders.dense), config, adapter_name="a0")
    for i in range(1, batch):
        model.add_adapter(f"a{i}", config)
    model.eval()
    return _forward(model, {**inputs, "adapter_names": [f"a{i}" for i in range(batch)]})


def _rebuilt(contenders: Contenders, inputs: Inputs) -> runner.Step:
    model, _ = contenders.rival("broadcast")
    batch = contenders.bench.batch

    def sample(i: int) -> Inputs:
        def part(t: Any) -> Any:
            return {k: part(v) for k, v in t.items()} if isinstance(t, dict) else t[i : i + 1]

        return {key: part(value) for key, value in inputs.items()}

    parts = [sample(i) for i in range(batch)]

    @torch.no_grad()
    def step() -> None:
        for inputs_of_one in parts:
            model(**inputs_of_one)

    return step


def _costs(contenders: Contenders) -> dict[str, cost.Cost]:
    size, batch = contenders.dtype.itemsize, contenders.bench.batch
    spectral = dense = cost.Cost(0, 0)
    for layer, count in registry.layers(contenders.config, 8 * contenders.bench.latents).items():
        shape = layer.M, layer.N, layer.T * batch
        dense += count * cost.frozen_products(*shape, layer.fold)[0].cost(size)
        spectral += count * cost.total(cost.factored_products(*shape, fold=layer.fold)[:2], size)
    return {runner.DENSE: dense} | {ours(n): spectral for n in COUNTS}
