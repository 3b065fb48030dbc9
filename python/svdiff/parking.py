"""A parking lot on disk for weights that are not needed while their factors stand in for them."""

from __future__ import annotations

import ctypes
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Ticket:
    """Where a parked weight lies, and what it is."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class ParkingLot:
    """Weights in one unlinked temporary file, which the system removes with the process, however that ends.

    Args:
        directory: where the file is made; should be on a disk, since a tmpfs would keep the weights in memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._end = 0

    def park(self, weight: Tensor) -> Ticket:
        """Write a weight out; the caller may drop it then."""
        if self._file is None:
            self._file = _open_in(self._directory)
        ticket = Ticket(self._end, weight.shape, weight.dtype)
        content = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._file.seek(ticket.offset)
        self._file.write(content.data)
        self._end += content.nbytes
        return ticket

    def fetch(self, ticket: Ticket) -> Tensor:
        """The weight again, bit for bit, in new memory on the CPU."""
        assert self._file is not None, "nothing was parked"
        self._file.flush()
        elements = ticket.shape.numel()
        content = np.memmap(self._file, np.uint8, "r", ticket.offset, (elements * ticket.dtype.itemsize,))
        return torch.from_numpy(np.array(content)).view(ticket.dtype).view(ticket.shape)

    def close(self) -> None:
        """Give the file's space back to the disk."""
        if self._file is not None:
            self._file.close()
        self._file, self._end = None, 0


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
