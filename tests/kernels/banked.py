"""A small model with a bank, for the tests of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svdiff_kernels import Bank
from svdiff_kernels.mix import Weight
from svdiff_kernels.nn import SpectralConv2d, SpectralGroupNorm, SpectralLayerNorm, SpectralLinear, SpectralModule


class Net(nn.Module):
    """Every kind of layer: factored, residual, both norm modes; optionally checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SpectralConv2d.from_module(nn.Conv2d(5, 12, 3, padding=1))
        self.norm = SpectralGroupNorm.from_module(nn.GroupNorm(3, 12))
        self.linear = SpectralLinear.from_module(nn.Linear(12, 7), rank=3)
        self.last = SpectralLayerNorm.from_module(nn.LayerNorm(7), mode="scalar")
        self.use_reentrant: bool | None = None

    def layers(self) -> dict[str, SpectralModule]:
        return {n: m for n, m in self.named_modules() if isinstance(m, SpectralModule)}

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.linear(self.norm(self.conv(x)).flatten(2).transpose(1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def make() -> tuple[Net, Bank, Tensor, Tensor]:
    """A model with a bank, its input, and a direction for the loss."""
    net = Net()
    for layer in net.layers().values():
        nn.init.normal_(layer.delta, std=0.2)
    return net, Bank(net.layers(), net), torch.randn(2, 5, 9, 8), torch.randn(2, 72, 7)


def grads(bank: Bank) -> list[Tensor]:
    """The gradients of "default", which are cleared."""
    out = [p.grad.clone() for p in bank.trained]
    bank.zero_grad()
    return out


def add(bank: Bank, name: str) -> None:
    """Load an adapter of random shifts."""
    bank.load_delta_dict(name, {n: 0.3 * torch.randn_like(d) for n, d in bank.delta_dict("default").items()})


def alone(net: Net, bank: Bank, mix: dict[str, Weight], x: Tensor) -> Tensor:
    """What the model makes of x with this mix for all; the bank's own comes back."""
    with bank.mixed(mix):
        return net(x)
