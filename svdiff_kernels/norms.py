"""Norms as spectral modules: their weights are vectors, which shift as they are or as a matrix of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import SVDiffError
from .module import SpectralModule


class _SpectralVector(SpectralModule):
    """A norm's weight ``w [n]``: ``w + delta`` ("vector"), or ``relu(||w|| + delta) w / ||w||`` ("scalar").

    The scalar mode is the SVD of w as a matrix of one row, as in svdiff-pytorch.
    """

    direction: Tensor | None
    dtype: torch.dtype
    one_dim: ClassVar[bool] = True

    def __init__(self, weight: Tensor | None, bias: Tensor | None, mode: str) -> None:
        if weight is None:
            raise SVDiffError("a norm without a weight (affine=False) has nothing to shift")
        if not torch.isfinite(weight).all():
            raise SVDiffError(f"cannot shift a norm weight of shape {tuple(weight.shape)}: it holds NaN or inf")
        if mode not in ("vector", "scalar"):
            raise SVDiffError(f"mode {mode!r} of a norm is not one of vector, scalar")
        w = weight.detach().flatten().to(torch.promote_types(weight.dtype, torch.float32))
        length = torch.linalg.vector_norm(w)[None]
        super().__init__(w.clone() if mode == "vector" else length, bias)
        self.form = mode
        self.register_buffer("direction", w / length.clamp_min(1e-30) if mode == "scalar" else None)
        self.dtype, self._weight_shape = weight.dtype, weight.shape

    def gain(self) -> Tensor:
        """`shifted`."""
        if self._bank is None and self.form == "vector":
            return self.sigma + self.delta
        return super().gain()

    def gain_terms(self) -> tuple[Tensor, Tensor]:
        """See `SpectralModule.gain_terms`."""
        if self.form == "vector":
            return self.sigma, torch.full_like(self.sigma, -torch.inf)
        return super().gain_terms()

    def _shifted(self, gain: Tensor) -> Tensor:
        """The weight, at least in fp32: rounded to half precision it would lose its small shift."""
        return gain if self.direction is None else gain * self.direction

    def _affine(self, normed: Callable[[Tensor, Tensor | None, Tensor | None], Tensor], x: Tensor, dim: int) -> Tensor:
        """``normed(x, weight, bias)`` in fp32; the weight, one per sample if they differ, runs along x's dim."""
        x, gain = self.gain_for(x)
        weight = self._shifted(gain)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        wide = x.to(weight.dtype)
        if weight.dim() == 1:
            return normed(wide, weight.view(self._weight_shape), bias).to(x.dtype)
        samples, y = len(weight), normed(wide, None, None)
        tail = [1] * (y.dim() - dim - len(self._weight_shape))
        of_weight = [1] * (dim - 1) + [*self._weight_shape, *tail]
        y = y * weight.repeat_interleave(y.shape[0] // samples, 0).view(-1, *of_weight)
        return (y if bias is None else y + bias.view(*of_weight)).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """The shifted weight, in the dtype of the model."""
        return self._shifted(self.one_gain()).view(self._weight_shape).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.sigma.device)).dtype
        return super()._apply(fn, recurse)

    def _merge_into(self, plain: nn.Module, base: Tensor | None) -> Any:
        weight = self.weight
        if base is not None and self.direction is not None:  # whose product with sigma is not the original to the bit
            shift = (self.one_gain() - self.sigma) * self.direction
            weight = (base + shift.view(self._weight_shape)).to(self.dtype)
        plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return plain.train(self.training)


class SpectralLayerNorm(_SpectralVector, nn.LayerNorm):  # type: ignore[misc]
    """Stands in for `nn.LayerNorm`; only its weight moves."""

    def __init__(self, module: nn.LayerNorm, mode: str) -> None:
        super().__init__(module.weight, module.bias, mode)
        self.normalized_shape, self.eps = module.normalized_shape, module.eps
        self.elementwise_affine = True

    @classmethod
    def from_module(cls, module: nn.LayerNorm, mode: str = "vector") -> SpectralLayerNorm:
        """The spectral version of a layer norm; mode is "vector" (one number each) or "scalar" (one in all)."""
        return cls(module, mode)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        shape, eps = self.normalized_shape, self.eps
        return self._affine(lambda x, w, b: F.layer_norm(x, shape, w, b, eps), x, x.dim() - len(shape))

    def merge(self, base: Tensor | None = None) -> nn.LayerNorm:
        """A plain layer norm with the shifted weight; base as in `nn`'s layers."""
        plain = nn.LayerNorm(self.normalized_shape, self.eps, bias=self.bias is not None, device="meta")
        return self._merge_into(plain, base)


class SpectralGroupNorm(_SpectralVector, nn.GroupNorm):  # type: ignore[misc]
    """Stands in for `nn.GroupNorm`; only its weight moves."""

    def __init__(self, module: nn.GroupNorm, mode: str) -> None:
        super().__init__(module.weight, module.bias, mode)
        self.num_groups, self.num_channels, self.eps = module.num_groups, module.num_channels, module.eps
        self.affine = True

    @classmethod
    def from_module(cls, module: nn.GroupNorm, mode: str = "vector") -> SpectralGroupNorm:
        """The spectral version of a group norm; mode is "vector" (one number each) or "scalar" (one in all)."""
        return cls(module, mode)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        return self._affine(lambda x, w, b: F.group_norm(x, self.num_groups, w, b, self.eps), x, 1)

    def merge(self, base: Tensor | None = None) -> nn.GroupNorm:
        """A plain group norm with the shifted weight; base as in `nn`'s layers."""
        return self._merge_into(nn.GroupNorm(self.num_groups, self.num_channels, self.eps, device="meta"), base)
