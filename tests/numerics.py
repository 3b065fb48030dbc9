"""The one table of tolerances, and the truth that everything is measured against: fp64 recomposition by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from svdiff_kernels import Factors, decompose, spectral_conv2d, spectral_embedding, spectral_linear

# Relative error (in the 2-norm) against fp64, of y, dx and d_delta.
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}

# In half precision: at most this many times the error of plain torch's dense layer in the same dtype.
HALF_FACTOR = 2.0
HALF = (torch.bfloat16, torch.float16)

# Shift error: of the shift that really acts along each singular direction, at delta = 1e-3 sigma.
# Noise: the relative error of y at delta = 0.
SHIFT_ERROR = {
    ("factored", torch.float32): 1e-4,
    ("factored", torch.bfloat16): 0.26,
    ("factored", torch.float16): 0.02,
    ("factors in fp16", torch.bfloat16): 0.028,
    ("residual", torch.float32): 1e-4,
    ("residual", torch.bfloat16): 0.025,
    ("residual", torch.float16): 0.005,
}
NOISE = {
    ("factored", torch.float32): 1e-5,
    ("factored", torch.bfloat16): 0.0041,
    ("factored", torch.float16): 0.00051,
    ("factors in fp16", torch.bfloat16): 0.00174,  # 0.0017 in two digits
    ("residual", torch.float32): 1e-5,
    ("residual", torch.bfloat16): 0.0029,
    ("residual", torch.float16): 0.00036,
}

# A decomposition in fp32, judged in fp64: |U diag(sigma) Vh - W| / |W|; U.T U - 1 and Vh Vh.T - 1, elementwise; sigma
# against the largest. And how much more a truncated one may leave over than the best of its rank.
SVD_RECONSTRUCTION, SVD_ORTHONORMALITY, SVD_SIGMA = 1e-6, 1e-5, 1e-6
SVD_TRUNCATION = 1.01
# The same in fp64, all three.
SVD_FP64 = 1e-9
# |U diag(sigma) Vh - W| / |W| of exact factors rounded to fp32 stays below this; no solver can be asked for less.
SVD_FLOOR = 2.0**-23


def relative(actual: Tensor, truth: Tensor) -> float:
    """``|actual - truth| / |truth|`` in the 2-norm; what must be zero counts absolutely."""
    difference = torch.linalg.vector_norm(actual.double() - truth.double()).item()
    size = torch.linalg.vector_norm(truth.double()).item()
    return difference / size if size > 0 else difference


@dataclass
class Layer:
    """A layer of some kind with random weight, input, shift and output gradient, all in fp64 until asked."""

    kind: str
    weight: Tensor
    x: Tensor
    bias: Tensor | None = None
    rank: int | None = None
    samples: int | None = None
    geometry: dict[str, object] = field(default_factory=dict)
    channels_last: bool = False

    def __post_init__(self) -> None:
        self.factors: Factors = decompose(self.weight, self.rank, dtype=torch.float64)
        shape = (self.factors.rank,) if self.samples is None else (self.samples, self.factors.rank)
        # Both ways, and far enough that some directions are cut off by the ReLU.
        self.delta = self.factors.sigma * torch.randn(shape, dtype=torch.float64) * 0.7
        self.delta[..., 0] = -self.factors.sigma[0]  # exactly at the kink
        self.dy = torch.randn(self.plain(self.x, self.weight, self.bias).shape, dtype=torch.float64)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """torch's own layer."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        if self.kind == "conv":
            return F.conv2d(x, weight, bias, **self.geometry)
        return F.embedding(x, weight)

    def recomposed(self, x: Tensor, delta: Tensor, dtype: torch.dtype, *, residual: bool) -> Tensor:
        """The naive layer: the shifted weight rebuilt in dtype, then plain torch."""
        U, sigma, Vh = (t.to(dtype) for t in (self.factors.U, self.factors.sigma, self.factors.Vh))
        bias = None if self.bias is None else self.bias.to(dtype)
        rows = delta[None] if delta.dim() == 1 else delta
        parts = []
        for part, d in zip(x.chunk(len(rows)), rows, strict=True):
            scale = torch.relu(sigma + d.to(dtype))
            weight = (U * (scale - sigma if residual else scale)) @ Vh
            weight = weight.view(self.weight.shape) + (self.weight.to(dtype) if residual else 0)
            parts.append(self.plain(part, weight, bias))
        return torch.cat(parts)

    def spectral(self, x: Tensor, delta: Tensor, dtype: torch.dtype, *, residual: bool) -> Tensor:
        """Ours."""
        U, Vh, sigma = self.factors.U.to(dtype), self.factors.Vh.to(dtype), self.factors.sigma.to(delta.dtype)
        weight = self.weight.to(dtype) if residual else None
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.kind == "linear":
            return spectral_linear(x, U, sigma, Vh, delta, bias, weight=weight)
        if self.kind == "embedding":
            return spectral_embedding(x, U, sigma, Vh, delta, weight=weight)
        Vh = Vh.unflatten(1, self.weight.shape[1:])
        return spectral_conv2d(x, U, sigma, Vh, delta, bias, weight=weight, **self.geometry)

    def run(
        self, way: Callable[..., Tensor], dtype: torch.dtype, delta_dtype: torch.dtype, *, residual: bool
    ) -> dict[str, Tensor]:
        """y and gradients of one way of computing the layer."""
        delta = self.delta.to(delta_dtype, copy=True).requires_grad_()
        x = self.x
        if self.kind != "embedding":
            x = x.to(dtype, copy=True)
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            x.requires_grad_()
        y = way(x, delta, dtype, residual=residual)
        y.backward(self.dy.to(y.dtype))
        out = {"y": y.detach(), "d_delta": delta.grad}
        return out if self.kind == "embedding" else out | {"dx": x.grad}

    def truth(self, *, residual: bool) -> dict[str, Tensor]:
        """The fp64 recomposition through autograd."""
        return self.run(self.recomposed, torch.float64, torch.float64, residual=residual)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


LAYERS: dict[str, Callable[[], Layer]] = {
    "linear": lambda: Layer("linear", _normal(29, 23), _normal(37, 23), _normal(29)),
    "linear tokens": lambda: Layer("linear", _normal(17, 31), _normal(3, 13, 31)),
    "linear truncated": lambda: Layer("linear", _normal(29, 23), _normal(5, 7, 23), _normal(29), rank=11),
    "linear one row": lambda: Layer("linear", _normal(19, 7), _normal(1, 7), _normal(19)),
    "linear per sample": lambda: Layer("linear", _normal(29, 23), _normal(6, 5, 23), _normal(29), samples=3),
    "conv": lambda: Layer("conv", _normal(13, 5, 3, 3), _normal(2, 5, 17, 11), _normal(13), geometry={"padding": 1}),
    "conv one image": lambda: Layer("conv", _normal(7, 5, 3, 3), _normal(1, 5, 17, 11), geometry={"padding": 1}),
    "conv 1x1": lambda: Layer("conv", _normal(13, 19, 1, 1), _normal(3, 19, 9, 7), _normal(13)),
    "conv few pixels": lambda: Layer(
        "conv", _normal(13, 5, 3, 3), _normal(2, 5, 7, 6), _normal(13), geometry={"padding": 1}
    ),
    "conv strided": lambda: Layer(
        "conv", _normal(11, 5, 3, 2), _normal(2, 5, 23, 18), geometry={"stride": (2, 3), "padding": (1, 0)}
    ),
    "conv dilated": lambda: Layer(
        "conv", _normal(11, 6, 3, 3), _normal(1, 6, 19, 16), geometry={"dilation": (2, 1), "padding": 2}
    ),
    "conv same": lambda: Layer("conv", _normal(9, 4, 4, 3), _normal(3, 4, 8, 10), geometry={"padding": "same"}),
    "conv valid": lambda: Layer("conv", _normal(9, 4, 2, 3), _normal(3, 4, 8, 10), geometry={"padding": "valid"}),
    "conv channels last": lambda: Layer(
        "conv", _normal(13, 5, 3, 3), _normal(2, 5, 12, 11), geometry={"padding": 1}, channels_last=True
    ),
    "conv truncated": lambda: Layer(
        "conv", _normal(13, 5, 3, 3), _normal(2, 5, 9, 11), _normal(13), rank=6, geometry={"stride": 2}
    ),
    "conv grouped": lambda: Layer(
        "conv", _normal(12, 3, 3, 3), _normal(2, 9, 10, 7), _normal(12), geometry={"groups": 3, "padding": 1}
    ),
    "conv per sample": lambda: Layer(
        "conv", _normal(13, 5, 3, 3), _normal(4, 5, 12, 11), _normal(13), samples=2, geometry={"padding": 1}
    ),
    "conv grouped per sample": lambda: Layer(
        "conv", _normal(6, 2, 3, 3), _normal(4, 4, 5, 7), samples=2, geometry={"groups": 2}
    ),
    "embedding": lambda: Layer("embedding", _normal(31, 11), torch.randint(0, 31, (3, 7))),
    "embedding truncated": lambda: Layer("embedding", _normal(31, 11), torch.randint(0, 31, (9,)), rank=5),
    "embedding per sample": lambda: Layer("embedding", _normal(31, 11), torch.randint(0, 31, (4, 7)), samples=2),
}
