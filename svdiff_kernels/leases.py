"""Who uses which objects of a cache, so that nobody deletes what another process has mapped into memory.

A process keeps a file in the cache's folder ``readers/``, locked for as long as it lives, and notes in it each object
that it opens. A file that is not locked is what a process left that is gone.
"""

from __future__ import annotations

import fcntl
import os
import uuid
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path


class Lease:
    """What this process uses of one cache; see `lease_of`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        self._owner = 0
        self._keys: set[str] = set()

    def add(self, key: str) -> None:
        """Note an object, before it is opened. Where nothing can be written, nothing is: others cannot delete there."""
        if self._owner != os.getpid():  # after a fork the parent's file is the parent's
            self._file, self._owner, self._keys = None, os.getpid(), set()
        if key in self._keys:
            return
        self._keys.add(key)
        with suppress(OSError):
            if self._file is None:
                self._file = self._open()
                weakref.finalize(self, os.close, self._file)
            os.write(self._file, f"{key}\n".encode())

    def _open(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = self._folder / f"{os.getpid()}-{uuid.uuid4().hex}"
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                os.close(file)
                path.unlink(missing_ok=True)
                raise
            if os.fstat(file).st_nlink:
                return file
            os.close(file)  # before it was locked, `in_use` took it for one left behind


@cache
def lease_of(folder: Path) -> Lease:
    """The lease of this process on the cache with this folder of readers: it lasts as long as the process."""
    return Lease(folder)


def in_use(folder: Path) -> set[str]:
    """What living processes use; the files of those that are gone are deleted."""
    keys: set[str] = set()
    for path in folder.glob("*-*"):
        with suppress(OSError), path.open() as file:  # another's, or on a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                keys.update(file.read().split())
    return keys
