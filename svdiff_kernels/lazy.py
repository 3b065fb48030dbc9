"""A weight that exists only once somebody computes with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import SVDiffError

# Reads that a shape, a dtype and a device answer.
_CHEAP = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "itemsize")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.__len__}


class LazyWeight(Tensor):
    """Stands in for a recomposed weight: dtype, device and shape are free, any other use recomposes it.

    Model code often asks ``layer.weight.dtype`` and nothing more; that must not cost a product of matrices.
    """

    _recompose: Callable[[], Tensor]

    @staticmethod
    def make(like: Tensor, shape: tuple[int, ...], recompose: Callable[[], Tensor]) -> LazyWeight:
        """One of like's dtype and device; ``recompose`` is called at each real use, under the grad mode of then."""
        weight = like.detach().new_zeros(()).expand(shape).as_subclass(LazyWeight)
        weight._recompose = recompose
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise SVDiffError(
                "the weight of a spectral layer cannot be written, for it is made of its factors: fuse the shifts first"
            )
        if func not in _CHEAP:
            args, kwargs = torch.utils._pytree.tree_map_only(LazyWeight, lambda w: w._recompose(), (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
