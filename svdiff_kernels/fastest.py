"""Which of several implementations is the fastest for arguments like these: measured once, remembered on disk.

No rule made on one GPU holds on the next, so the rule is made where it is used. ``SVDIFF_AUTOTUNE=0`` takes the first
implementation unseen; so does the capture of a CUDA graph, in which nothing can be timed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

_WARMUPS, _RUNS, _ROUNDS = 3, 10, 3


def fastest(op: str, candidates: Mapping[str, Callable[..., Any]], arguments: Sequence[Any]) -> Callable[..., Any]:
    """One of `candidates`, all of which can serve op with these arguments; the first where nothing can be measured."""
    first = next(iter(candidates.values()))
    if len(candidates) == 1 or os.environ.get("SVDIFF_AUTOTUNE") == "0":
        return first
    key = _key(op, arguments)
    name = _read().get(key)
    if name is None or name not in candidates:
        if capturing():
            return first
        name = min(candidates, key=lambda each: _seconds(lambda: candidates[each](*arguments)))
        _remember(key, name)
    return candidates[name]


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def exactly(arguments: Sequence[Any]) -> tuple[object, ...]:
    """All that an implementation may depend on but the values in tensors, and quick to make."""
    return tuple((a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in _flat(arguments))


def _key(op: str, arguments: Sequence[Any]) -> str:
    """Op, device, versions, types and sizes; of the rows that the first tensor has, the next power of two."""
    tensors = list(tensors_of(arguments))
    rows = tensors[0].shape[:-1]
    device = torch.cuda.get_device_name(tensors[0].device) if tensors[0].is_cuda else "cpu"
    parts = [op, device, torch.__version__, f"rows {1 << max(0, rows.numel() - 1).bit_length()}"]
    for tensor in tensors:
        size = "rows" if tensor.shape[:-1] == rows else "x".join(map(str, tensor.shape[:-1]))
        layout = "dense" if tensor.is_contiguous() else "strided"
        parts.append(f"{str(tensor.dtype).removeprefix('torch.')} {size}x{tensor.shape[-1]} {layout}")
    parts += [str(a) for a in _flat(arguments) if isinstance(a, bool)]
    return "; ".join(parts)


def tensors_of(arguments: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among an op's arguments, in lists or not."""
    return (argument for argument in _flat(arguments) if isinstance(argument, Tensor))


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    for argument in arguments:
        yield from argument if isinstance(argument, list | tuple) else (argument,)


def _seconds(run: Callable[[], object]) -> float:
    """Of the quickest of some rounds."""
    for _ in range(_WARMUPS):
        run()
    rounds = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_RUNS):
            run()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / 1e3 / _RUNS)
    return min(rounds)


def _path() -> Path:
    return Path(os.environ.get("SVDIFF_CACHE") or user_cache_path("svdiff")).expanduser() / "fastest.json"


def _read() -> dict[str, str]:
    with suppress(OSError, ValueError):
        found = json.loads(_path().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _remember(key: str, name: str) -> None:
    with suppress(OSError):  # what cannot be kept is measured again next time
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".fastest.", delete=False) as file:
            json.dump(_read() | {key: name}, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
