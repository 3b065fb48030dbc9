"""Checkpoints of a run: what it needs to go on, to the bit, as if it had never stopped.

``checkpoint-<step>/`` in the output folder holds what has been learnt so far, ready for use, and
``training_state.safetensors``: what trains, the optimiser's tensors, and in the metadata everything that is no tensor.
Nothing is pickled, and no generator's state is needed: see `chance`. A checkpoint appears by rename, whole or not at
all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdiff_kernels import SVDiffError

from ..outputs import writing

STATE_FILE = "training_state.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_VERSION = "1"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds besides what has been learnt.

    Attributes:
        step: optimiser steps taken.
        config: settings of the run.
        tensors: by name.
        values: by name; anything that JSON can hold.
    """

    step: int
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:  # there is none yet, or a run that failed has just taken it away
        return []
    found = {int(match[1]): directory / name for name in names if (match := _NAME.fullmatch(name))}
    return [found[step] for step in sorted(found)]


def find(directory: Path, name: str) -> Path | None:
    """The checkpoint that a run shall go on from: one of its own by name, the ``latest``, or another's by path.

    Returns None if there is no latest yet.

    Raises:
        SVDiffError: there is no such checkpoint.
    """
    own = checkpoints(directory)
    if name == "latest":
        return own[-1] if own else None
    for path in (directory / name, Path(name).expanduser()):
        if (path / STATE_FILE).is_file():
            return path
    there = ", ".join(path.name for path in own) or "no checkpoint"
    raise SVDiffError(f"resume_from_checkpoint {name}: no such checkpoint; in {directory} there is {there}")


def save(directory: Path, state: State, learnt: Callable[[Path], object], *, limit: int | None = None) -> Path:
    """Write ``checkpoint-<step>`` into a folder; delete later ones, of a course that was given up, and the oldest.

    Args:
        directory: of the run.
        state: see there.
        learnt: writes what has been learnt into a folder.
        limit: how many checkpoints may stay.

    Raises:
        SVDiffError: it cannot be written; earlier ones are as they were.
    """
    path = directory / f"checkpoint-{state.step}"
    partial = path.with_name(f".{path.name}.partial")
    sweep(directory)
    try:
        with writing(path):
            partial.mkdir()
            learnt(partial)
            metadata = {"version": _VERSION, "step": str(state.step)}
            metadata |= {"config": json.dumps(state.config), "values": json.dumps(state.values)}
            save_file(_apart(state.tensors), partial / STATE_FILE, metadata)
            _sync(*partial.rglob("*"), partial)
            if path.exists():
                path.rename(path.with_name(f".{path.name}.replaced"))
            partial.rename(path)
            _sync(directory)
    finally:
        sweep(directory)
    found = checkpoints(directory)
    newest = found.index(path) + 1
    for old in found[newest:] + found[: newest - limit if limit and limit < newest else 0]:
        partial = old.with_name(f".{old.name}.partial")  # or half a checkpoint would bear its name
        old.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)
    return path


def load(path: Path) -> State:
    """Read a checkpoint.

    Raises:
        SVDiffError: there is none, or it is damaged.
    """
    file = path / STATE_FILE
    if not file.is_file():
        raise SVDiffError(f"{path} is no checkpoint of svdiff train: it has no {STATE_FILE}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (no mapping)
        if metadata.get("version") != _VERSION:
            raise SVDiffError(f"{file} is of another version of svdiff")
        return State(int(metadata["step"]), json.loads(metadata["config"]), tensors, json.loads(metadata["values"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise SVDiffError(f"{file} is damaged: {error}") from error


def sweep(directory: Path) -> None:
    """Delete what a killed run has left half-written or half-deleted, and put back what it was about to replace."""
    for path in directory.glob(".checkpoint-*.replaced"):
        target = path.with_name(path.name[1 : -len(".replaced")])
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
    for path in directory.glob(".checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def flatten(prefix: str, content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], Any]:
    """A nested ``state_dict`` as tensors by name, and the rest with their names in the tensors' places."""
    tensors: dict[str, Tensor] = {}

    def walk(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"items": [[key, walk(f"{name}.{key}", inner)] for key, inner in value.items()]}
        if isinstance(value, list | tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [walk(f"{name}.{i}", inner) for i, inner in enumerate(value)]}
        return {"value": value}

    return tensors, walk(prefix, content)


def unflatten(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """What `flatten` was given."""
    ((kind, content),) = rest.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: unflatten(tensors, inner) for key, inner in content}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(unflatten(tensors, inner) for inner in content)
    return content


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, none in the memory of another (as bitsandbytes has its tables), which safetensors refuses."""
    taken: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return apart


def _sync(*paths: Path) -> None:
    """Have files and folders on the disk, not only on their way there: a machine may fail too."""
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
