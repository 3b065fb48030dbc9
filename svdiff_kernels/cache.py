"""FactorCache: decompositions on disk, found by the content of the weight.

delta means something only in the basis it was trained in, and near-equal singular values make a recomputed basis
ambiguous: so the same weight must always get the same factors, whoever asks first.

Folders: ``objects/<first two of key>/<key>.safetensors`` (see `objects.py`); ``work/`` with a lock and a folder
for each object that is being made; ``readers/`` (see `leases.py`). An object appears by rename, whole or not at all,
and readers map it into memory. Whoever makes an object holds its lock, and deletes the lock with it; what a killed
process leaves in ``work/`` is deleted by whoever comes next.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from . import objects
from .decompose import ALGORITHM_VERSION, BAR_FORMAT, as_matrix, batches, cost, decomposed
from .errors import SVDiffError
from .factors import Factors
from .leases import in_use, lease_of
from .objects import content_hash

_DAMAGED = (OSError, SafetensorError, SVDiffError)
_AHEAD = 8
"""Objects that the system is told to read while earlier ones are used."""


@dataclass(frozen=True)
class Wanted:
    """One decomposition that is asked for.

    Attributes:
        name: of the weight, for errors.
        weight: the weight.
        rank: how many singular values; None for all.
        content: hash of the weight.
        path: where the cache has it.
    """

    name: str
    weight: Tensor
    rank: int | None
    content: str
    path: Path


class FactorCache:
    """A directory of decompositions, safe to share between processes.

    A directory that cannot be written draws one warning, after which the cache reads what is there and stores nothing.

    Args:
        dir: where; default ``$SVDIFF_CACHE``, else the user's cache directory.
        max_bytes: after a write, forget the objects used longest ago beyond this size. None: no limit.
        layout: of what is written: "full" (U, sigma and Vh; nothing to do on reading), or "compact" (sigma and the
            square factor, a quarter of that for Stable Diffusion; the other factor is one product away, which a GPU
            makes in no time). None is compact where there is an NVIDIA GPU, else full. Both are read.
        dtype: of U and Vh on disk and as they are returned: "float32", "bfloat16" or "float16". sigma is in fp32.

    Example:
        >>> import torch
        >>> from svdiff_kernels import FactorCache
        >>> cache = FactorCache("factors")
        >>> weights = {"q": torch.randn(5, 3), "k": torch.randn(4, 3)}
        >>> made = cache.get_many(weights)
        >>> read = FactorCache("factors").get(weights["q"].clone())  # in another process, say: found by its content
        >>> torch.equal(read.U, made["q"].U)
        True
        >>> cache.verify()  # nothing is damaged
        {}
    """

    def __init__(
        self,
        dir: str | Path | None = None,
        max_bytes: int | None = None,
        *,
        layout: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if layout is not None and layout not in objects.LAYOUTS:
            raise SVDiffError(f"cache layout {layout!r} is not one of {', '.join(objects.LAYOUTS)}")
        if dtype not in objects.DTYPES:
            raise SVDiffError(f"cache dtype {dtype!r} is not one of {', '.join(objects.DTYPES)}")
        self.dir = Path(dir or os.environ.get("SVDIFF_CACHE") or user_cache_path("svdiff")).expanduser()
        self.max_bytes, self.layout, self.dtype = max_bytes, layout, dtype
        self._writable: bool | None = None

    def get(self, weight: Tensor, rank: int | None = None, *, content: str | None = None) -> Factors:
        """The factors of a weight: read if they are there, else computed and stored.

        Args:
            weight: see `decompose`.
            rank: see `decompose`.
            content: its `content_hash`, if at hand.

        Raises:
            SVDiffError: the weight cannot be decomposed; see `decompose`.
        """
        ((_, factors),) = self._get([self._wanted("", weight, rank, content)])
        return factors

    def sigma(self, weight: Tensor, rank: int | None = None, *, content: str | None = None) -> Tensor | None:
        """The singular values of a weight alone, unchecked, or None if they are not there; arguments as of `get`."""
        try:
            return objects.read_sigma(self._wanted("", weight, rank, content).path)
        except _DAMAGED:
            return None

    def get_many(
        self, weights: Mapping[str, Tensor], rank: int | None = None, progress: bool = False
    ) -> dict[str, Factors]:
        """`get` for each weight by name; an error names the weight. ``progress`` shows a bar."""
        total = sum(cost(weight) for weight in weights.values())
        found: dict[str, Factors] = {}
        with tqdm(total=total, desc="factors", disable=not progress, bar_format=BAR_FORMAT) as bar:
            for name, factors in self.iterate(weights, rank):
                found[name] = factors
                bar.update(cost(weights[name]))
        return {name: found[name] for name in weights}

    def iterate(
        self, weights: Mapping[str, Tensor], rank: int | None = None, *, contents: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, Factors]]:
        """`get` for each weight by name: first, in order, what is there, then the others as they are made.

        Weights that are missing are decomposed together; what another process is making is waited for.

        Args:
            weights: by name.
            rank: see `get`.
            contents: the `content_hash` of each, if at hand.
        """
        yield from self._get([
            self._wanted(name, weight, rank, contents[name] if contents else None) for name, weight in weights.items()
        ])  # fmt: skip

    def wanted(self, weights: Mapping[str, Tensor], rank: int | None = None) -> dict[str, Wanted]:
        """What `get_many` would look for; reads every weight once."""
        return {name: self._wanted(name, weight, rank, None) for name, weight in weights.items()}

    def verify(self) -> dict[Path, str]:
        """Read every object through; the damaged ones, with what is wrong. Nothing is deleted."""
        problems = {}
        for path in self._objects():
            try:
                objects.check(path)
            except FileNotFoundError:  # pruned by another process
                continue
            except _DAMAGED as error:
                problems[path] = str(error)
        return problems

    def prune(self, max_bytes: int | None = None) -> int:
        """Delete the objects used longest ago until at most ``max_bytes`` (default: the cache's limit) remain.

        What a living process, this one too, has asked the cache for, stays. What killed processes left goes.

        Returns:
            How many bytes were freed.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        freed, kept = self._sweep(), in_use(self.dir / "readers")
        if limit is None:
            return freed
        entries = self._statuses()
        total = sum(status.st_size for _, status in entries)
        for path, status in sorted(entries, key=lambda entry: entry[1].st_mtime_ns):
            if total <= limit:
                break
            if path.stem not in kept:
                path.unlink(missing_ok=True)
                total -= status.st_size
                freed += status.st_size
        return freed

    def entries(self) -> list[tuple[Path, os.stat_result, dict[str, str]]]:
        """Every object, its status and metadata (see `objects.describe`), the last used first; no damaged ones."""
        found = []
        for path, status in sorted(self._statuses(), key=lambda entry: entry[1].st_mtime_ns, reverse=True):
            with suppress(*_DAMAGED):
                found.append((path, status, objects.describe(path)))
        return found

    def size(self) -> tuple[int, int]:
        """``(objects, bytes)`` on disk."""
        sizes = [status.st_size for _, status in self._statuses()]
        return len(sizes), sum(sizes)

    def add(self, source: Path, wanted: Wanted) -> bool:
        """Take an object over from a file, such as one of another cache; False if it is here already.

        Raises:
            SVDiffError: the file is damaged, or not the decomposition that is wanted; or nothing can be written here.
        """
        try:
            metadata = objects.check(source)
        except _DAMAGED as error:
            raise SVDiffError(f"{source} is damaged: {error}") from None
        expected = {
            "content": wanted.content,
            "rank": _rank(wanted),
            "dtype": self.dtype,
            "algorithm_version": str(ALGORITHM_VERSION),
        }
        for name, value in expected.items():
            if metadata[name] != value:
                what = f"{name} {metadata[name]}, not {value}"
                raise SVDiffError(f"{source} is not the decomposition of {wanted.name} that is wanted: {what}")
        self._require_writable()
        with self._lock(wanted.path):
            if wanted.path.exists():
                return False
            with self._partial(wanted.path) as partial:
                shutil.copyfile(source, partial)
                self._publish(partial, wanted.path)
        return True

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder beside the objects, deleted at the end; if this process is killed, by whoever comes next.

        Raises:
            SVDiffError: nothing can be written here.
        """
        self._require_writable()
        path = Path(uuid.uuid4().hex)
        with self._lock(path), self._partial_folder(path) as folder:
            yield folder

    def _wanted(self, name: str, weight: Tensor, rank: int | None, content: str | None) -> Wanted:
        short = min(as_matrix(weight, name, check_values=False).shape)
        if rank is not None and rank < 1:
            raise SVDiffError(f"rank must be at least 1, not {rank}")
        if rank is not None and rank >= short:
            rank = None
        content = content or content_hash(weight)
        parts = (content, rank or "full", self.dtype, ALGORITHM_VERSION, objects.FORMAT_VERSION)
        key = blake3(repr(parts).encode()).hexdigest()
        return Wanted(name, weight, rank, content, self.dir / "objects" / key[:2] / f"{key}.safetensors")

    def _get(self, wanted: Sequence[Wanted]) -> Iterator[tuple[str, Factors]]:
        missing = []
        for i, one in enumerate(wanted):
            for ahead in wanted[i + _AHEAD : i + _AHEAD + 1] if i else wanted[: _AHEAD + 1]:
                _read_ahead(ahead.path)
            factors = self._read(one, warn=True)
            if factors is None:
                missing.append(one)
            else:
                yield one.name, factors
        if not missing:
            return
        for one in missing:  # before minutes of work on others
            as_matrix(one.weight, one.name)
        groups = [[missing[i] for i in batch] for batch in batches([one.weight for one in missing])]
        if self._prepare():
            yield from self._make(groups)
            self.prune()
        else:
            for group in groups:
                yield from ((one.name, factors) for one, factors in self._compute(group))

    def _make(self, groups: Iterable[Sequence[Wanted]]) -> Iterator[tuple[str, Factors]]:
        """Group by group. What another process is at, is left to it, and looked for at the end."""
        elsewhere: list[Wanted] = []
        for group in groups:
            with ExitStack() as locks:
                mine: list[Wanted] = []
                for one in group:
                    (mine if self._hold(one, locks, blocking=False) else elsewhere).append(one)
                found = self._make_locked(mine)
            yield from found
        for one in elsewhere:
            with ExitStack() as locks:
                self._hold(one, locks, blocking=True)
                found = self._make_locked([one])
            yield from found

    def _hold(self, one: Wanted, locks: ExitStack, *, blocking: bool) -> bool:
        """Take an object's lock, or give up storing anything; False where another process has it."""
        try:
            locks.enter_context(self._lock(one.path, blocking=blocking))
        except Timeout:
            return False
        except OSError as error:
            self._give_up(error)
        return True

    def _make_locked(self, group: Sequence[Wanted]) -> list[tuple[str, Factors]]:
        found = {one.name: self._read(one) for one in group}  # another process may have been first
        for one, factors in self._compute([one for one in group if found[one.name] is None]):
            found[one.name] = self._write(one, factors)
        return [(name, factors) for name, factors in found.items() if factors is not None]

    def _compute(self, group: Sequence[Wanted]) -> Iterator[tuple[Wanted, Factors]]:
        if group:
            weights = [one.weight.detach().to(torch.float32) for one in group]  # the values that were hashed
            for i, factors in decomposed(weights, group[0].rank, names=[one.name for one in group]):
                yield group[i], factors.to(dtype=objects.DTYPES[self.dtype])

    def _read(self, wanted: Wanted, *, warn: bool = False) -> Factors | None:
        lease_of(self.dir / "readers").add(wanted.path.stem)
        try:
            factors = objects.read(wanted.path, wanted.weight)
        except FileNotFoundError:
            return None
        except _DAMAGED as error:
            if warn:
                warnings.warn(f"factor cache: {wanted.path} is damaged ({error}) and is made again", stacklevel=4)
            return None
        with suppress(OSError):
            os.utime(wanted.path)  # the time of use, for prune
        return factors

    def _write(self, wanted: Wanted, factors: Factors) -> Factors:
        """Store factors, and hand back what a reader would get: the same numbers, mapped."""
        if not self._writable:
            return factors
        layout = self.layout or ("compact" if torch.cuda.is_available() else "full")
        dtype = objects.DTYPES[self.dtype]
        try:
            with self._partial(wanted.path) as partial:
                objects.write(partial, factors, content=wanted.content, rank=_rank(wanted), layout=layout, dtype=dtype)
                self._publish(partial, wanted.path)
            return objects.read(wanted.path, wanted.weight)
        except (OSError, SafetensorError) as error:
            self._give_up(error)
            return factors

    def _publish(self, partial: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)

    def _objects(self) -> Iterator[Path]:
        return self.dir.glob("objects/*/*.safetensors")

    def _statuses(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self._objects():
            with suppress(FileNotFoundError):  # pruned by another process
                found.append((path, path.stat()))
        return found

    @contextmanager
    def _partial(self, path: Path) -> Iterator[Path]:
        """Where to write an object: in a folder of its own, since safetensors first writes a file of any name there."""
        with self._partial_folder(path) as folder:
            yield folder / path.name

    @contextmanager
    def _partial_folder(self, path: Path) -> Iterator[Path]:
        folder = self._partial_path(path)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _partial_path(self, path: Path) -> Path:
        return self.dir / "work" / f"{path.stem}.partial"

    @contextmanager
    def _lock(self, path: Path, *, blocking: bool = True) -> Iterator[None]:
        """Hold the lock of an object; raises Timeout where another has it and that is not to be waited for."""
        lock = self.dir / "work" / f"{path.stem}.lock"
        with FileLock(lock, blocking=blocking):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # who waits for it finds it nameless, and takes a new one

    def _sweep(self) -> int:
        """Delete what killed processes left in ``work/``; returns how many bytes."""
        freed = 0
        for key in {path.stem for path in self.dir.glob("work/*.*")}:
            path = Path(key)
            with suppress(Timeout, OSError), self._lock(path, blocking=False):
                folder = self._partial_path(path)
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                shutil.rmtree(folder)
                freed += size
        return freed

    def _prepare(self) -> bool:
        """Whether objects can be written; finds out once."""
        if self._writable is None:
            try:
                (self.dir / "work").mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.dir / "work"):
                    self._writable = True
            except OSError as error:
                self._give_up(error)
        return bool(self._writable)

    def _require_writable(self) -> None:
        if not self._prepare():
            raise SVDiffError(f"factor cache {self.dir} cannot be written")

    def _give_up(self, error: Exception) -> None:
        if self._writable is not False:
            reason = getattr(error, "strerror", None) or str(error)
            warnings.warn(
                f"factor cache {self.dir} cannot be written ({reason}): decompositions are not kept", stacklevel=4
            )
        self._writable = False


def _rank(wanted: Wanted) -> str:
    return "full" if wanted.rank is None else str(wanted.rank)


def _read_ahead(path: Path) -> None:
    """Have the system read a file into memory while this process does something else."""
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)
