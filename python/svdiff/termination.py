"""Being told to end: Ctrl-C and SIGTERM end a command by an exception, so that whatever is half-written is cleared
away; or by a notice, where there is something to save first.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_ECHO = 2.0
"""Seconds within which a second signal says nothing new: launchers pass on what a terminal has told everyone."""

_received: int | None = None


def exit_on_signals() -> None:
    """From now on SIGTERM raises SystemExit with code 143 wherever the main thread is, and Ctrl-C KeyboardInterrupt.

    That one does so anyway; but then `exit_if_told` would not know of it.
    """
    global _received
    _received = None
    signal.signal(signal.SIGTERM, _exit)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _exit)


class Notice:
    """Whether a command has been told to end, by Ctrl-C or SIGTERM; see `deferred_exit`."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._since = 0.0
        self._handlers: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether it has."""
        return self._signal is not None

    def leave(self) -> NoReturn:
        """End now, as the signal would have done."""
        if self._signal is not None and callable(handler := self._handlers[self._signal]):
            handler(self._signal, None)
        sys.exit(128 + (self._signal or signal.SIGTERM))

    def _receive(self, number: int, frame: object) -> None:
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > _ECHO:
            self.leave()

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored under nohup; None: not Python's
                self._handlers[number] = signal.signal(number, self._receive)

    def _forget(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


@contextmanager
def deferred_exit() -> Iterator[Notice]:
    """Within, Ctrl-C and SIGTERM are only noted: whoever asks the notice saves what there is, and then leaves.

    At the end of the block at the latest; or at once, if told again after a moment.
    """
    notice = Notice()
    notice._listen()
    try:
        yield notice
    finally:
        notice._forget()
    if notice():
        notice.leave()


def exit_if_told() -> None:
    """Raise the exit again if a library has swallowed it, as Cython modules do while they are imported.

    Every long loop of ours calls it, so the command ends at the next step at the latest. And so does whoever reports
    errors: torch makes an error of its own of an exit that comes while it asks an object for its shape.
    """
    if _received == signal.SIGINT:
        raise KeyboardInterrupt
    if _received is not None:
        sys.exit(128 + _received)


def _exit(number: int, frame: object) -> None:
    global _received
    _received = number
    exit_if_told()
