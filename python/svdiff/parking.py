"""A parking lot on disk for weights that are not needed while their factors stand in for them."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ticket:
    """Where a parked weight lies, and what it is.

    Attributes:
        offset: in the lot's file.
        shape: of the weight.
        dtype: of the weight.
        mapped: the weight itself, if it lies in a file already.
    """

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    mapped: Tensor | None = None


class ParkingLot:
    """Weights in one unlinked temporary file, which the system removes with the process, however that ends.

    A weight that is mapped from a file, as safetensors loads them, stays there: the system drops its pages when memory
    is short, and reads them again.

    Args:
        directory: where the file is made; should be on a disk, since a tmpfs would keep the weights in memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._end = 0
        self._mapped: list[tuple[int, int]] | None = None

    def park(self, weight: Tensor) -> Ticket:
        """Write a weight out; the caller may drop it then."""
        if self._is_mapped(weight):
            return Ticket(0, weight.shape, weight.dtype, mapped=weight.detach())
        if self._file is None:
            self._file = _open_in(self._directory)
        ticket = Ticket(self._end, weight.shape, weight.dtype)
        content = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._file.seek(ticket.offset)
        self._file.write(content.data)
        self._end += content.nbytes
        trim_heap()
        return ticket

    def fetch(self, ticket: Ticket) -> Tensor:
        """The weight again, bit for bit, on the CPU: in new memory, unless it was never out of its file."""
        if ticket.mapped is not None:
            return ticket.mapped
        assert self._file is not None, "nothing was parked"
        self._file.flush()
        elements = ticket.shape.numel()
        content = np.memmap(self._file, np.uint8, "r", ticket.offset, (elements * ticket.dtype.itemsize,))
        return torch.from_numpy(np.array(content)).view(ticket.dtype).view(ticket.shape)

    def _is_mapped(self, weight: Tensor) -> bool:
        if not weight.is_cpu:
            return False
        if self._mapped is None:
            self._mapped = _mapped_files()
        place = weight.data_ptr()
        i = bisect_right(self._mapped, (place, sys.maxsize)) - 1
        return i >= 0 and place < self._mapped[i][1]

    def close(self) -> None:
        """Give the file's space back to the disk."""
        if self._file is not None:
            self._file.close()
        self._file, self._end = None, 0


def _mapped_files() -> list[tuple[int, int]]:
    """``(start, end)`` of what this process has mapped of files on disks, in order; empty where /proc does not tell."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, _, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and not (path and path[0].startswith(("/dev/", "/memfd:", "/SYSV"))):
                start, end = addresses.split("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def trim_heap() -> None:
    """Give freed memory back to the system: glibc keeps what is below 32 MB, which most weights are."""
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def _open_in(directory: Path | None) -> IO[bytes]:
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=directory)
        except OSError:
            pass  # an unwritable cache is allowed; so weights go where temporary files go
    return tempfile.TemporaryFile()
