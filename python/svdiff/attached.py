"""One model whose layers have been replaced by spectral ones, and the way back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from svdiff_kernels import Bank, Factors, SVDiffError
from svdiff_kernels import nn as snn
from svdiff_kernels.decompose import cost, is_finite
from svdiff_kernels.objects import content_hash

from .checkpoint import Layout
from .parking import ParkingLot, Ticket
from .progress import arithmetic_bar

MATRIX_LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: snn.SpectralLinear,
    nn.Conv2d: snn.SpectralConv2d,
    nn.Embedding: snn.SpectralEmbedding,
}
ONE_DIM_LAYERS: dict[type[nn.Module], Any] = {
    nn.LayerNorm: snn.SpectralLayerNorm,
    nn.GroupNorm: snn.SpectralGroupNorm,
}

FactorsOf = Callable[[Mapping[str, Tensor]], Iterable[tuple[str, Factors]]]
"""Gives the factors of weights by path, in any order."""
SigmasOf = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Gives the singular values of weights by path, of those whose factors may come when they are first needed."""


def layout_of(modules: Mapping[str, nn.Module], *, rank: int | None, one_dim: str, base_model: str) -> Layout:
    """What a delta file for these modules holds; reads every weight once.

    Raises:
        SVDiffError: a weight has no values yet, or that of a norm holds NaN or inf; matrices are checked when they are
            decomposed, and those whose decompositions are known need not be.
    """
    shapes, hashes = {}, {}
    for path, module in modules.items():
        weight = weight_of(module)
        if weight.is_meta:
            raise SVDiffError(f"{path}.weight has no values (it is on the meta device): load the model first")
        if type(module) in ONE_DIM_LAYERS:
            if not is_finite(weight):
                raise SVDiffError(f"the base model is damaged: {path}.weight holds NaN or inf")
            size = 1 if one_dim == "scalar" else weight.numel()
        else:
            size = min(weight.shape[0], weight[0].numel(), rank or weight.shape[0])
        shapes[path], hashes[path] = torch.Size([size]), content_hash(weight)
    return Layout(shapes, hashes, rank, one_dim, base_model)


class AttachedModel:
    """A model with spectral layers in it.

    Attributes:
        role: what the model is to its pipeline: "denoiser", "text_encoder", ...
        model: the model itself.
        layout: what a delta file of it holds.
        bank: its shifts.

    Args:
        role: see above.
        model: see above. On any exception it is left as it was.
        modules: what to replace, by path.
        layout: of these modules.
        form: "auto", "factored", "residual" or "recomposed".
        factors_of: gives the factors of the weights.
        sigmas_of: gives the singular values of those weights whose layers are to load U and Vh when they first compute.
        lot: where weights go that their spectral layers do without, as factors come, so that memory never holds all
            weights and all factors.
    """

    def __init__(
        self,
        role: str,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        layout: Layout,
        *,
        form: str,
        factors_of: FactorsOf,
        sigmas_of: SigmasOf,
        lot: ParkingLot,
    ) -> None:
        self.role, self.model, self.layout = role, model, layout
        self._originals = dict(modules)
        self._layers: dict[str, Any] = {}
        self._tickets: dict[str, Ticket] = {}
        self._fused: dict[str, nn.Module] = {}
        self._factors_of, self._lot = factors_of, lot
        self._holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            self._make_layers(form, sigmas_of)
            self._swap({id(self._originals[path]): layer for path, layer in self._layers.items()})
            model.requires_grad_(False)
            self.bank = Bank(self._layers, root=model)
            if hasattr(model, "save_pretrained"):
                object.__setattr__(model, "save_pretrained", _SavesPlain(self))
        except BaseException:
            self._restore()
            raise

    @property
    def layers(self) -> Mapping[str, Any]:
        """The spectral layers by path, also while plain ones stand in for them."""
        return MappingProxyType(self._layers)

    @property
    def is_fused(self) -> bool:
        """Whether plain layers stand in for the spectral ones."""
        return bool(self._fused)

    @torch.no_grad()
    def fuse(self) -> None:
        """Put plain layers in, whose weights are those of the present mix: the original's, and the shift in fp32."""
        plain: dict[str, nn.Module] = {}
        sizes = {path: layer.rank * math.prod(layer.weight.shape) for path, layer in self._layers.items()}
        with arithmetic_bar(sum(sizes.values()), "Fusing", delay=3) as bar:
            for path, layer in self._layers.items():
                plain[path] = layer.merge(self.original_weight(path))
                bar.advance(sizes[path])
        self._fused = plain  # before the first of them is in the model, so that `unfuse` can take it out
        self._swap({id(layer): plain[path] for path, layer in self._layers.items()})
        self.bank.leave_root()

    def unfuse(self) -> None:
        """Put the spectral layers back, just as they were (cast and moved, if the model has been since)."""
        if not self._fused:
            return
        for path, plain in self._fused.items():
            like = weight_of(plain)
            self._layers[path].to(like.device, like.dtype).train(plain.training)
        self.bank.to(like.device, like.dtype)
        self._swap({id(plain): self._layers[path] for path, plain in self._fused.items()})
        self.bank.enter_root()
        self._fused = {}

    def detach(self) -> None:
        """Put the original layers back, with their weights to the bit (cast, if the model has been cast since)."""
        self.unfuse()
        self.bank.release()
        self.model.__dict__.pop("save_pretrained", None)
        self._restore()

    def singular_values(self, adapter: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Of every matrix its singular values and an adapter's shifts of them, each ``[r]``, on the CPU."""
        deltas = self.bank.delta_dict(adapter)
        for path, layer in self._layers.items():
            if not layer.one_dim:
                yield layer.sigma.cpu(), deltas[path].cpu()

    def _make_layers(self, form: str, sigmas_of: SigmasOf) -> None:
        made: dict[str, Any] = {}
        self._layers = made  # as far as it has come, should it fail
        weights: dict[str, Tensor] = {}
        for path, original in self._originals.items():
            if maker := ONE_DIM_LAYERS.get(type(original)):
                made[path] = maker.from_module(original, mode=self.layout.one_dim).train(original.training)
            else:
                weights[path] = weight_of(original)
        sigmas = sigmas_of(weights)
        for path, sigma in sigmas.items():
            layer = self._matrix_layer(path, _without_vectors(weights[path], sigma), form)
            layer.defer(partial(self._factors_now, path))
            made[path] = layer
        on_gpu = any(parameter.is_cuda for parameter in self.model.parameters())
        copies = torch.cuda.Stream() if on_gpu else None  # factors travel while the next weight is parked
        costs = {path: cost(weight) for path, weight in weights.items() if path not in sigmas}
        with arithmetic_bar(sum(costs.values()), "Decomposing", delay=3) as bar:
            for path, factors in self._factors_of({path: weights[path] for path in costs}):
                with torch.cuda.stream(copies):  # of None does nothing
                    made[path] = self._matrix_layer(path, factors, form)
                self._park(path)
                bar.advance(costs[path])
        if copies is not None:
            torch.cuda.current_stream().wait_stream(copies)
        self._layers = {path: made[path] for path in self._originals}

    def _matrix_layer(self, path: str, factors: Factors, form: str) -> Any:
        original = self._originals[path]
        own_form = "auto" if getattr(original, "groups", 1) > 1 else form  # grouped: nn knows the only one
        return MATRIX_LAYERS[type(original)].from_module(original, factors, form=own_form).train(original.training)

    def _factors_now(self, path: str) -> Factors:
        """The factors of a layer that has done without so far."""
        weight = weight_of(self._originals[path])
        ((_, factors),) = self._factors_of({path: weight.detach()})
        self._park(path)
        return factors

    def _park(self, path: str) -> None:
        """Drop a weight that its layer does without, unless another module has it too."""
        weight = weight_of(self._originals[path])
        if self._layers[path].base is None and self._holders[id(weight)] == 1:
            self._tickets[path] = self._lot.park(weight.data)
            weight.data = weight.data.new_empty(0)

    def _swap(self, substitutes: Mapping[int, nn.Module]) -> None:
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                if id(child) in substitutes:
                    parent._modules[name] = substitutes[id(child)]

    def original_weight(self, path: str) -> Tensor:
        """Of a layer, wherever it is; on the layer's device and in its dtype, which follow the model's."""
        layer, ticket = self._layers[path], self._tickets.get(path)
        base = getattr(layer, "base", None)
        held = weight_of(self._originals[path]).data if base is None else base
        content: Tensor = held if ticket is None else self._lot.fetch(ticket)
        return content.to(layer.weight.device, layer.weight.dtype)

    def _restore(self) -> None:
        self._swap({id(layer): self._originals[path] for path, layer in self._layers.items()})
        for path, layer in self._layers.items():
            original = self._originals[path]
            weight_of(original).data = self.original_weight(path)
            if layer.bias is not None:
                original.bias.data = layer.bias.data
            original.train(layer.training)
        for parameter, flag in self._requires_grad:
            parameter.requires_grad_(flag)


class _SavesPlain:
    """Stands in for a model's `save_pretrained`: what is saved is a plain model, with the weights that act now."""

    def __init__(self, part: AttachedModel | None) -> None:
        self._part = part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._part is None:
            raise SVDiffError("a copy of an attached model cannot be saved: save the model that it was copied from")
        part, was_fused = self._part, self._part.is_fused
        model: Any = part.model
        if not was_fused:
            part.fuse()
        try:
            return type(model).save_pretrained(model, *args, **kwargs)
        finally:
            if not was_fused:
                part.unfuse()

    def __reduce__(self) -> tuple[Any, ...]:
        return _SavesPlain, (None,)  # a copy of the model does not belong to the part


def _without_vectors(weight: Tensor, sigma: Tensor) -> Factors:
    M, N, r = weight.shape[0], weight[0].numel(), sigma.shape[0]
    return Factors(weight.new_empty(M, r, device="meta"), sigma, weight.new_empty(r, N, device="meta"))


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a module that `targets.select` chose."""
    assert isinstance(module.weight, nn.Parameter)
    return module.weight
