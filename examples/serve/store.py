"""Adapters in a folder: loaded on demand, forgotten when there are too many, uploaded only after every check.

Several processes may serve one folder, each with a store of its own.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from svdiff import Adapter
from svdiff.checkpoint import FILE_NAMES, read_all
from torch import Tensor

from svdiff_kernels import SVDiffError

MAX_FILE_BYTES = 32 * 2**20
"""Of an uploaded file. Shifts of the largest models that people fine-tune are a tenth of that."""
MAX_HEADER_BYTES = 2**20
"""Of the JSON at its beginning, which is read before anything can be known of the rest."""

_NAME = re.compile(r"(?!default$)[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # "default" is the attached pipeline's own

Version = tuple[tuple[str, int, int, int], ...]
"""The files of an adapter, by what a replaced file has another of."""


class AdapterStore:
    """The adapters that requests may name.

    Args:
        adapter: of the pipeline.
        folder: one sub-folder with delta files for each.
        most: how many are in memory at a time; those that were used last.
    """

    def __init__(self, adapter: Adapter, folder: Path, most: int) -> None:
        self._adapter, self._folder, self._most = adapter, folder, most
        self._loaded: OrderedDict[str, Version] = OrderedDict()
        self._lock = folder / ".lock"
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # a folder that cannot be written: nobody uploads, and nothing needs a lock
            self._lock.touch()

    def names(self) -> list[str]:
        """All of the folder."""
        with self._locked(fcntl.LOCK_SH):
            return sorted(path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def loaded(self) -> list[str]:
        """Those in memory, the one used last at the end."""
        return list(self._loaded)

    def check(self, name: str) -> None:
        """Raises SVDiffError if there is no adapter of this name, or one that does not fit the model."""
        self._news(name)

    def use(self, names: Collection[str]) -> None:
        """Have these in memory as they are in the folder now, before they are mixed; for the thread that draws.

        Raises:
            SVDiffError: see `check`.
        """
        for name in names:
            if (news := self._news(name)) is not None:
                version, deltas = news
                self._adapter.load_deltas(deltas, name, activate=False)
                self._loaded[name] = version
            self._loaded.move_to_end(name)
        while len(self._loaded) > max(self._most, len(names)):
            oldest, _ = self._loaded.popitem(last=False)
            self._adapter.delete_adapters(oldest)

    def add(self, name: str, files: Mapping[str, bytes]) -> None:
        """Keep an uploaded adapter, if it is one for this very model; an earlier one of this name is replaced.

        Args:
            name: letters, digits, ``-`` and ``_``.
            files: delta files, by part of the pipeline ("denoiser", "text_encoder", ...).

        Raises:
            SVDiffError: why not. Nothing is left of it then.
        """
        if not _NAME.fullmatch(name):
            raise SVDiffError(
                "a name is 1 to 64 letters, digits, '-' or '_', begins with none of the last two, and is not 'default'"
            )
        if "denoiser" not in files or files.keys() - FILE_NAMES.keys():
            raise SVDiffError(f"give a file for the denoiser, and no others than {', '.join(FILE_NAMES)}")
        staging = Path(tempfile.mkdtemp(prefix=".upload-", dir=self._folder))
        new, target, aside = staging / "new", self._folder / name, self._aside(name)
        try:
            new.mkdir()
            for part, content in files.items():
                _check_size(part, content)
                (new / FILE_NAMES[part]).write_bytes(content)
            if any(not file.base_hashes() for file in read_all(new).values()):
                raise SVDiffError("a file does not say for which base model it was made")
            self._adapter.read_weights(new)
            with self._locked(fcntl.LOCK_EX):
                if os.path.lexists(target):
                    if os.path.lexists(aside):
                        aside.rename(staging / "older")
                    target.rename(aside)
                new.rename(target)
                if os.path.lexists(aside):
                    aside.rename(staging / "old")
        except SVDiffError as error:
            raise SVDiffError(str(error).replace(str(new), name)) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _news(self, name: str) -> tuple[Version, dict[str, dict[str, Tensor]]] | None:
        """An adapter in the folder, unless it is the one in memory."""
        with self._locked(fcntl.LOCK_SH):
            places = [self._folder / name, self._aside(name)] if _NAME.fullmatch(name) else []
            if (place := next(filter(Path.is_dir, places), None)) is None:
                raise SVDiffError(f"there is no adapter {name[:64]!r}")
            version = _version(place)
            if self._loaded.get(name) == version:
                return None
            try:
                return version, self._adapter.read_weights(place)
            except SVDiffError as error:
                raise SVDiffError(
                    str(error).replace(f"{self._folder}/", "")
                ) from error  # whose path is nobody's business

    def _aside(self, name: str) -> Path:
        """Where an adapter is while another takes its place, and stays if that process dies."""
        return self._folder / f".replaced-{name}"

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Keep adapters of the folder from being replaced (LOCK_SH), or others from reading them too (LOCK_EX)."""
        if how == fcntl.LOCK_SH and not self._lock.exists():
            yield
            return
        with self._lock.open("r" if how == fcntl.LOCK_SH else "a") as file:
            fcntl.flock(file, how)
            yield


def _version(folder: Path) -> Version:
    found = []
    for name in FILE_NAMES.values():
        with suppress(FileNotFoundError):
            status = (folder / name).stat()
            found.append((name, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def _check_size(part: str, content: bytes) -> None:
    if len(content) > MAX_FILE_BYTES:
        raise SVDiffError(f"the {part}'s file has more than {MAX_FILE_BYTES // 2**20} MiB")
    if len(content) < 8 or int.from_bytes(content[:8], "little") > min(MAX_HEADER_BYTES, len(content) - 8):
        raise SVDiffError(f"the {part}'s file is no safetensors file, or one with a header over 1 MiB")
