"""What shifts change in the weights of a model, layer by layer; and how much of that another form of it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdiff_kernels.functional import spectral_gain

from .adapter import Adapter
from .progress import arithmetic_bar


@dataclass(frozen=True)
class Change:
    """What shifts do to one weight: ``dW = U diag(dsigma) Vh``, or to that of a norm ``dw``.

    Attributes:
        role: of the model in its pipeline.
        path: of the module.
        layer: the spectral layer.
        dsigma: ``[r]`` in fp32: ``relu(sigma + delta) - sigma``; of a norm in vector mode the shift itself.
    """

    role: str
    path: str
    layer: Any
    dsigma: Tensor

    @property
    def norm(self) -> float:
        """Of dW, by Frobenius: U and Vh are orthonormal."""
        return float(torch.linalg.vector_norm(self.dsigma.double()))

    def weight(self) -> Tensor:
        """dW as a matrix ``[M, N]``, of a norm ``[n]``, in fp32."""
        if self.layer.one_dim:
            return self.dsigma if self.layer.direction is None else self.dsigma * self.layer.direction
        factors = self.layer.factors()
        return (factors.U.float() * self.dsigma) @ factors.Vh.float()


@dataclass(frozen=True)
class Fidelity:
    """How far another form of a change is from it.

    Attributes:
        error: ``|dW of the other - dW| / |dW|`` over all layers, in the Frobenius norm.
        worst_layer: the layer with the largest error of its own.
        worst_error: that error.
        left_out: how many layers that change have no place in the other form.
        left_out_error: the error that comes of these alone.
    """

    error: float
    worst_layer: str
    worst_error: float
    left_out: int
    left_out_error: float

    def __str__(self) -> str:
        told = f"{self.error:.2e} of the change is lost"
        if self.worst_error:
            told += f", most in {self.worst_layer} ({self.worst_error:.2e})"
        if self.left_out:
            told += f"; {self.left_out} layers, {self.left_out_error:.2e} of the change, have no place in this format"
        return told


def changes_of(adapter: Adapter, weight: float = 1.0) -> list[Change]:
    """What the adapter "default" changes, at a weight: all layers, moved or not."""
    found = []
    for part in adapter.parts:
        for path, delta in part.bank.delta_dict("default").items():
            layer, delta = part.layers[path], weight * delta.cpu()
            exact = layer.one_dim and layer.form == "vector"  # of which nothing is clamped
            dsigma = delta if exact else spectral_gain(layer.sigma.cpu(), delta, residual=True)
            found.append(Change(part.role, path, layer, dsigma.float()))
    return found


def compare(changes: Sequence[Change], other: Callable[[Change], Tensor | None]) -> Fidelity:
    """How exact another form is.

    Args:
        changes: what is wanted.
        other: of each change what the other form makes of it, in the shape of `Change.weight`; None if it leaves the
            layer as it was.
    """
    moved = [change for change in changes if change.norm]
    errors: dict[str, float] = {}
    left_out: list[float] = []
    sizes = [1 if c.layer.one_dim else c.dsigma.numel() * c.layer.weight.numel() for c in moved]
    with arithmetic_bar(sum(sizes), "Comparing", delay=3) as bar:
        for change, size in zip(moved, sizes, strict=True):
            made = other(change)
            if made is None:
                left_out.append(change.norm)
            name = f"{change.role} {change.path}"
            errors[name] = change.norm if made is None else float(torch.linalg.vector_norm(made - change.weight()))
            bar.advance(size)
    total = _norm(change.norm for change in moved) or 1.0
    own = {f"{c.role} {c.path}": errors[f"{c.role} {c.path}"] / c.norm for c in moved}
    worst = max(own, key=lambda name: own[name], default="")
    return Fidelity(_norm(errors.values()) / total, worst, own.get(worst, 0.0), len(left_out), _norm(left_out) / total)


def _norm(parts: Iterable[float]) -> float:
    return math.sqrt(sum(part**2 for part in parts))
