"""Resident memory of this process: now, and at its highest from a moment on."""

from __future__ import annotations

from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_known() -> bool:
    """Whether this system tells: Linux does."""
    return _RESET.exists()


def forget_peak() -> None:
    """Count from now on."""
    _RESET.write_text("5")


def peak_bytes() -> int:
    """The most since then."""
    return _read("VmHWM")


def bytes_now() -> int:
    """What it is."""
    return _read("VmRSS")


def _read(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
