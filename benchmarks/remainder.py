"""What a UNet's step does besides its linear and conv layers, by count: attention, norms, and all that is element-wise.

The UNet runs forward and backward on the meta device, where every operation that reaches torch's dispatcher is written
down. Attention is taken as one fused kernel forward and three backward, which keep no scores: two products forward, and
five backward. Any other operation that makes a tensor is one kernel, which reads its inputs and writes its outputs
once, as in eager mode; a compiler would fuse many.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import registry

_ELSEWHERE = {"mm", "addmm", "convolution", "convolution_backward"}  # the layers: `cost` counts them
_NO_KERNEL = {"_unsafe_view", "empty_like"}


@dataclass(frozen=True)
class Remainder:
    """Of one picture.

    Attributes:
        flop: operations of attention.
        numbers: read and written by everything, to be multiplied by the size of a type and the batch.
        kernels: launched, whatever the batch.
    """

    flop: float = 0.0
    numbers: float = 0.0
    kernels: int = 0

    def plus(self, numbers: float, flop: float = 0.0, kernels: int = 1) -> Remainder:
        return Remainder(self.flop + flop, self.numbers + numbers, self.kernels + kernels)


@cache
def remainder(model: str, pixels: int) -> tuple[Remainder, Remainder]:
    """Of a forward pass alone, and of a step: forward and backward to the input."""
    config = json.loads((registry.CONFIGS / registry.MODELS[model]).read_text())
    with torch.device("meta"):
        network, inputs = registry.network_of(config, pixels)
    network.requires_grad_(False)
    inputs["sample"].requires_grad_()
    ledger = _Ledger()
    with ledger, _FusedAttention(ledger):
        y = network(**inputs).sample
        forward = replace(ledger.count)
        y.backward(torch.empty_like(y))
    return forward, ledger.count


class _Ledger(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = Remainder()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        is_view = any(result.alias_info is not None for result in function._schema.returns)
        if not is_view and function.overloadpacket.__name__ not in _ELSEWHERE | _NO_KERNEL:
            self.count = self.count.plus(_numbers(args, kwargs, out))
        return out


class _FusedAttention(TorchFunctionMode):
    """Sends attention to `_Attention`: on the meta device torch would take it apart."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], self._ledger)
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ledger: _Ledger) -> Tensor:
        ctx.ledger, ctx.numbers = ledger, 2 * _numbers(q, k, v, q)
        ctx.scores = 2.0 * q.numel() * k.shape[-2]  # operations of Q K^T
        ledger.count = ledger.count.plus(_numbers(q, k, v, q), 2 * ctx.scores)
        ctx.shapes = q, k, v
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        ctx.ledger.count = ctx.ledger.count.plus(ctx.numbers, 5 * ctx.scores, kernels=3)
        wanted = zip(ctx.shapes, ctx.needs_input_grad, strict=False)
        return *(torch.empty_like(t) if needed else None for t, needed in wanted), None


def _numbers(*trees: Any) -> float:
    return float(sum(t.numel() for t in tree_leaves(trees) if isinstance(t, Tensor)))
