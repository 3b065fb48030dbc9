"""The base of all spectral modules: of `nn`, whose weights are matrices, and of `norms`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .errors import SVDiffError
from .functional import spectral_gain

if TYPE_CHECKING:
    from .bank import Bank


class SpectralModule(nn.Module):
    """What all spectral layers share: the shift, and where its gain comes from.

    Attributes:
        sigma: buffer ``[r]``, at least fp32 whatever the module is cast to.
        delta: parameter ``[r]`` in sigma's dtype; once a `Bank` has adopted the layer, a view of the bank's vector.
        form: "factored", "residual" or "recomposed" (of a norm: "vector" or "scalar").
        one_dim: whether the weight is a vector; those learn at a rate of their own.
    """

    sigma: Tensor
    delta: Tensor
    bias: Any  # Tensor | None, which torch's layers, other bases of some subclasses, declare in other ways
    form: str
    one_dim: ClassVar[bool] = False

    def __init__(self, sigma: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # and not that of the torch layer which a subclass stands in for
        sigma = sigma.detach().to(torch.promote_types(sigma.dtype, torch.float32))
        self.register_buffer("sigma", sigma)
        self.delta = nn.Parameter(torch.zeros_like(sigma))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._bank: Bank | None = None
        self._bank_gain: Tensor | None = None

    @property
    def rank(self) -> int:
        """How many numbers are trained."""
        return self.sigma.shape[0]

    def shifted(self) -> Tensor:
        """``relu(sigma + delta)``, ``[r]`` (of a norm in vector mode ``sigma + delta``)."""
        gain = self.gain()
        return self.sigma + gain if self.form == "residual" else gain

    def gain(self) -> Tensor:
        """What the forward pass multiplies by: `shifted`, less sigma in the residual form."""
        if self._bank is None:
            return spectral_gain(self.sigma, self.delta, residual=self.form == "residual")
        return self._bank.gain_of(self)

    def gain_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, and the gain for it. An x that all samples share, such as the ids of positions, comes once for each.

        Raises:
            SVDiffError: samples have gains of their own, and do not split the first dimension of x evenly.
        """
        gain = self.gain()
        if gain.dim() == 2 and (x.dim() == 0 or x.shape[0] % len(gain)):
            if x.dim() == 0 or x.shape[0] != 1:
                first = f"a first dimension of {x.shape[0]}" if x.dim() else "a single number"
                raise SVDiffError(f"a mix for {len(gain)} inputs does not split {first} evenly")
            x = x.expand(len(gain), *x.shape[1:])
        return x, gain

    def one_gain(self) -> Tensor:
        """`gain`, where all samples must share it.

        Raises:
            SVDiffError: the bank's mix differs from sample to sample.
        """
        gain = self.gain()
        if gain.dim() == 2:
            raise SVDiffError("there is no one weight while samples have mixes of their own: set one mix for all")
        return gain

    def gain_terms(self) -> tuple[Tensor, Tensor]:
        """``(base, floor)`` with ``gain = max(base + delta, floor)``: how a bank computes it."""
        if self.form == "residual":
            return torch.zeros_like(self.sigma), -self.sigma
        return self.sigma, torch.zeros_like(self.sigma)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        delta = self._parameters.get("delta")
        kept = {id(t) for t in (self.sigma, delta, None if delta is None else delta.grad) if t is not None}
        return super()._apply(lambda t: keep_wide(fn, t) if id(t) in kept else fn(t), recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bank_gain": None}  # not a leaf: cannot be copied; the bank makes it again


def keep_wide(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``fn(tensor)``, except that a cast below fp32 only moves: half precision would eat small shifts."""
    out = fn(tensor)
    return out if out.dtype == tensor.dtype else tensor.to(out.device, torch.promote_types(out.dtype, torch.float32))
