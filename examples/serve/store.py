"""Adapters in a folder: loaded on demand, forgotten when there are too many, uploaded only after every check."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path

from svdiff import Adapter
from svdiff.checkpoint import FILE_NAMES, read_all

from svdiff_kernels import SVDiffError

MAX_FILE_BYTES = 32 * 2**20
"""Of an uploaded file. Shifts of the largest models that people fine-tune are a tenth of that."""
MAX_HEADER_BYTES = 2**20
"""Of the JSON at its beginning, which is read before anything can be known of the rest."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class AdapterStore:
    """The adapters that requests may name.

    Args:
        adapter: of the pipeline.
        folder: one sub-folder with delta files for each.
        most: how many are in memory at a time; those that were used last.
    """

    def __init__(self, adapter: Adapter, folder: Path, most: int) -> None:
        self._adapter, self._folder, self._most = adapter, folder, most
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._replaced: set[str] = set()  # since they were loaded
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """All of the folder."""
        return sorted(path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def loaded(self) -> list[str]:
        """Those in memory, the one used last at the end."""
        return list(self._loaded)

    def check(self, name: str) -> None:
        """Raises SVDiffError if there is no adapter of this name, or one that does not fit the model."""
        if not _NAME.fullmatch(name) or not (self._folder / name).is_dir():
            raise SVDiffError(f"there is no adapter {name[:64]!r}")
        if name not in self._loaded:
            try:
                self._adapter.read_weights(self._folder / name)
            except SVDiffError as error:
                raise SVDiffError(
                    str(error).replace(f"{self._folder}/", "")
                ) from error  # whose path is nobody's business

    def use(self, names: Collection[str]) -> None:
        """Have these in memory, before they are mixed; for the thread that draws.

        Raises:
            SVDiffError: see `check`.
        """
        with self._lock:
            for name in names:
                self.check(name)
                if name not in self._loaded or name in self._replaced:
                    self._adapter.load_weights(self._folder / name, name, activate=False)
                    self._replaced.discard(name)
                    self._loaded[name] = None
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
            raise SVDiffError("a name is 1 to 64 letters, digits, '-' or '_', and begins with none of the last two")
        if "denoiser" not in files or files.keys() - FILE_NAMES.keys():
            raise SVDiffError(f"give a file for the denoiser, and no others than {', '.join(FILE_NAMES)}")
        staging = Path(tempfile.mkdtemp(prefix=".upload-", dir=self._folder))
        try:
            for part, content in files.items():
                _check_size(part, content)
                (staging / FILE_NAMES[part]).write_bytes(content)
            if any(not file.base_hashes() for file in read_all(staging).values()):
                raise SVDiffError("a file does not say for which base model it was made")
            self._adapter.read_weights(staging)
            with self._lock:
                target = self._folder / name
                if target.exists():
                    target.rename(staging / "replaced")
                staging_content = staging / "content"
                staging_content.mkdir()
                for part in files:
                    (staging / FILE_NAMES[part]).rename(staging_content / FILE_NAMES[part])
                staging_content.rename(target)
                self._replaced.add(name)
        except SVDiffError as error:
            raise SVDiffError(str(error).replace(str(staging), name)) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _check_size(part: str, content: bytes) -> None:
    if len(content) > MAX_FILE_BYTES:
        raise SVDiffError(f"the {part}'s file has more than {MAX_FILE_BYTES // 2**20} MiB")
    if len(content) < 8 or int.from_bytes(content[:8], "little") > min(MAX_HEADER_BYTES, len(content) - 8):
        raise SVDiffError(f"the {part}'s file is no safetensors file, or one with a header over 1 MiB")
