"""Adapter: the shifts of an attached model, to train, save, load, mix and take off again."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdiff_kernels import SVDiffError
from svdiff_kernels.bank import TRAINED
from svdiff_kernels.mix import Mix

from . import checkpoint
from .attached import AttachedModel
from .parking import ParkingLot
from .targets import by_layer

Weight = float | Mapping[str, "float | Mapping[str, float]"]
"""How much of an adapter: everywhere, or by groups of layers."""


@dataclass(frozen=True)
class Clamped:
    """What the ReLU of ``relu(sigma + delta)`` takes of an adapter.

    Attributes:
        count: singular values that it would make negative.
        total: singular values that there are.
        lost: share of what it would move all of them that is not moved.
    """

    count: int
    total: int
    lost: float


class Adapter:
    """What `svdiff.attach` returns: the shifts of a denoiser, and of text encoders if they were attached.

    An adapter name (``"default"``, ``"dog"``) stands for one set of shifts over all of them.

    Args:
        parts: the attached models.
        lot: where their weights are parked.
        left_out: parts of the pipeline that were not attached, by role.
    """

    def __init__(self, parts: Sequence[AttachedModel], lot: ParkingLot, left_out: Collection[str]) -> None:
        self._parts = list(parts)
        self._lot = lot
        self._left_out = left_out

    @property
    def parts(self) -> list[AttachedModel]:
        """The attached models."""
        return list(self._attached())

    def param_groups(
        self, lr: float = 1e-3, lr_1d: float = 1e-6, *, lr_text_encoder: float | None = None
    ) -> list[dict[str, Any]]:
        """What trains, as groups for an optimiser.

        Args:
            lr: rate of matrices.
            lr_1d: rate of the weights of norms.
            lr_text_encoder: rate of text encoders' matrices; `lr` if None.
        """
        self._check_not_fused()
        rates: dict[float, list[Tensor]] = {}
        for part in self._attached():
            own = lr if part.role == "denoiser" or lr_text_encoder is None else lr_text_encoder
            for parameter, rate in zip(part.bank.trained, (own, lr_1d), strict=True):
                rates.setdefault(rate, []).append(parameter)
        groups = [{"params": [p for p in found if p.numel()], "lr": rate} for rate, found in rates.items()]
        return [group for group in groups if group["params"]]

    def num_parameters(self) -> int:
        """How many numbers one adapter has."""
        return sum(p.numel() for part in self._attached() for p in part.bank.trained)

    def save_weights(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **metadata: Any,
    ) -> list[Path]:
        """Write an adapter's delta files into a folder (made if need be), all or none of them.

        Args:
            directory: where to.
            adapter_name: which adapter; "default" if None.
            dtype: of the shifts; float16 halves the files, and the memory of who loads them.
            metadata: what else the files should say, such as the prompts; anything that JSON can hold.

        Returns:
            The files written.
        """
        name = adapter_name or TRAINED
        roles = [part.role for part in self._attached()]
        files = {
            Path(directory) / checkpoint.FILE_NAMES[part.role]: checkpoint.encode(
                part.bank.delta_dict(name), part.layout, roles, metadata, dtype
            )
            for part in self._attached()
        }
        checkpoint.write(files)
        return list(files)

    def load_weights(
        self, path: str | os.PathLike[str], adapter_name: str | None = None, *, activate: bool = True
    ) -> None:
        """Load delta files as an adapter, which becomes the only active one.

        Layers that the files do not have are not shifted. The adapter is held in the dtype of the files. It may happen
        while pictures are drawn.

        Args:
            path: a folder with delta files, or the denoiser's file (the text encoders' are looked for beside it).
            adapter_name: what to call it; "default" if None. An adapter of that name is replaced.
            activate: False leaves what is active as it is.

        Raises:
            SVDiffError: a file is missing, damaged, or does not fit the attached layers to the key. Nothing is changed.
        """
        self.load_deltas(self.read_weights(path), adapter_name, activate=activate)

    def read_weights(self, path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
        """What delta files hold for the attached layers, checked but not loaded; for `load_deltas`.

        Raises:
            SVDiffError: see `load_weights`.
        """
        parts = {part.role: part for part in self._attached()}
        files = checkpoint.read_all(path)
        if extra := [role for role in files if role in self._left_out]:
            raise SVDiffError(f"{files[extra[0]].path} has no place here: attach with text_encoder=True")
        return {role: file.for_layout(parts[role].layout) for role, file in files.items() if role in parts}

    def load_deltas(
        self, deltas: Mapping[str, Mapping[str, Tensor]], adapter_name: str | None = None, *, activate: bool = True
    ) -> None:
        """Set an adapter's shifts from tensors, and make it the only active one.

        Args:
            deltas: ``{"denoiser": {module path: delta}, "text_encoder": ...}``; what is not there is not shifted.
            adapter_name: see `load_weights`.
            activate: see `load_weights`.
        """
        name = adapter_name or TRAINED
        self._check_not_fused()
        for part in self._attached():
            part.bank.load_delta_dict(name, deltas.get(part.role, {}), strict=False)
        if activate:
            self.set_adapters(name)

    def set_adapters(self, names: str | Sequence[str], weights: Weight | Sequence[Weight] | None = None) -> None:
        """Choose which adapters act, and how much of each: ``relu(sigma + sum of weight * delta)``.

        Args:
            names: adapters; an empty list is the base model.
            weights: one for all, or one each; 1 if None. A weight is a number; or numbers by groups of layers, such as
                ``{"up": 0.5, "cross_attn": 1.2, "text_encoder": 0}``: an expression of `targets.matching` is about
                layers of the denoiser, and a text encoder's name, or "denoiser", about that part, with a number or a
                table of its own. Of each layer the last entry about it counts, and 1 where there is none.

        Raises:
            SVDiffError: an unknown or repeated name, another number of weights than of names, or a group without
                layers. Nothing is changed.
        """
        names = [names] if isinstance(names, str) else list(names)
        if weights is None or isinstance(weights, int | float | Mapping):
            weights = [1.0 if weights is None else weights] * len(names)
        if len(weights) != len(names) or len(set(names)) != len(names):
            raise SVDiffError(f"set_adapters: {len(names)} names ({', '.join(names)}) for {len(weights)} weights")
        for part, made in self._mixes([dict(zip(names, weights, strict=True))]):
            part.bank.set_mix(made)

    def set_adapters_per_sample(self, mixes: Sequence[Mapping[str, Weight]], *, num_images_per_prompt: int = 1) -> None:
        """Give each prompt of a batch adapters of its own, ``[{"dog": 1.0}, {"dog": 0.5, "ink": 0.8}, {}]``.

        The pipeline is then called with as many prompts, with or without classifier-free guidance.

        Args:
            mixes: one for each prompt, in order; weights as in `set_adapters`.
            num_images_per_prompt: what the pipeline is called with.

        Raises:
            SVDiffError: see `set_adapters`. Nothing is changed.
        """
        for part, made in self._mixes(mixes, num_images_per_prompt):
            part.bank.set_mix(made)

    @contextmanager
    def mixed(
        self, mixes: Mapping[str, Weight] | Sequence[Mapping[str, Weight]], *, num_images_per_prompt: int = 1
    ) -> Iterator[None]:
        """Within the block, another mix for what this thread (or asyncio task) draws, and for nobody else.

        ::

            with adapter.mixed({"dog": 0.7, "ink": 0.3}):
                image = pipeline("a dog in the snow").images[0]

        Args:
            mixes: for all prompts, or one for each, as in `set_adapters_per_sample`.
            num_images_per_prompt: what the pipeline is called with, where each prompt has its own.

        Raises:
            SVDiffError: see `set_adapters`; or the model is compiled, and knows only one mix for all calls.
        """
        with ExitStack() as stack:
            for part, made in self._mixes([mixes] if isinstance(mixes, Mapping) else mixes, num_images_per_prompt):
                stack.enter_context(part.bank.mixed(made))
            yield

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return list(dict.fromkeys(name for part in self._attached() for name in part.bank.get_mix()))

    def get_list_adapters(self) -> list[str]:
        """Names of all adapters."""
        return list(self._attached()[0].bank.names)

    def delete_adapters(self, names: str | Sequence[str]) -> None:
        """Forget adapters.

        Raises:
            SVDiffError: an unknown name, or "default", which is always there.
        """
        self._check_not_fused()
        names = [names] if isinstance(names, str) else list(names)
        known = [name for name in self.get_list_adapters() if name != TRAINED]
        if unknown := [name for name in names if name not in known]:
            raise SVDiffError(f"no adapter {unknown[0]!r} can be deleted; there are: {', '.join(known) or 'none'}")
        for part in self._attached():
            for name in names:
                part.bank.remove(name)

    def clamped(self, adapter_name: str | None = None) -> Clamped:
        """How much of an adapter, at weight 1, is lost at zero, below which no singular value goes."""
        count, total, moved, lost = 0, 0, 0.0, 0.0
        for part in self._attached():
            for sigma, delta in part.singular_values(adapter_name or TRAINED):
                below = (sigma + delta).clamp(max=0).abs().double()
                count, total = count + int(below.count_nonzero()), total + delta.numel()
                moved, lost = moved + float(delta.double().abs().sum()), lost + float(below.sum())
        return Clamped(count, total, lost / moved if moved else 0.0)

    def fuse(self) -> None:
        """Make the model a plain one, with the weights of the present mix; `unfuse` takes that back.

        It then computes as fast as the base, where spectral layers need a quarter more; it holds weights and factors;
        and it must be unfused before anything else is loaded, chosen or trained. The shift is rebuilt and added in
        fp32, so that a mix of nothing gives the original weights to the bit.

        Raises:
            SVDiffError: it is fused already, or prompts have mixes of their own. Nothing is changed.
        """
        self._check_not_fused()
        if any(part.bank.mix.dim() == 2 for part in self._attached()):
            raise SVDiffError("prompts have mixes of their own, which no one weight can hold: set one mix for all")
        try:
            for part in self._attached():
                part.fuse()
        except BaseException:
            for part in self._attached():
                part.unfuse()
            raise

    def unfuse(self) -> None:
        """Make the layers spectral again, to the bit what they were.

        Raises:
            SVDiffError: nothing is fused.
        """
        if not self._is_fused():
            raise SVDiffError("nothing is fused")
        for part in self._attached():
            part.unfuse()

    def unload(self) -> None:
        """Give the original model back, to the bit; this adapter is of no more use then."""
        for part in self._attached():
            part.detach()
        self._parts.clear()
        self._lot.close()

    def _mixes(
        self, mixes: Sequence[Mapping[str, Weight]], num_images_per_prompt: int = 1
    ) -> list[tuple[AttachedModel, Mix]]:
        """For each part the mix of its bank, all of them checked; weights of groups are those of layers there."""
        self._check_not_fused()
        parts = self._attached()
        roles = {part.role for part in parts} | set(self._left_out)
        made = []
        for part in parts:
            of_layers = partial(by_layer, paths=part.bank.layer_names, default=1.0, part=part.role, parts=roles)
            rows = [
                {name: of_layers(w.items()) if isinstance(w, Mapping) else w for name, w in row.items()}
                for row in mixes
            ]
            repeats = num_images_per_prompt if part.role == "denoiser" else 1  # a prompt is encoded once
            made.append((part, part.bank.make_mix(rows, repeats=repeats)))
        return made

    def _is_fused(self) -> bool:
        return any(part.is_fused for part in self._attached())

    def _check_not_fused(self) -> None:
        if self._is_fused():
            raise SVDiffError("the adapter is fused into the model: unfuse it first")

    def _attached(self) -> list[AttachedModel]:
        if not self._parts:
            raise SVDiffError("this adapter has been unloaded: attach the model again")
        return self._parts
