"""Kernels for fine-tuning networks by the singular values of their frozen weights (SVDiff).

Importing this touches no GPU, compiles nothing, and needs torch and safetensors alone.
"""

from . import (
    backends,  # noqa: F401  (chooses and registers the op's kernels)
    nn,
)
from .bank import Bank
from .cache import FactorCache
from .decompose import decompose
from .errors import SVDiffError
from .factors import Factors
from .functional import spectral_conv2d, spectral_embedding, spectral_linear

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "FactorCache",
    "Factors",
    "SVDiffError",
    "__version__",
    "decompose",
    "nn",
    "spectral_conv2d",
    "spectral_embedding",
    "spectral_linear",
]
