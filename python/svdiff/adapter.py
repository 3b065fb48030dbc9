"""Adapter: the shifts of an attached model, to train, save, load, mix and take off again."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from svdiff_kernels import SVDiffError
from svdiff_kernels.bank import TRAINED

from . import checkpoint
from .attached import AttachedModel
from .parking import ParkingLot


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

    def param_groups(
        self, lr: float = 1e-3, lr_1d: float = 1e-6, *, lr_text_encoder: float | None = None
    ) -> list[dict[str, Any]]:
        """What trains, as groups for an optimiser.

        Args:
            lr: rate of matrices.
            lr_1d: rate of the weights of norms.
            lr_text_encoder: rate of text encoders' matrices; `lr` if None.
        """
        rates: dict[float, list[Tensor]] = {}
        for part in self._attached():
            own = lr if part.role == "denoiser" or lr_text_encoder is None else lr_text_encoder
            for parameter, rate in zip(part.bank.parameters_of(TRAINED), (own, lr_1d), strict=True):
                rates.setdefault(rate, []).append(parameter)
        groups = [{"params": [p for p in found if p.numel()], "lr": rate} for rate, found in rates.items()]
        return [group for group in groups if group["params"]]

    def num_parameters(self) -> int:
        """How many numbers one adapter has."""
        return sum(p.numel() for part in self._attached() for p in part.bank.parameters_of(TRAINED))

    def save_weights(
        self, directory: str | os.PathLike[str], adapter_name: str | None = None, **metadata: object
    ) -> list[Path]:
        """Write an adapter's delta files into a folder (made if need be), all or none of them.

        Args:
            directory: where to.
            adapter_name: which adapter; "default" if None.
            metadata: what else the files should say, such as the prompts; anything that JSON can hold.

        Returns:
            The files written.
        """
        name = adapter_name or TRAINED
        files = {
            Path(directory) / checkpoint.FILE_NAMES[part.role]: checkpoint.encode(
                part.bank.delta_dict(name), part.layout, metadata
            )
            for part in self._attached()
        }
        checkpoint.write(files)
        return list(files)

    def load_weights(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Load delta files as an adapter, which becomes the only active one.

        Args:
            path: a folder with delta files, or the denoiser's file (the text encoders' are looked for beside it).
            adapter_name: what to call it; "default" if None. An adapter of that name is replaced.

        Raises:
            SVDiffError: a file is missing, damaged, or does not fit the attached layers to the key. Nothing is changed.
        """
        parts = {part.role: part for part in self._attached()}
        files = checkpoint.find_files(path)
        if extra := sorted(files.keys() & self._left_out):
            raise SVDiffError(f"{files[extra[0]]} has no place here: attach with text_encoder=True")
        if missing := [role for role in parts if role not in files]:
            raise SVDiffError(f"{path} has no {checkpoint.FILE_NAMES[missing[0]]} for the attached {missing[0]}")
        self.load_deltas(
            {role: checkpoint.read(files[role]).for_layout(part.layout) for role, part in parts.items()}, adapter_name
        )

    def load_deltas(self, deltas: Mapping[str, Mapping[str, Tensor]], adapter_name: str | None = None) -> None:
        """Set an adapter's shifts from tensors, ``{"denoiser": {module path: delta}, ...}``, and make it active."""
        name = adapter_name or TRAINED
        for part in self._attached():
            part.bank.load_delta_dict(name, deltas[part.role])
        self.set_adapters(name)

    def set_adapters(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Choose which adapters act, and how much of each: ``relu(sigma + sum of weight * delta)``.

        Args:
            names: adapters; an empty list is the base model.
            weights: one for all, or one each; 1 if None.

        Raises:
            SVDiffError: an unknown or repeated name, or another number of weights than of names.
        """
        names = [names] if isinstance(names, str) else list(names)
        if weights is None or isinstance(weights, int | float):
            weights = [1.0 if weights is None else float(weights)] * len(names)
        if len(weights) != len(names) or len(set(names)) != len(names):
            raise SVDiffError(f"set_adapters: {len(names)} names ({', '.join(names)}) for {len(weights)} weights")
        for part in self._attached():
            part.bank.set_mix(dict(zip(names, weights, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return list(self._attached()[0].bank.get_mix())

    def get_list_adapters(self) -> list[str]:
        """Names of all adapters."""
        return list(self._attached()[0].bank.names)

    def delete_adapters(self, names: str | Sequence[str]) -> None:
        """Forget adapters.

        Raises:
            SVDiffError: an unknown name, or "default", which is always there.
        """
        names = [names] if isinstance(names, str) else list(names)
        known = [name for name in self.get_list_adapters() if name != TRAINED]
        if unknown := [name for name in names if name not in known]:
            raise SVDiffError(f"no adapter {unknown[0]!r} can be deleted; there are: {', '.join(known) or 'none'}")
        for part in self._attached():
            for name in names:
                part.bank.remove(name)

    def unload(self) -> None:
        """Give the original model back, to the bit; this adapter is of no more use then."""
        for part in self._attached():
            part.detach()
        self._parts.clear()
        self._lot.close()

    def _attached(self) -> list[AttachedModel]:
        if not self._parts:
            raise SVDiffError("this adapter has been unloaded: attach the model again")
        return self._parts
