"""Layers that PEFT puts in place of a model's: the base layer, its decomposition, and a shift for each adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdiff_kernels import FactorCache, Factors, SVDiffError, spectral_conv2d, spectral_embedding, spectral_linear
from svdiff_kernels.decompose import decompose
from svdiff_kernels.module import keep_wide
from svdiff_kernels.recomposed import recomposed_weight

from .config import SVDiffConfig

BASE = "__base__"
"""In ``adapter_names``: no adapter."""


class SVDiffLayer(nn.Module, BaseTunerLayer):
    """What linear layers, convolutions and embeddings share.

    The base layer stays as it is. U and Vh are in its weight's dtype, sigma and the shifts in fp32 whatever the model
    is cast to; the decomposition belongs to the layer, is shared by its adapters, and is in no state dict.

    Attributes:
        base_layer: what was there before.
        in_features, out_features: as PEFT counts them, of an embedding its rows and columns.
        svdiff_delta: by adapter, ``[r]``: delta, or z - 1 where the parametrization is "scale".
        scaling: by adapter, what its shift is multiplied by.
        parametrization: by adapter.
        rank: r, how many singular values move.
        truncated: whether the weight has more.
        form: "factored" or "residual".
    """

    adapter_layer_names = ("svdiff_delta",)
    other_param_names = ("scaling", "parametrization")

    base_layer: Any
    # What PEFT's class has, whose types nn.Module would hide.
    weight: Tensor
    bias: Tensor | None
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _get_embed_scale: Callable[[], Tensor | None]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SVDiffConfig, rank: int | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        short = min(self.matrix().flatten(1).shape)
        self.rank = min(rank or short, short)
        self.truncated = self.rank < short
        self.form = config.form if config.form != "auto" else "residual" if self.truncated else "factored"
        self.svdiff_delta = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.parametrization: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._cache_dir = config.svd_cache_dir
        self._factors: Factors | None = None
        self._decomposed: tuple[int, int | None] | None = None  # which weight, and in which state
        self._unmerged: Tensor | None = None
        self._active_adapter = adapter_name
        self.register_load_state_dict_post_hook(_forget_factors_of_another_weight)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SVDiffConfig) -> None:
        """Give the layer another adapter."""
        weight = self.weight
        delta = torch.zeros(self.rank, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        if not config.init_weights:
            delta.normal_(std=0.1)
        self.svdiff_delta[adapter_name] = nn.Parameter(delta)
        self.scaling[adapter_name] = 1.0
        self.parametrization[adapter_name] = config.parametrization
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def matrix(self) -> Tensor:
        """The base's weight, as it was before a merge, as what is decomposed: ``[M, N]``, or a conv's kernel."""
        return self._oriented((self.weight if not self.merged or self._unmerged is None else self._unmerged).detach())

    def factors(self) -> Factors:
        """The decomposition of `matrix`, on its device; made, or read from the cache, if the layer has none yet.

        Raises:
            SVDiffError: the weight cannot be decomposed, see `svdiff_kernels.decompose`.
        """
        if self._factors is None:
            matrix = self.matrix()
            if matrix.dtype == torch.float64:  # the cache has none of that precision
                self.set_factors(decompose(matrix, self.rank, dtype=torch.float64))
            else:
                self.set_factors(FactorCache(self._cache_dir).get(matrix, self.rank))
        assert self._factors is not None
        if self._factors.U.dtype != self.weight.dtype or self._factors.U.device != self.weight.device:
            self._factors = self._factors.to(self.weight.device, self.weight.dtype)
        return self._factors

    @property
    def has_factors(self) -> bool:
        """Whether the layer is decomposed already."""
        return self._factors is not None

    def set_factors(self, factors: Factors) -> None:
        """Take the decomposition of `matrix`."""
        self._factors = factors.to(self.weight.device, self.weight.dtype)
        self._decomposed = _state_of(self.weight)

    def shift(self, adapter_name: str) -> Tensor:
        """What an adapter adds to sigma, inside of the ReLU, ``[r]`` in fp32: its delta, or ``sigma * (z - 1)``.

        Raises:
            SVDiffError: the layer has no such adapter.
        """
        if adapter_name not in self.svdiff_delta:
            raise SVDiffError(f"a layer has no adapter {adapter_name!r}, only {', '.join(self.svdiff_delta)}")
        shift, scaling = self.svdiff_delta[adapter_name], self.scaling[adapter_name]
        if scaling != 1:
            shift = shift * scaling
        return self.factors().sigma * shift if self.parametrization[adapter_name] == "scale" else shift

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What one adapter alone changes of the base's weight, shaped as that, in fp32."""
        return self._change([adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT converts matrices."""
        return False

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's shift by this from now on."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the shifts of the active adapters by this too."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None undoes it all."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters, added up inside of the ReLU, into the base's weight; the original waits for `unmerge`.

        Args:
            safe_merge: refuse what is not finite.
            adapter_names: which ones; None is the active ones.

        Raises:
            SVDiffError: an adapter holds NaN or inf, and `safe_merge`. The weight is then as it was.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        weight = self.weight
        original = weight.data if self._unmerged is None else self._unmerged
        change = self._change([*self.merged_adapters, *names])
        merged = torch.empty_like(original).copy_(original.to(change.dtype) + change)
        if safe_merge and not torch.isfinite(merged).all():
            raise SVDiffError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        self._unmerged, weight.data = original, merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.weight
        weight.data = self._unmerged.to(weight.device, weight.dtype)
        self._unmerged = None
        self.merged_adapters.clear()
        if self._factors is not None:
            self._decomposed = _state_of(weight)

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """What the base layer does, with the active adapters, or with one for each sample.

        Args:
            x: as the base layer takes it.
            adapter_names: for each of x's first dimension, or for each of several samples that share an x of one. It
                comes from PEFT's hooks: pass it to the model.

        Raises:
            SVDiffError: there are more or fewer names than samples, or adapters are merged.
        """
        if adapter_names is not None:
            self._check_samples(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if adapter_names is not None:
            delta = self._delta_of_samples(adapter_names)
            if delta is not None and len(x) == 1:
                x = x.expand(len(adapter_names), *x.shape[1:])
        else:
            delta = None if self.merged else self._delta(self.active_adapters)
        return self.base_layer(x) if delta is None else self._spectral(x, self.factors(), delta)

    def _spectral(self, x: Tensor, factors: Factors, delta: Tensor) -> Tensor:
        raise NotImplementedError

    def _oriented(self, weight: Tensor) -> Tensor:
        """A weight as its factors see it, or back again."""
        return weight

    def _residual_weight(self) -> Tensor | None:
        return self.matrix() if self.form == "residual" else None

    def _biased(self, run: Callable[[Tensor | None], Tensor]) -> Tensor:
        """``run(bias)``; a bias that learns is added outside, since to the kernels it is frozen."""
        bias = self.bias
        if bias is None or not bias.requires_grad:
            return run(bias)
        y = run(None)
        return y + bias.to(y.dtype).view(-1, *[1] * (self.weight.dim() - 2))

    def _present(self, names: Sequence[str]) -> list[str]:
        """Those of the adapters that this layer has."""
        return [name for name in names if name in self.svdiff_delta]

    def _delta(self, names: Sequence[str]) -> Tensor | None:
        """The sum of shifts, ``[r]``; None if the layer has none of these adapters."""
        shifts = [self.shift(name) for name in self._present(names)]
        return reduce(torch.add, shifts) if shifts else None

    def _delta_of_samples(self, names: Sequence[str]) -> Tensor | None:
        """A row for each sample, ``[S, r]``."""
        shifts = {name: self.shift(name) for name in self._present(sorted(set(names)))}
        if not shifts:
            return None
        nothing = torch.zeros_like(next(iter(shifts.values())))
        return torch.stack([shifts.get(name, nothing) for name in names])

    def _change(self, names: Sequence[str]) -> Tensor:
        """``U diag(relu(sigma + shifts) - sigma) Vh``, shaped as the weight, at least in fp32."""
        factors = self.factors()
        shift = reduce(torch.add, [self.shift(name) for name in names])
        gain = torch.maximum(shift, -factors.sigma)  # which hands a NaN on
        Vh = factors.Vh.unflatten(1, self.matrix().shape[1:])
        return self._oriented(recomposed_weight(factors.U, gain, Vh, dtype=gain.dtype))

    def _check_samples(self, x: Tensor, names: Sequence[str]) -> None:
        if len(x) not in (1, len(names)):
            raise SVDiffError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise SVDiffError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.svdiff_delta:
            return
        delta = self.svdiff_delta[adapter_name]
        device = self.weight.device if device is None else device
        if not delta.is_meta and device.type != "meta":  # PEFT's own would cast it to the base's dtype
            delta.data = delta.data.to(device, torch.promote_types(delta.dtype, torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {id(t) for delta in self.svdiff_delta.values() for t in (delta, delta.grad) if t is not None}
        super()._apply(lambda t: keep_wide(fn, t) if id(t) in kept else fn(t), recurse)
        if self._unmerged is not None:
            self._unmerged = fn(self._unmerged)
        if self._factors is not None:
            self._factors = None if self.weight.is_meta else self._factors.to(self.weight.device, self.weight.dtype)
            self._decomposed = _state_of(self.weight)
        return self

    def extra_repr(self) -> str:
        """One line for print(model)."""
        return f"rank={self.rank}, form={self.form}"

    def __repr__(self) -> str:
        return f"svdiff.{super().__repr__()}"


class Linear(SVDiffLayer):
    """Of `nn.Linear`, and of transformers' `Conv1D`, whose weight is its transpose."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """`peft.convert_to_lora` takes the SVD of `get_delta_weight`: rank k is the k largest ``|dsigma|``."""
        return True

    def _oriented(self, weight: Tensor) -> Tensor:
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def _spectral(self, x: Tensor, factors: Factors, delta: Tensor) -> Tensor:
        U, sigma, Vh, weight = factors.U, factors.sigma, factors.Vh, self._residual_weight()
        return self._biased(lambda bias: spectral_linear(x, U, sigma, Vh, delta, bias, weight=weight))


class Conv2d(SVDiffLayer):
    """Of `nn.Conv2d`; a grouped one is recomposed in every call."""

    def _spectral(self, x: Tensor, factors: Factors, delta: Tensor) -> Tensor:
        base, weight = self.get_base_layer(), self._residual_weight()
        U, sigma, Vh = factors.U, factors.sigma, factors.Vh.unflatten(1, base.weight.shape[1:])
        how: dict[str, Any] = {"stride": base.stride, "padding": base.padding}
        how |= {"dilation": base.dilation, "groups": base.groups, "weight": weight}
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            how["padding"] = 0
        return self._biased(lambda bias: spectral_conv2d(x, U, sigma, Vh, delta, bias, **how))


class Embedding(SVDiffLayer):
    """Of `nn.Embedding`."""

    def _spectral(self, x: Tensor, factors: Factors, delta: Tensor) -> Tensor:
        how: dict[str, Any] = {"padding_idx": self.get_base_layer().padding_idx, "weight": self._residual_weight()}
        y = spectral_embedding(x, factors.U, factors.sigma, factors.Vh, delta, **how)
        scale = self._get_embed_scale()  # of Gemma's
        return y if scale is None else y * scale.to(y.dtype)


def _state_of(weight: Tensor) -> tuple[int, int | None]:
    """Changes when other values are loaded into a weight."""
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _forget_factors_of_another_weight(layer: nn.Module, _: Any) -> None:
    """After a state dict was loaded, which may have held the base's weight."""
    assert isinstance(layer, SVDiffLayer)
    if layer._decomposed is not None and not layer.merged and layer._decomposed != _state_of(layer.weight):
        layer._factors = layer._decomposed = None
