"""FactorCache: decompositions on disk, found by the content of the weight.

delta means something only in the basis it was trained in, and near-equal singular values make a recomputed basis
ambiguous: so the same weight must always get the same factors, whoever asks first.

Layout: ``objects/<first two of key>/<key>.safetensors`` holds U, sigma and Vh in fp32, with metadata; ``.lock`` beside
it serialises writers. An object appears by rename, whole or not at all, and readers map it into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .decompose import ALGORITHM_VERSION, as_matrix, decompose
from .errors import SVDiffError
from .factors import Factors

FORMAT_VERSION = 1
_CHUNK = 2**22  # of elements to hash, of bytes to check


def content_hash(weight: Tensor) -> str:
    """blake2b-256, in hex, of a weight's shape and its values as little-endian fp32.

    So a weight hashes alike in fp16 and, holding the same values, in fp32.
    """
    digest = hashlib.blake2b(str(tuple(weight.shape)).encode(), digest_size=32)
    for chunk in weight.detach().reshape(-1).split(_CHUNK):
        digest.update(
            memoryview(chunk.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)).cast("B")
        )
    return digest.hexdigest()


class FactorCache:
    """A directory of decompositions, safe to share between processes.

    A directory that cannot be written draws one warning, after which the cache reads what is there and stores nothing.

    Args:
        dir: where; default ``$SVDIFF_CACHE``, else the user's cache directory.
        max_bytes: after a write, forget the objects used longest ago beyond this size. None: no limit.
    """

    def __init__(self, dir: str | Path | None = None, max_bytes: int | None = None) -> None:
        self.dir = Path(dir or os.environ.get("SVDIFF_CACHE") or user_cache_path("svdiff")).expanduser()
        self.max_bytes = max_bytes
        self._writable = True

    def get(self, weight: Tensor, rank: int | None = None) -> Factors:
        """The fp32 factors of a weight: read if they are there, else computed and stored.

        Raises:
            SVDiffError: the weight cannot be decomposed; see `decompose`.
        """
        short = min(as_matrix(weight).shape)
        rank = None if rank is not None and rank >= short else rank
        content = content_hash(weight)
        path = self._path(content, rank)
        factors = self._read(path)
        if factors is not None:
            return factors
        if not self._prepare(path.parent):
            return _compute(weight, rank)
        with FileLock(path.with_suffix(".lock")):
            factors = self._read(path, warn=True)  # another process may have been first
            if factors is None:
                factors = self._write(path, _compute(weight, rank), content, rank)
        if self.max_bytes is not None:
            self.prune(keep=path)
        return factors

    def get_many(
        self, weights: Mapping[str, Tensor], rank: int | None = None, progress: bool = False
    ) -> dict[str, Factors]:
        """`get` for each weight by name; an error names the weight. ``progress`` shows a bar."""
        found = {}
        for name, weight in tqdm(weights.items(), desc="factors", unit="weight", disable=not progress):
            try:
                found[name] = self.get(weight, rank)
            except SVDiffError as error:
                raise SVDiffError(f"{name}: {error}") from None
        return found

    def verify(self) -> dict[Path, str]:
        """Read every object through; the damaged ones, with what is wrong. Nothing is deleted."""
        problems = {}
        for path in self._objects():
            try:
                _load(path)
            except (OSError, SafetensorError, SVDiffError) as error:
                problems[path] = str(error)
        return problems

    def prune(self, max_bytes: int | None = None, *, keep: Path | None = None) -> int:
        """Delete the objects used longest ago until at most ``max_bytes`` (default: the cache's limit) remain.

        Returns:
            How many bytes were freed. Objects that are mapped into memory stay usable there.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        freed = 0
        for leftover in self.dir.glob("objects/*/*.tmp"):
            if leftover.stat().st_mtime < time.time() - 3600:  # its writer is gone
                freed += _delete(leftover)
        if limit is None:
            return freed
        newest_first = sorted(self._objects(), key=lambda p: p.stat().st_mtime_ns, reverse=True)
        total = keep.stat().st_size if keep is not None and keep.exists() else 0
        for path in newest_first:
            if path == keep:
                continue
            total += path.stat().st_size
            if total > limit:
                freed += _delete(path)
        return freed

    def size(self) -> tuple[int, int]:
        """``(objects, bytes)`` on disk."""
        sizes = [path.stat().st_size for path in self._objects()]
        return len(sizes), sum(sizes)

    def _objects(self) -> Iterator[Path]:
        return self.dir.glob("objects/*/*.safetensors")

    def _path(self, content: str, rank: int | None) -> Path:
        parts = (content, "full" if rank is None else rank, ALGORITHM_VERSION)
        key = hashlib.blake2b(repr(parts).encode(), digest_size=32).hexdigest()
        return self.dir / "objects" / key[:2] / f"{key}.safetensors"

    def _prepare(self, folder: Path) -> bool:
        if self._writable:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    return True
            except OSError as error:
                self._give_up(error)
        return False

    def _give_up(self, error: Exception) -> None:
        self._writable = False
        reason = getattr(error, "strerror", None) or str(error)
        warnings.warn(
            f"factor cache {self.dir} cannot be written ({reason}): decompositions are not kept", stacklevel=4
        )

    def _read(self, path: Path, *, warn: bool = False) -> Factors | None:
        try:
            factors = _load(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, SVDiffError) as error:
            if warn:
                warnings.warn(f"factor cache: {path} is damaged ({error}) and is made again", stacklevel=3)
            return None
        with suppress(OSError):
            os.utime(path)  # the time of use, for prune
        return factors

    def _write(self, path: Path, factors: Factors, content: str, rank: int | None) -> Factors:
        """Store factors, and hand back what a reader would get: the same numbers, mapped."""
        tensors = {"U": factors.U.cpu(), "sigma": factors.sigma.cpu(), "Vh": factors.Vh.cpu()}
        metadata = {
            "format": "svdiff-factors",
            "format_version": str(FORMAT_VERSION),
            "layout": "full",
            "algorithm_version": str(ALGORITHM_VERSION),
            "content": content,
            "shape": json.dumps(list(factors.shape)),
            "rank": "full" if rank is None else str(rank),
            "checksum": _checksum(tensors),
        }
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata)
            temporary.replace(path)
            return _load(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            self._give_up(error)
            return factors


def _compute(weight: Tensor, rank: int | None) -> Factors:
    return decompose(weight.detach().to(torch.float32), rank)  # of the values that were hashed


def _load(path: Path) -> Factors:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        found = metadata.get("format"), metadata.get("format_version"), metadata.get("layout")
        if found != ("svdiff-factors", str(FORMAT_VERSION), "full"):
            raise SVDiffError(f"not a factor object of format version {FORMAT_VERSION}: {found}")
        tensors = {name: file.get_tensor(name) for name in ("U", "sigma", "Vh")}
    if _checksum(tensors) != metadata.get("checksum"):
        raise SVDiffError("its checksum does not match")
    return Factors(**tensors)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """blake2b-256 over the blake2b-256 digests of the tensors' bytes in chunks of 4 MiB, in order."""
    chunks = [chunk for t in tensors.values() for chunk in t.contiguous().view(-1).view(torch.uint8).split(_CHUNK)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = pool.map(lambda chunk: hashlib.blake2b(chunk.numpy(), digest_size=32).digest(), chunks)
        return hashlib.blake2b(b"".join(digests), digest_size=32).hexdigest()


def _delete(path: Path) -> int:
    size = path.stat().st_size
    path.unlink()
    return size
