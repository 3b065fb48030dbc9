"""What the factored form must never hold: the weight, its gradient, or the layer's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svdiff_kernels.nn import SpectralConv2d, SpectralEmbedding, SpectralLinear, SpectralModule

# Every dimension differs, so that a shape tells what a tensor is.
CASES: dict[str, tuple[Any, nn.Module, Tensor]] = {
    "linear": (SpectralLinear, nn.Linear(23, 29), torch.randn(3, 37, 23)),
    "linear many rows": (SpectralLinear, nn.Linear(29, 23), torch.randn(211, 29)),
    "conv": (SpectralConv2d, nn.Conv2d(7, 19, 3, padding=1), torch.randn(2, 7, 13, 17)),
    "conv few pixels": (SpectralConv2d, nn.Conv2d(7, 19, 3, padding=1), torch.randn(2, 7, 5, 6)),
    "conv channels last": (
        SpectralConv2d,
        nn.Conv2d(7, 19, 3, stride=2),
        torch.randn(2, 7, 33, 31).contiguous(memory_format=torch.channels_last),
    ),
    "embedding": (SpectralEmbedding, nn.Embedding(47, 11), torch.randint(0, 47, (3, 5))),
}


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.seen.add(t.numel())
        return out


def step(layer: SpectralModule, x: Tensor) -> None:
    if x.is_floating_point():
        x = x.to(layer.U.dtype, copy=True).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_no_tensor_of_the_weights_size(name: str, dtype: torch.dtype) -> None:
    kind, module, x = CASES[name]
    weight = module.weight.numel()
    layer = kind.from_module(module).to(dtype)
    with Sizes() as sizes:
        step(layer, x)
    assert sizes.seen and weight not in sizes.seen
    naive = kind.from_module(module, form="recomposed").to(dtype)
    with Sizes() as sizes:  # the test can fail
        step(naive, x)
    assert weight in sizes.seen


@pytest.mark.parametrize("name", CASES)
def test_backward_keeps_z_and_frozen_tensors_alone(name: str) -> None:
    kind, module, x = CASES[name]
    layer = kind.from_module(module)
    frozen = {t.untyped_storage().data_ptr() for t in (layer.U, layer.Vh, layer.sigma)}
    saved: list[Tensor] = []
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    rows = y.numel() // module.weight.shape[0] if kind is not SpectralEmbedding else x.numel()
    kept = [t for t in saved if t.untyped_storage().data_ptr() not in frozen and t.numel() > layer.rank]
    assert [t.numel() for t in kept] == [rows * layer.rank]
    assert x.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in saved}


def test_nothing_is_kept_where_nothing_trains() -> None:
    layer = SpectralLinear.from_module(nn.Linear(23, 29))
    layer.delta.requires_grad_(False)
    saved: list[Tensor] = []
    x = torch.randn(37, 23, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.numel() for t in saved} <= {layer.U.numel(), layer.Vh.numel(), layer.rank}


def test_residual_in_half_precision_never_holds_the_weight_in_fp32() -> None:
    layer = SpectralLinear.from_module(nn.Linear(23, 29), rank=5).bfloat16()
    wide: list[int] = []

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            wide.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.dtype == torch.float32)
            return out

    with Wide():
        step(layer, torch.randn(37, 23))
    assert wide and 23 * 29 not in wide
