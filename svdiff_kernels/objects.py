"""Files of the factor cache: one decomposition each, in safetensors, checked whole when read.

In the *full* layout all of U, sigma and Vh is there. In the *compact* one the longer factor has only its last rows
(of U: columns): the others are one product of the shorter factor and the weight away, which whoever asks has at hand.
Rows of small singular values stay, since that product would lose them; see `solvers.rows_by_product`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import solvers
from .decompose import ALGORITHM_VERSION
from .errors import SVDiffError
from .factors import Factors

FORMAT_VERSION = 2
LAYOUTS = ("full", "compact")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CHUNK = 2**20  # elements converted at a time
_threads = blake3.AUTO


def _after_fork() -> None:
    global _threads
    _threads = 1  # BLAKE3 would wait for ever for the threads that its parent had started


os.register_at_fork(after_in_child=_after_fork)


def content_hash(weight: Tensor) -> str:
    """BLAKE3, in hex, of a weight's shape and its values as fp32.

    So a weight hashes alike in fp16 and, holding the same values, in fp32.
    """
    digest = blake3(str(tuple(weight.shape)).encode(), max_threads=_threads)
    flat = weight.detach().reshape(-1)
    for chunk in [flat] if flat.is_cpu and flat.dtype == torch.float32 else flat.split(_CHUNK):
        _update(digest, chunk.to("cpu", torch.float32))
    return digest.hexdigest()


def write(path: Path, factors: Factors, *, content: str, rank: str, layout: str, dtype: torch.dtype) -> None:
    """Write an object.

    Args:
        path: of the file.
        factors: of the weight, U and Vh in fp32.
        content: hash of the weight.
        rank: "full" or a number, as it was asked for.
        layout: "full" or "compact".
        dtype: in which U and Vh are stored.
    """
    M, N = factors.shape
    rebuilt = solvers.rows_by_product(factors.sigma, min(M, N)) if layout == "compact" else 0
    if rebuilt == 0:  # nothing can be left out
        layout = "full"
    U, Vh = (factors.U, factors.Vh[rebuilt:]) if M <= N else (factors.U[:, rebuilt:], factors.Vh)
    tensors = {
        "U": U.to("cpu", dtype).contiguous(),
        "sigma": factors.sigma.to("cpu", torch.float32),
        "Vh": Vh.to("cpu", dtype).contiguous(),
    }
    metadata = {
        "format": "svdiff-factors",
        "format_version": str(FORMAT_VERSION),
        "algorithm_version": str(ALGORITHM_VERSION),
        "layout": layout,
        "rebuilt": str(rebuilt),
        "content": content,
        "shape": json.dumps([M, N]),
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
    }
    save_file(tensors, path, metadata | {"checksum": _checksum(tensors, metadata)})


def read(path: Path, weight: Tensor) -> Factors:
    """The factors of an object: mapped into memory if it holds them whole, else rebuilt on the weight's device.

    Args:
        path: of the file.
        weight: what was decomposed.

    Raises:
        FileNotFoundError: there is none.
        OSError, safetensors.SafetensorError, SVDiffError: it is damaged, or no object of this version.
    """
    tensors, metadata = _read(path)
    U, sigma, Vh = tensors["U"], tensors["sigma"], tensors["Vh"]
    rebuilt = int(metadata["rebuilt"])
    if rebuilt == 0:
        return Factors(U, sigma, Vh)
    W = weight.detach().flatten(1)
    U, sigma, Vh = U.to(W.device), sigma.to(W.device), Vh.to(W.device)
    if W.shape[0] <= W.shape[1]:
        return Factors(U, sigma, _long(U, sigma, W, Vh, rebuilt))
    return Factors(_long(Vh.T, sigma, W.T, U.T, rebuilt).T.contiguous(), sigma, Vh)


def read_sigma(path: Path) -> Tensor:
    """The singular values alone, unchecked; errors as of `read`."""
    with _opened(path) as file:
        sigma: Tensor = file.get_tensor("sigma")
        return sigma


def describe(path: Path) -> dict[str, str]:
    """The metadata of an object, which is not read through; errors as of `read`."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        _check_version(metadata)
        return metadata


def check(path: Path) -> dict[str, str]:
    """The metadata of an object, read through; errors as of `read`."""
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in ("U", "sigma", "Vh")}
    if metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise SVDiffError("its checksum does not match")
    return tensors, metadata


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            _check_version(file.metadata() or {})
            yield file
    except RuntimeError as error:  # torch opens the file a second time; by then another process may have pruned it
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone") from error
        raise SVDiffError(str(error)) from error


def _check_version(metadata: Mapping[str, str]) -> None:
    found = metadata.get("format"), metadata.get("format_version")
    if found != ("svdiff-factors", str(FORMAT_VERSION)):
        raise SVDiffError(f"not a factor object of format version {FORMAT_VERSION}: {found}")


def _long(short: Tensor, sigma: Tensor, A: Tensor, tail: Tensor, rebuilt: int) -> Tensor:
    """``[r, X]``: the rebuilt rows, then those that are stored."""
    long = tail.new_empty(len(sigma), A.shape[1])
    head = long[:rebuilt] if long.dtype == torch.float32 else None
    found = solvers.by_product(short[:, :rebuilt].float(), sigma[:rebuilt], A.float(), out=head)
    if head is None:
        long[:rebuilt] = found
    long[rebuilt:] = tail
    return long


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """BLAKE3 over the metadata and the tensors' bytes, in order."""
    digest = blake3(json.dumps(metadata, sort_keys=True).encode(), max_threads=_threads)
    for tensor in tensors.values():
        _update(digest, tensor)
    return str(digest.hexdigest())


def _update(digest: Any, tensor: Tensor) -> None:
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    digest.update(memoryview(content))
