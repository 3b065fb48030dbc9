"""Pretrain a small ViT on filled shapes, then teach it outlines: by a linear probe, by shifts, and by all weights.

    python examples/vit/fine_tune.py

It needs torch and svdiff_kernels alone, downloads nothing, and takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shapes import SHAPES, draw
from torch import Tensor, nn
from vit import ViT

from svdiff_kernels import Bank, FactorCache
from svdiff_kernels.nn import SpectralConv2d, SpectralLayerNorm, SpectralLinear

KINDS = {nn.Linear: SpectralLinear, nn.Conv2d: SpectralConv2d}

Data = tuple[Tensor, Tensor]


def make_spectral(model: nn.Module, cache: FactorCache) -> Bank:
    """Replace the layers of a model by spectral ones, freeze the rest, and put all shifts into one bank."""
    model.requires_grad_(False)
    plain = {name: module for name, module in model.named_modules() if type(module) in (*KINDS, nn.LayerNorm)}
    matrices = {name: module.weight for name, module in plain.items() if type(module) in KINDS}
    factors = cache.get_many(matrices)  # decomposed once, then read from disk
    layers = {}
    for name, module in plain.items():
        if kind := KINDS.get(type(module)):
            layers[name] = kind.from_module(module, factors[name])
        else:
            layers[name] = SpectralLayerNorm.from_module(module)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    return Bank(layers, root=model)


def train(model: Callable[[Tensor], Tensor], groups: Iterable[dict], data: Data, steps: int, seed: int) -> None:
    """AdamW with a cosine schedule; what is trained are the groups' parameters."""
    images, labels = data
    optimizer = torch.optim.AdamW(list(groups), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    images, labels = data
    right = [
        model(part).argmax(-1) == of_part for part, of_part in zip(images.split(250), labels.split(250), strict=True)
    ]
    return torch.cat(right).float().mean().item()


def save(tensors: dict[str, Tensor], path: Path) -> int:
    """Write a file, whole or not at all; its size in bytes."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial)
    os.replace(partial, path)
    return path.stat().st_size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each fine-tune")
    parser.add_argument("--pretrain_steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=1000, help="of outlines, to learn from")
    parser.add_argument("--seed", type=int, default=0, help="of weights, pictures and batches")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/vit"), help="for the files that are saved")
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    filled, outlined = draw(8000, generator, outlined=False), draw(options.pictures, generator, outlined=True)
    filled_test, outlined_test = draw(1000, generator, outlined=False), draw(1000, generator, outlined=True)

    base = ViT(len(SHAPES))
    train(base, [{"params": list(base.parameters()), "lr": 1e-3}], filled, options.pretrain_steps, options.seed)
    rows = [("base", base, 0, 0)]

    probe = copy.deepcopy(base).requires_grad_(False)
    probe.head.requires_grad_(True)
    with torch.no_grad():
        features = probe.features(outlined[0]), outlined[1]
    train(probe.head, [{"params": list(probe.head.parameters()), "lr": 1e-2}], features, options.steps, options.seed)
    size = save(probe.head.state_dict(), options.output_dir / "probe.safetensors")
    rows.append(("linear probe", probe, sum(p.numel() for p in probe.head.parameters()), size))

    shifted = copy.deepcopy(base)
    cache = FactorCache(options.output_dir / "factors")
    bank = make_spectral(shifted, cache)
    matrices, norms = bank.trained
    groups = [{"params": [matrices], "lr": 2e-2}, {"params": [norms], "lr": 2e-2}]
    train(shifted, groups, outlined, options.steps, options.seed)
    shifts = options.output_dir / "shifts.safetensors"
    size = save({f"{name}.delta": delta for name, delta in bank.delta_dict("default").items()}, shifts)
    rows.append(("shifts", shifted, matrices.numel() + norms.numel(), size))

    full = copy.deepcopy(base).requires_grad_(True)
    train(full, [{"params": list(full.parameters()), "lr": 5e-4}], outlined, options.steps, options.seed)
    size = save(full.state_dict(), options.output_dir / "full.safetensors")
    rows.append(("all weights", full, sum(p.numel() for p in full.parameters()), size))

    print(f"{'':14}{'outlines':>10}{'filled':>10}{'trained':>10}{'bytes':>12}")
    for name, model, trained, size in rows:
        scores = f"{accuracy(model, outlined_test):>10.1%}{accuracy(model, filled_test):>10.1%}"
        print(f"{name:14}{scores}{trained:>10,}{size:>12,}")

    # One model for both: the shifts from their file as an adapter, and a mix for each picture of a batch.
    again = copy.deepcopy(base)
    bank = make_spectral(again, cache)
    bank.load_delta_dict("outlines", {key.removesuffix(".delta"): delta for key, delta in load_file(shifts).items()})
    images, labels = (
        torch.cat([one[:250], other[:250]]) for one, other in zip(outlined_test, filled_test, strict=True)
    )
    bank.set_mix([{"outlines": 1.0}] * 250 + [{}] * 250)
    with torch.no_grad():
        right = (again(images).argmax(-1) == labels).float()
    shares = right.view(2, -1).mean(1)
    print(f"one batch, shifts for its first half: {shares[0]:.1%} of outlines, {shares[1]:.1%} of filled")


if __name__ == "__main__":
    main()
