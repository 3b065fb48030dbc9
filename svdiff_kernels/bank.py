"""The bank: every shift of a model in one vector per adapter, every gain from one pass over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import SVDiffError
from .mix import Key, Mix, Row, per_input
from .module import SpectralModule, keep_wide
from .ops import gains, gains_backward

TRAINED = "default"
"""The adapter that trains; all others are frozen."""

_SLOTS = 4
"""How many there are when the first adapter comes, so that others can join it and nothing is compiled anew."""

_HALF = {torch.float16, torch.bfloat16}

_CALLS: ContextVar[Mapping[int, _Call]] = ContextVar("svdiff_calls", default=MappingProxyType({}))
"""By the id of a bank, the mix that calls from this thread or asyncio task have of their own."""


class Bank(nn.Module):
    """Holds the shifts of many layers, for any number of adapters, and computes all their gains at once.

    ``gain = max(base + sum of mix[a] * delta[a], floor)`` for the whole model, where base and floor are each layer's
    `SpectralModule.gain_terms`; layers read their slice. It happens once per call of root (a forward pre-hook), and
    outside of such a call when a layer notices that a delta, the mix or the grad mode has changed.

    The bank starts with the adapter "default" made of the layers' own deltas, in the mix with weight 1. It alone is
    trainable: two flat parameters, ``matrices_default`` ``[R]`` and ``one_dim_default`` ``[R1]``, since 1-D weights
    learn at a rate of their own. Any number of others wait in the host's memory. Those that act are copied into
    ``slots`` ``[K, R + R1]``, beside the model; ``mix``, ``[1 + K]`` or ``[S, 1 + K]``, weighs "default" and them. So
    another mix is another content of two tensors: no weight is touched, nothing is recompiled and a CUDA graph stays
    valid, unless the number of samples changes or K has to grow: from 0 to 4 when the first adapter is loaded, and then
    only when more act at once.

    Args:
        layers: spectral layers by name. They are adopted: ``layer.delta`` becomes a view of the bank's vector.
        root: the model that holds them, to which the bank attaches itself as the sub-module ``spectral_bank``, so that
            it moves, trains and is compiled with it. None: gains are refreshed on read alone, and S samples split the
            first dimension of every layer's input evenly, in order.

    Raises:
        SVDiffError: no layers; a layer that has a bank already; or layers of several devices or dtypes of sigma.

    Example:
        >>> import torch
        >>> from svdiff_kernels import Bank
        >>> from svdiff_kernels.nn import SpectralLinear
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 5))
        >>> for name in ("0", "2"):
        ...     model[int(name)] = SpectralLinear.from_module(model[int(name)])
        >>> bank = Bank({"0": model[0], "2": model[2]}, root=model)
        >>> [p.numel() for p in bank.trained]  # of matrices, and of norms
        [7, 0]
        >>> bank.load_delta_dict("ink", {"0": torch.ones(3), "2": torch.ones(4)})
        >>> bank.set_mix([{}, {"ink": 0.5}])  # the first sample gets the base, the second half of "ink"
        >>> y = model(torch.ones(2, 3))
        >>> torch.equal(y[0], y[1])
        False
    """

    base: Tensor
    floor: Tensor
    slots: Tensor
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
        self.register_buffer("slots", self.base.new_zeros(0, self.base.numel()), persistent=False)
        self.register_buffer("mix", self.base.new_zeros(1), persistent=False)
        deltas = torch.cat([layer.delta.detach() for layer in self._layers.values()])
        split = sum(layer.rank for layer in layers.values() if not layer.one_dim)
        self.matrices_default = nn.Parameter(deltas[:split].clone())
        self.one_dim_default = nn.Parameter(deltas[split:].clone())
        self._frozen: dict[str, Tensor] = {}
        self._in_slots: list[Key | None] = []
        self._batch: int | None = None
        self._fresh_for: tuple[object, ...] | None = None
        self._is_compiled = False
        self._calls: set[_Call] = set()
        self.set_mix({TRAINED: 1.0})
        for layer in self._layers.values():
            del layer.delta
            object.__setattr__(layer, "_bank", self)  # a reference, not a child
        self._bind()
        self._hook: RemovableHandle | None = None
        self._root: nn.Module | None
        object.__setattr__(self, "_root", root)  # a reference, not a child
        self.enter_root()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return TRAINED, *self._frozen

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers, in the order of the flat vectors."""
        return tuple(self._layers)

    @property
    def scales(self) -> dict[str, Tensor]:
        """The scale of every layer by name, under the present mix; with a graph if gradients are on."""
        return {name: layer.shifted() for name, layer in self._layers.items()}

    @property
    def trained(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters of "default": its shifts of matrices ``[R]``, and of 1-D weights ``[R1]``, possibly empty."""
        return self.matrices_default, self.one_dim_default

    def remove(self, name: str) -> None:
        """Forget an adapter, in the mix too; "default" stays, since the layers' deltas are views of it."""
        self._check_name(name)
        if name == TRAINED:
            raise SVDiffError(
                f"adapter {TRAINED!r} is the one that trains and cannot be removed; leave it out of the mix"
            )
        del self._frozen[name]
        self._in_slots = [None if key is not None and key[0] == name else key for key in self._in_slots]
        if any(adapter == name for adapter, _ in self._mix.keys):
            self.set_mix(self._mix.without(name))

    def make_mix(self, weights: Row | Sequence[Row], *, repeats: int = 1) -> Mix:
        """A mix for `set_mix`, checked but not yet in use.

        Args:
            weights: for all samples alike, or a sequence, one for each of S samples. A weight is a number, or a
                number for each layer by name, where layers that are not named get none; through such, no gradient
                reaches "default". An adapter that is not named does not act; ``{}`` is the base model.
            repeats: inputs that each sample has, one after the other. A batch of root is ``S * repeats`` long, or
                several times that: under classifier-free guidance it holds all samples twice.

        Raises:
            SVDiffError: an unknown adapter or layer, a weight that is not finite, or no sample.
        """
        return Mix.make(weights, repeats, self.names, self.layer_names)

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_mix(self, mix: Mix | Row | Sequence[Row]) -> None:
        """Choose how much of each adapter acts: a mix of `make_mix`, or what that takes."""
        if not isinstance(mix, Mix):
            mix = self.make_mix(mix)
        acting = [key for key in mix.keys if key != _TRAINED_KEY]
        waiting = [key for key in acting if key not in self._in_slots]
        free = [i for i, key in enumerate(self._in_slots) if key not in acting]
        if lacking := max(len(waiting) - len(free), 0):
            count = len(self._in_slots)
            self._grow_slots(max(lacking, count))  # twice as many, so that it seldom happens
            free += range(count, len(self._in_slots))
        for i, key in zip(free, waiting, strict=False):
            self.slots[i].copy_(self._term(key))
            self._in_slots[i] = key
        table = self._table_of(mix, self._in_slots)
        if table.shape == self.mix.shape:
            self.mix.copy_(table)  # in place: a compiled model or a captured graph sees it
        else:
            if table.shape[:-1] != self.mix.shape[:-1]:
                self._batch = None  # which was that of other samples
            self.mix = table
        self._mix, self._fresh_for = mix, None

    def get_mix(self) -> dict[str, float]:
        """The adapters that act, with their weights; where samples or layers differ, the largest weight of any."""
        return self._mix.largest()

    @contextmanager
    def mixed(self, mix: Mix | Row | Sequence[Row]) -> Iterator[None]:
        """Within the block calls from this thread (or asyncio task), and no others, have a mix of their own.

        It is meant for inference. The mix is of what adapters hold when the block begins.

        Args:
            mix: one of `make_mix`, or what that takes.

        Raises:
            SVDiffError: see `make_mix`; or the model is compiled, and only knows the mix that all calls share.
        """
        if self._is_compiled or getattr(self._root, "_compiled_call_impl", None) is not None:
            raise SVDiffError(_COMPILED)
        call = _Call(self, mix if isinstance(mix, Mix) else self.make_mix(mix))
        token = _CALLS.set(MappingProxyType({**_CALLS.get(), id(self): call}))
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)
            _CALLS.reset(token)

    def delta_dict(self, name: str) -> dict[str, Tensor]:
        """A copy of an adapter's shifts, by layer."""
        self._check_name(name)
        parts = self._shifts(name).clone().split(self._sizes)
        return dict(zip(self._layers, parts, strict=True))

    def load_delta_dict(self, name: str, deltas: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Set an adapter's shifts, adding the adapter if there is none of that name.

        Args:
            name: the adapter.
            deltas: one tensor ``[r]`` per layer; all are checked before anything is touched. Those of a frozen adapter
                are held in their dtype: a thousand adapters are large, and half precision is half of it.
            strict: whether every layer must have one; else a layer without stays at zero.

        Raises:
            SVDiffError: an empty name, an unknown or missing layer, a wrong shape, or a value that is not finite.
        """
        if not name:
            raise SVDiffError("an adapter needs a name")
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
        dtypes = {delta.dtype for delta in deltas.values()} if name != TRAINED else set()
        dtype = next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= _HALF else self.base.dtype
        shifts = torch.zeros(self.base.numel(), dtype=dtype)
        for key, part in zip(self._layers, shifts.split(self._sizes), strict=True):
            if key in deltas:
                part.copy_(deltas[key].detach())
        if name == TRAINED:
            with torch.no_grad():
                for parameter, part in zip(self.trained, shifts.split([p.numel() for p in self.trained]), strict=True):
                    parameter.copy_(part)
        else:
            self._frozen[name] = shifts
            if not self._in_slots:
                self._grow_slots(_SLOTS)
                self.set_mix(self._mix)
        held = [key for key in self._in_slots if key is not None and key[0] == name]
        if held:
            self._in_slots = [None if key in held else key for key in self._in_slots]
            self.set_mix(self._mix)

    def refresh(self) -> None:
        """Compute all gains and hand each layer its slice."""
        slices = self._gains(self.mix, self.slots, self._mix.repeats, self._batch)
        for layer, gain in zip(self._layers.values(), slices, strict=True):
            layer._bank_gain = gain
        if not torch.compiler.is_compiling():
            self._fresh_for = self._state()

    def ensure_fresh(self) -> None:
        """`refresh` if anything that the gains depend on has changed since the last time."""
        if self._is_stale(self._fresh_for):
            self.refresh()

    def gain_of(self, layer: SpectralModule) -> Tensor:
        """The gain of one of the layers, ``[r]`` or a row for each input, under the mix of the present call."""
        if torch.compiler.is_compiling():  # only the hook refreshes
            self._check_shared()
        elif call := _CALLS.get().get(id(self)):
            return call.gain_of(layer)
        else:
            self.ensure_fresh()
        assert layer._bank_gain is not None
        return layer._bank_gain

    def enter_root(self) -> None:
        """Become a sub-module of the root, if there is one, and be called before it."""
        if self._root is not None and self._hook is None:
            self._root.add_module("spectral_bank", self)
            self._hook = self._root.register_forward_pre_hook(self._before_root, with_kwargs=True)

    def leave_root(self) -> None:
        """Undo `enter_root`: for the time in which plain layers stand in for the spectral ones."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            delattr(self._root, "spectral_bank")

    def release(self) -> None:
        """Undo the adoption: every layer gets the "default" delta back as a parameter of its own."""
        for layer, view in zip(self._layers.values(), self._views(), strict=True):
            object.__setattr__(layer, "_bank", None)
            layer._bank_gain = None
            del layer.delta
            layer.delta = nn.Parameter(view.clone())
        self.leave_root()

    def forward(self, x: Any = None) -> Any:
        """`refresh`; or x as it is, since an `nn.Sequential` that is the root calls the bank like every other child."""
        if x is None:
            call = None if torch.compiler.is_compiling() else _CALLS.get().get(id(self))
            (call or self).refresh()
        return x

    def _before_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = _batch_of((*args, *kwargs.values()))
        if torch.compiler.is_compiling():
            self._is_compiled = True
            self._check_shared()
        elif call := _CALLS.get().get(id(self)):
            call.batch = batch
            self()
            return
        self._batch = batch
        self()  # and not refresh: offloading hooks bring a module's parameters when it is called

    def _check_shared(self) -> None:
        if self._calls:
            raise SVDiffError(_COMPILED)

    def _gains(self, mix: Tensor, slots: Tensor, repeats: int, batch: int | None) -> tuple[Tensor, ...]:
        """The gain of each layer, in their order."""
        if mix.dim() == 2 and batch is not None:
            mix = per_input(mix, repeats, batch)
        kinds = [p.numel() for p in self.trained]
        acting = slots[: mix.shape[-1] - 1]  # another thread may be adding some
        deltas = [*self.trained, *(part for slot in acting.unbind() for part in slot.split(kinds))]
        if torch.is_grad_enabled():
            gain = _Gains.apply(self.base, self.floor, mix, *deltas)
        else:  # dynamo loses arguments of a Function for which there is no gradient
            gain, _ = gains(self.base, self.floor, mix, deltas)
        return gain.split(self._sizes, dim=-1)

    def _is_stale(self, fresh_for: tuple[object, ...] | None) -> bool:
        """Whether what the gains depend on has changed; of parameters that are offloaded only the root's call knows."""
        return not self.matrices_default.is_meta and fresh_for != self._state()

    def _state(self) -> tuple[object, ...]:
        versions = (p._version for p in self.trained)
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *versions

    def _table_of(self, mix: Mix, slots: Sequence[Key | None]) -> Tensor:
        """The weights of "default" and of what is in slots, ``[1 + K]``, or ``[S, 1 + K]`` where samples differ."""
        table = self.base.new_tensor(mix.table([_TRAINED_KEY, *slots]))
        return table[0] if mix.shared else table

    @torch.inference_mode(False)
    def _grow_slots(self, more: int) -> None:
        self._in_slots = [*self._in_slots, *[None] * more]
        self.slots = torch.cat([self.slots, self.slots.new_zeros(more, self.slots.shape[1])])

    def _term(self, key: Key) -> Tensor:
        """The shifts of an adapter, each layer's by its weight."""
        adapter, weights = key
        shifts = self._shifts(adapter)
        if weights is None:
            return shifts
        each = torch.tensor(weights, dtype=self.base.dtype).repeat_interleave(torch.tensor(self._sizes))
        return shifts * each.to(shifts.device)

    def _shifts(self, name: str) -> Tensor:
        return torch.cat(self.trained).detach() if name == TRAINED else self._frozen[name]

    def _views(self) -> tuple[Tensor, ...]:
        """The shifts of "default", by layer."""
        count = sum(not layer.one_dim for layer in self._layers.values())
        matrices, one_dim = (p.detach() for p in self.trained)
        return *matrices.split(self._sizes[:count]), *one_dim.split(self._sizes[count:])

    def _bind(self) -> None:
        for layer, view in zip(self._layers.values(), self._views(), strict=True):
            layer.delta = view
        self._fresh_for = None

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise SVDiffError(f"there is no adapter {name!r}; there are: {', '.join(self.names)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda t: keep_wide(fn, t), recurse)
        self._bind()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fresh_for": None, "_calls": set()}  # a copy's layers have no gains yet


class _Call:
    """A mix that travels with the calls of one thread or task, and the gains that came of it."""

    def __init__(self, bank: Bank, mix: Mix) -> None:
        keys: list[Key] = [key for key in mix.keys if key != _TRAINED_KEY]
        with torch.no_grad():
            terms = [bank._term(key).to(bank.base) for key in keys]
        self._bank, self._mix = bank, mix
        self._slots = torch.stack(terms) if terms else bank.base.new_zeros(0, bank.base.numel())
        self._table = bank._table_of(mix, keys)
        self._gains: dict[SpectralModule, Tensor] = {}
        self.batch: int | None = None
        self._fresh_for: tuple[object, ...] | None = None

    def refresh(self) -> None:
        """Compute all gains, for a batch of this length."""
        slices = self._bank._gains(self._table, self._slots, self._mix.repeats, self.batch)
        self._gains = dict(zip(self._bank._layers.values(), slices, strict=True))
        self._fresh_for = self._bank._state()

    def gain_of(self, layer: SpectralModule) -> Tensor:
        """See `Bank.gain_of`."""
        if self._bank._is_stale(self._fresh_for):
            self.refresh()
        return self._gains[layer]


_TRAINED_KEY: Key = (TRAINED, None)
_COMPILED = "a compiled model has one mix for all calls: choose it with set_mix, and let calls that differ wait"


def _batch_of(arguments: tuple[Any, ...]) -> int | None:
    """The length of a call's batch: that of its first tensor with more than one dimension."""
    return next((a.shape[0] for a in arguments if isinstance(a, Tensor) and a.dim() > 1), None)


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
