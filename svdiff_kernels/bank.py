"""The bank: every shift of a model in one vector per adapter, every gain from one pass over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .errors import SVDiffError
from .module import SpectralModule, keep_wide
from .ops import gains, gains_backward

TRAINED = "default"
"""The adapter that trains; all others are frozen."""


class Bank(nn.Module):
    """Holds the shifts of many layers, for any number of adapters, and computes all their gains at once.

    ``gain = max(base + sum of mix[a] * delta[a], floor)`` for the whole model, where base and floor are each layer's
    `SpectralModule.gain_terms`; layers read their slice. It happens once per call of root (a forward pre-hook), and
    outside of such a call when a layer notices that a delta, the mix or the grad mode has changed.

    An adapter is two flat parameters, ``matrices_<name>`` ``[R]`` and ``one_dim_<name>`` ``[R1]``, since 1-D weights
    learn at a rate of their own. The bank starts with the adapter "default" made of the layers' own deltas, in the mix
    with weight 1; it alone is trainable.

    Args:
        layers: spectral layers by name. They are adopted: ``layer.delta`` becomes a view of the bank's vector.
        root: the model that holds them, to which the bank attaches itself as the sub-module ``spectral_bank``, so that
            it moves, trains and is compiled with it. None: gains are refreshed on read alone.

    Raises:
        SVDiffError: no layers; a layer that has a bank already; or layers of several devices or dtypes of sigma.
    """

    base: Tensor
    floor: Tensor
    mix: Tensor

    def __init__(self, layers: Mapping[str, SpectralModule], root: nn.Module | None = None) -> None:
        super().__init__()
        _check_layers(layers)
        self._layers = dict(sorted(layers.items(), key=lambda item: item[1].one_dim))  # matrices first, as in base
        self._sizes = [layer.rank for layer in self._layers.values()]
        bases, floors = zip(*(layer.gain_terms() for layer in self._layers.values()), strict=True)
        # Not persistent: they are made of the layers' sigma.
        self.register_buffer("base", torch.cat(bases), persistent=False)
        self.register_buffer("floor", torch.cat(floors), persistent=False)
        self.register_buffer("mix", self.base.new_zeros(0), persistent=False)
        self._names: list[str] = []
        self._fresh_for: tuple[object, ...] | None = None
        self.add(TRAINED)
        self.load_delta_dict(TRAINED, {name: layer.delta for name, layer in self._layers.items()})
        self.set_mix({TRAINED: 1.0})
        for layer in self._layers.values():
            del layer.delta
            object.__setattr__(layer, "_bank", self)  # a reference, not a child
        self._bind()
        self._hook = None
        object.__setattr__(self, "_root", root)
        if root is not None:
            root.add_module("spectral_bank", self)
            self._hook = root.register_forward_pre_hook(self._before_root)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order of `mix`."""
        return tuple(self._names)

    @property
    def scales(self) -> dict[str, Tensor]:
        """The scale of every layer by name, under the present mix; with a graph if gradients are on."""
        return {name: layer.scale() for name, layer in self._layers.items()}

    def parameters_of(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The two flat parameters of an adapter: matrices ``[R]``, 1-D weights ``[R1]`` (possibly empty)."""
        self._check_name(name)
        return self.get_parameter(f"matrices_{name}"), self.get_parameter(f"one_dim_{name}")

    def add(self, name: str) -> None:
        """A new adapter with all shifts zero, frozen unless it is "default", and not yet in the mix."""
        if not name or "." in name:
            raise SVDiffError(f"{name!r} cannot name an adapter: it must not be empty nor hold a dot")
        if name in self._names:
            raise SVDiffError(f"there is an adapter {name!r} already: delete it or choose another name")
        split = sum(layer.rank for layer in self._layers.values() if not layer.one_dim)
        for kind, size in (("matrices", split), ("one_dim", self.base.numel() - split)):
            parameter = nn.Parameter(self.base.new_zeros(size), requires_grad=name == TRAINED)
            self.register_parameter(f"{kind}_{name}", parameter)
        self._names.append(name)
        self._set_mix_tensor(torch.nn.functional.pad(self.mix, (0, 1)))

    def remove(self, name: str) -> None:
        """Forget an adapter; "default" stays, since the layers' deltas are views of it."""
        self._check_name(name)
        if name == TRAINED:
            raise SVDiffError(
                f"adapter {TRAINED!r} is the one that trains and cannot be removed; leave it out of the mix"
            )
        others = [i for i, other in enumerate(self._names) if other != name]
        self._names.remove(name)
        delattr(self, f"matrices_{name}")
        delattr(self, f"one_dim_{name}")
        self._set_mix_tensor(self.mix[..., others])

    def set_mix(self, weights: Mapping[str, float] | Sequence[Mapping[str, float]]) -> None:
        """How much of each adapter acts; one that is not named does not. ``{}`` is the base model.

        Args:
            weights: for all samples alike; or a sequence, one for each of S samples, which split the first dimension
                of every layer's input evenly, in order.
        """
        rows = [weights] if isinstance(weights, Mapping) else list(weights)
        if not rows:
            raise SVDiffError("a mix for no samples: give at least one")
        for name, weight in (item for row in rows for item in row.items()):
            self._check_name(name)
            if not math.isfinite(weight):
                raise SVDiffError(f"the weight of adapter {name!r} is {weight}, not a finite number")
        mix = [[float(row.get(name, 0.0)) for name in self._names] for row in rows]
        self._set_mix_tensor(self.base.new_tensor(mix[0] if isinstance(weights, Mapping) else mix))

    def get_mix(self) -> dict[str, float]:
        """The adapters that act, with their weights; where samples differ, the largest weight of any."""
        largest = self.mix if self.mix.dim() == 1 else self.mix.gather(0, self.mix.abs().argmax(0, keepdim=True))[0]
        return {name: weight for name, weight in zip(self._names, largest.tolist(), strict=True) if weight != 0}

    def delta_dict(self, name: str) -> dict[str, Tensor]:
        """A copy of an adapter's shifts, by layer."""
        return {key: view.clone() for key, view in self._views(name).items()}

    def load_delta_dict(self, name: str, deltas: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Set an adapter's shifts, adding the adapter if there is none of that name.

        Args:
            name: the adapter.
            deltas: one tensor ``[r]`` per layer; all are checked before anything is touched.
            strict: whether every layer must have one; else a layer without stays at zero.

        Raises:
            SVDiffError: an unknown or missing layer, a wrong shape, or a value that is not finite.
        """
        for key, delta in deltas.items():
            layer = self._layers.get(key)
            if layer is None:
                raise SVDiffError(f"delta {key!r} belongs to no spectral layer of this model")
            if tuple(delta.shape) != (layer.rank,):
                raise SVDiffError(f"delta {key!r} has shape {tuple(delta.shape)}, but its layer has ({layer.rank},)")
            if not torch.isfinite(delta).all():
                raise SVDiffError(f"delta {key!r} holds NaN or inf")
        if strict and (missing := [key for key in self._layers if key not in deltas]):
            raise SVDiffError(f"{len(missing)} layers have no delta, the first is {missing[0]!r}")
        if name not in self._names:
            self.add(name)
        with torch.no_grad():
            for key, view in self._views(name).items():
                if key in deltas:
                    view.copy_(deltas[key])
                else:
                    view.zero_()

    def refresh(self) -> None:
        """Compute all gains and hand each layer its slice."""
        deltas = [p for name in self._names for p in self.parameters_of(name)]
        slices = _Gains.apply(self.base, self.floor, self.mix, *deltas).split(self._sizes, dim=-1)
        for layer, gain in zip(self._layers.values(), slices, strict=True):
            layer._bank_gain = gain
        if not torch.compiler.is_compiling():
            self._fresh_for = self._state()

    def ensure_fresh(self) -> None:
        """`refresh` if anything that the gains depend on has changed since the last time."""
        if self._fresh_for != self._state():
            self.refresh()

    def release(self) -> None:
        """Undo the adoption: every layer gets the "default" delta back as a parameter of its own."""
        for layer, view in zip(self._layers.values(), self._views(TRAINED).values(), strict=True):
            object.__setattr__(layer, "_bank", None)
            layer._bank_gain = None
            del layer.delta
            layer.delta = nn.Parameter(view.clone())
        if self._hook is not None:
            self._hook.remove()
            delattr(self._root, "spectral_bank")

    def forward(self, x: Any) -> Any:
        """x as it is: an `nn.Sequential` that is the root calls the bank like every other child."""
        return x

    def _before_root(self, module: nn.Module, args: Any) -> None:
        self.refresh()

    def _state(self) -> tuple[object, ...]:
        versions = (p._version for p in self._parameters.values() if p is not None)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.mix._version, *versions

    def _set_mix_tensor(self, mix: Tensor) -> None:
        if mix.shape == self.mix.shape:
            self.mix.copy_(mix)  # in place: a compiled model or a captured graph sees it
        else:
            self.mix = mix
            self._fresh_for = None

    def _views(self, name: str) -> dict[str, Tensor]:
        matrices, one_dim = (p.detach() for p in self.parameters_of(name))
        count = sum(not layer.one_dim for layer in self._layers.values())
        views = (*matrices.split(self._sizes[:count]), *one_dim.split(self._sizes[count:]))
        return dict(zip(self._layers, views, strict=True))

    def _bind(self) -> None:
        for layer, view in zip(self._layers.values(), self._views(TRAINED).values(), strict=True):
            layer.delta = view
        self._fresh_for = None

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            raise SVDiffError(f"there is no adapter {name!r}; there are: {', '.join(self._names)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda t: keep_wide(fn, t), recurse)
        self._bind()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fresh_for": None}  # a copy's layers have no gains yet


def _check_layers(layers: Mapping[str, SpectralModule]) -> None:
    if not layers:
        raise SVDiffError("a bank needs at least one spectral layer")
    for name, layer in layers.items():
        if layer._bank is not None:
            raise SVDiffError(f"layer {name!r} belongs to another bank: release that one first")
    if len(kinds := {f"{layer.sigma.device} {layer.sigma.dtype}" for layer in layers.values()}) > 1:
        raise SVDiffError(
            f"the layers of a bank must share a device and a dtype of sigma, not {', '.join(sorted(kinds))}"
        )


class _Gains(torch.autograd.Function):
    """`ops.gains` with its gradient.

    What the backward pass needs stays on ctx, not among the saved tensors that a first backward() frees: several
    losses may share one refresh and be differentiated one after the other.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, floor: Tensor, mix: Tensor, *deltas: Tensor) -> Tensor:
        gain, ctx.held = gains(base, floor, mix, deltas)
        ctx.mix, ctx.split = mix.clone(), deltas[0].shape[0]
        return gain

    @staticmethod
    def backward(ctx: Any, dgain: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3::2]
        rows = iter(gains_backward(dgain, ctx.held, ctx.mix, [a for a, wanted in enumerate(needed) if wanted]))
        grads: list[Tensor | None] = []
        for wanted in needed:
            grads += next(rows).split([ctx.split, dgain.shape[-1] - ctx.split]) if wanted else [None, None]
        return None, None, None, *grads
