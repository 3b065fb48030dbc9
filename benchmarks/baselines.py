"""What spectral layers are measured against, written by us from the published formulas.

- `recompose`: svdiff-pytorch's arithmetic, the weight rebuilt in every forward and autograd through it;
- `add_lora`: PEFT's LoRA on the same layers;
- a frozen dense model needs no code: it is the floor that every method shares.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdiff_kernels.nn import SpectralConv2d, SpectralLinear


class _Recomposed(nn.Module):
    """A layer with ``U @ diag(relu(S + delta)) @ Vh`` built in every forward; the factors are shared, not copied."""

    def __init__(self, layer: SpectralLinear | SpectralConv2d) -> None:
        super().__init__()
        self.U, self.S, self.Vh, self.bias = layer.U, layer.sigma, layer.Vh.flatten(1), layer.bias
        self.shape = (layer.U.shape[0], *layer.Vh.shape[1:])
        self.delta = nn.Parameter(torch.zeros_like(layer.sigma))

    def recomposed_weight(self) -> Tensor:
        scale = torch.diag(F.relu(self.S + self.delta)).to(self.U.dtype)
        return (self.U @ scale @ self.Vh).view(self.shape)


class RecomposedLinear(_Recomposed):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.recomposed_weight(), self.bias)


class RecomposedConv2d(_Recomposed):
    def __init__(self, layer: SpectralConv2d) -> None:
        super().__init__(layer)
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.recomposed_weight()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def recompose(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Replace in `model`, by name, the layers that `layers` holds in spectral form; returns what trains."""
    shifts = []
    for name, layer in layers.items():
        if isinstance(layer, SpectralLinear):
            naive: _Recomposed = RecomposedLinear(layer)
        elif isinstance(layer, SpectralConv2d):
            naive = RecomposedConv2d(layer)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, naive)
        shifts.append(naive.delta)
    return shifts


def add_lora(model: nn.Module, names: list[str], rank: int) -> list[nn.Parameter]:
    """Give the named linear and conv layers of `model` a PEFT LoRA of `rank`; returns what trains."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0), model)
    return [p for p in model.parameters() if p.requires_grad]
