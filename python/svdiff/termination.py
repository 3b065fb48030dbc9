"""Being told to end: SIGTERM ends a command by an exception, so that whatever is half-written is cleared away."""

from __future__ import annotations

import signal
import sys

_received: int | None = None


def exit_on_sigterm() -> None:
    """From now on SIGTERM raises SystemExit with code 143 wherever the main thread is."""
    global _received
    _received = None
    signal.signal(signal.SIGTERM, _exit)


def exit_if_told() -> None:
    """Raise the exit again if a library has swallowed it, as Cython modules do while they are imported.

    Every long loop of ours calls it, so the command ends at the next step at the latest.
    """
    if _received is not None:
        sys.exit(128 + _received)


def _exit(number: int, frame: object) -> None:
    global _received
    _received = number
    exit_if_told()
