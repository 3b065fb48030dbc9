"""Spectral layers with svdiff-pytorch's handles: ``delta`` of their own, ``scale``, ``set_scale``, ``perform_svd``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from svdiff_kernels.functional import spectral_gain
from svdiff_kernels.module import SpectralModule
from svdiff_kernels.nn import (
    SpectralConv2d,
    SpectralEmbedding,
    SpectralGroupNorm,
    SpectralLayerNorm,
    SpectralLinear,
)


class SVDLayer(SpectralModule):
    """What they share: ``relu(sigma + scale * delta)``, with a parameter ``delta`` ``[r]`` of the layer's own, in fp32.

    Attributes:
        scale: how much of the shift acts; 1 until `set_scale`.
    """

    scale: float = 1.0

    def set_scale(self, scale: float) -> None:
        """Let so much of the shift act."""
        self.scale = scale

    def perform_svd(self) -> None:
        """Nothing: the layer was made of a decomposition. Scripts call it once a model is loaded."""

    def gain(self) -> Tensor:
        """``relu(sigma + scale * delta)``."""
        return spectral_gain(self.sigma, self.scale * self.delta)


class SVDLinear(SVDLayer, SpectralLinear):  # type: ignore[override]
    """Stands in for `nn.Linear`."""


class SVDConv2d(SVDLayer, SpectralConv2d):  # type: ignore[override]
    """Stands in for `nn.Conv2d`; the kernel is a matrix ``[C_out, C_in * kh * kw]``."""


class SVDEmbedding(SVDLayer, SpectralEmbedding):  # type: ignore[override]
    """Stands in for `nn.Embedding`."""


class SVDLayerNorm(SVDLayer, SpectralLayerNorm):  # type: ignore[misc]
    """Stands in for `nn.LayerNorm`; its weight is a matrix of one row, whose only singular value shifts."""


class SVDGroupNorm(SVDLayer, SpectralGroupNorm):  # type: ignore[misc]
    """Stands in for `nn.GroupNorm`; see `SVDLayerNorm`."""


MATRICES: dict[type[nn.Module], Any] = {nn.Linear: SVDLinear, nn.Conv2d: SVDConv2d, nn.Embedding: SVDEmbedding}
NORMS: dict[type[nn.Module], Any] = {nn.LayerNorm: SVDLayerNorm, nn.GroupNorm: SVDGroupNorm}
