"""What spectral layers are measured against, written by us from the published formulas.

- `recompose`: the weight rebuilt in every forward and autograd through it, in the three ways found in the wild;
- `add_lora`: PEFT's LoRA on the same layers;
- a frozen dense model needs no code: it is the floor that every method shares.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from svdiff_kernels.nn import SpectralConv2d, SpectralLinear

Way = Literal["diag", "broadcast", "parametrize"]
"""How a weight is rebuilt:

- diag: svdiff-pytorch's ``U @ diag(scale) @ Vh``, which keeps the weight beside its factors;
- broadcast: the same with the columns of U scaled, which spares a product, and without the weight;
- parametrize: the first as a parametrization of the weight, as in the snippet of the method's author.
"""


def has_peft() -> bool:
    """Whether this machine can have LoRA as a rival."""
    return importlib.util.find_spec("peft") is not None


def master(dtype: torch.dtype, device: str) -> torch.dtype | None:
    """In what existing code keeps its factors: on a GPU it trains in half precision under autocast, from fp32."""
    return torch.float32 if device == "cuda" and dtype.itemsize < 4 else None


class Recomposition(nn.Module):
    """``relu(S + delta)`` between U and Vh.

    Args:
        layer: whose factors to use, shared, not copied.
        way: see `Way`.
        kept: keep the factors in this type instead, and multiply under autocast to the layer's.
    """

    def __init__(self, layer: SpectralLinear | SpectralConv2d, way: Way, kept: torch.dtype | None = None) -> None:
        super().__init__()
        kept_in = kept or layer.U.dtype
        self.U, self.S, self.Vh, self.way = layer.U.to(kept_in), layer.sigma, layer.Vh.flatten(1).to(kept_in), way
        mixed = torch.autocast(layer.U.device.type, layer.U.dtype, cache_enabled=False) if kept else nullcontext()
        self.mixed: AbstractContextManager[object] = mixed
        self.shape = (layer.U.shape[0], *layer.Vh.shape[1:])
        self.delta = nn.Parameter(torch.zeros_like(layer.sigma))

    def forward(self, original: Tensor | None = None) -> Tensor:
        """The weight; what it was is given by `parametrize` and not needed."""
        scale = F.relu(self.S + self.delta).to(self.U.dtype)
        with self.mixed:
            scaled = self.U * scale if self.way == "broadcast" else self.U @ torch.diag(scale)
            return (scaled @ self.Vh).view(self.shape)


class RecomposedLinear(nn.Module):
    def __init__(self, layer: SpectralLinear, way: Way, kept: torch.dtype | None) -> None:
        super().__init__()
        self.recomposition, self.bias = Recomposition(layer, way, kept), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.recomposition(), self.bias)


class RecomposedConv2d(nn.Module):
    def __init__(self, layer: SpectralConv2d, way: Way, kept: torch.dtype | None) -> None:
        super().__init__()
        self.recomposition, self.bias = Recomposition(layer, way, kept), layer.bias
        self.geometry = layer.stride, layer.padding, layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.recomposition(), self.bias, *self.geometry)


def recompose(
    model: nn.Module, layers: Mapping[str, nn.Module], way: Way = "diag", kept: torch.dtype | None = None
) -> list[nn.Parameter]:
    """Replace in `model`, by name, the layers that `layers` holds in spectral form; returns what trains.

    The type `kept` is that of `Recomposition`.
    """
    shifts = []
    for name, layer in layers.items():
        if not isinstance(layer, SpectralLinear | SpectralConv2d):
            continue
        if way == "parametrize":
            recomposition = Recomposition(layer, way, kept)
            parametrize.register_parametrization(model.get_submodule(name), "weight", recomposition, unsafe=True)
            shifts.append(recomposition.delta)
            continue
        make = RecomposedLinear if isinstance(layer, SpectralLinear) else RecomposedConv2d
        naive: Any = make(layer, way, kept)  # type: ignore[arg-type]
        if way == "diag":
            naive.weight = model.get_submodule(name).weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, naive)
        shifts.append(naive.recomposition.delta)
    return shifts


def add_lora(model: nn.Module, names: list[str], rank: int) -> list[nn.Parameter]:
    """Give the named linear and conv layers of `model` a PEFT LoRA of `rank`; returns what trains."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0), model)
    return [p for p in model.parameters() if p.requires_grad]
