"""A command of ours as a process of its own: its memory is given back, a signal stops it, its error is one line."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any

from svdiff_kernels import SVDiffError

_PATIENCE = 60.0
"""Seconds that a command told to end has for its last step and its checkpoint, before it is killed."""


def arguments(command: str, config: Any) -> list[str]:
    """The words of a command line that stand for a config: what is not the default.

    Raises:
        SVDiffError: one of several texts of a list begins with a dash, and would be taken for a flag.
    """
    words = [command]
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value == default:
            continue
        if isinstance(value, list) and len(value) > 1:
            if wrong := next((text for text in value if text.startswith("-")), None):
                raise SVDiffError(
                    f"{name}: {wrong!r} would be read as a flag: begin it with something else than a dash"
                )
            words += [f"--{name}", *value]
            continue
        text = str(value[0] if isinstance(value, list) else value)
        if value is True:
            words.append(f"--{name}")
        elif not text or text.startswith("-"):
            words.append(f"--{name}={text}")
        else:
            words += [f"--{name}", text]
    return words


class Child:
    """``svdiff <words>`` in a process of its own.

    Its standard output is a terminal, so that its bars move; what it wrote last is its `status`.

    Args:
        words: of the command line, see `arguments`.
        after: called when it has ended, however.
    """

    def __init__(self, words: Sequence[str], after: Callable[[], object]) -> None:
        self._output, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 160))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the thread)
        self._said = ""
        self._told_to_end = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "svdiff", *words],
                stdin=subprocess.DEVNULL,
                stdout=terminal,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for the page, which then tells its children
            )
        finally:
            os.close(terminal)
        self._complaint, self._after = "", after
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def running(self) -> bool:
        """Whether it has more to say."""
        return self._listener.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether it has been told to end, and has not yet."""
        return self._told_to_end and self.running

    @property
    def succeeded(self) -> bool:
        """Whether it has come to its end."""
        return not self.running and self._process.returncode == 0

    @property
    def stopped(self) -> bool:
        """Whether it has ended because it was told to."""
        return not self.running and self._process.returncode in (143, -15)

    @property
    def status(self) -> str:
        """What it said last: a bar without the drawing, or its result."""
        return self._said

    @property
    def percent(self) -> int | None:
        """How far its present bar is."""
        found = re.search(r"(\d+)%", self._said)
        return int(found[1]) if found and self.running else None

    @property
    def complaint(self) -> str:
        """Why it failed, in one line; empty if it has not."""
        return self._complaint

    def stop(self) -> None:
        """Tell it to end; if it trains, it saves a checkpoint first."""
        self._told_to_end = True
        with suppress(ProcessLookupError):
            self._process.terminate()

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended, or so many seconds have."""
        self._listener.join(timeout)

    def end(self) -> None:
        """Stop it, and kill it if it will not."""
        self.stop()
        self.wait(_PATIENCE)
        if self.running:
            self._process.kill()
            self.wait()

    def _listen(self) -> None:
        tail = ""
        with suppress(OSError):  # how a terminal says that nobody is at its other side
            while piece := os.read(self._output, 4096):
                tail = (tail + piece.decode(errors="replace"))[-4096:]
                lines = [line.strip() for line in re.split(r"[\r\n]+|\x1b\[[0-9;]*[A-Z]", tail)]
                self._said = re.sub(r"\|[^|]*\|", "", next(filter(None, reversed(lines)), self._said))
        os.close(self._output)
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        self._errors.close()
        if said:
            print(said, end="", file=sys.stderr)  # whoever started the page sees all of it
        self._after()
        if code not in (0, 143, -15):
            last = said.strip().rpartition("\n")[2]
            self._complaint = last.removeprefix("svdiff: error: ") or f"the command ended with code {code}"


class Children:
    """Commands that the page has started: one at a time, for each would have the whole machine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Child | None = None

    def check_idle(self) -> None:
        """Raises SVDiffError if one is running."""
        if self._last is not None and self._last.running:
            raise SVDiffError("something is being trained or edited already: wait for it, or stop it")

    def start(self, words: Sequence[str], after: Callable[[], object]) -> Child:
        """Start a command, see `Child`.

        Raises:
            SVDiffError: another is running.
        """
        with self._lock:
            self.check_idle()
            self._last = Child(words, after)
            return self._last

    def end(self) -> None:
        """End the one that is running, if any."""
        if self._last is not None and self._last.running:
            self._last.end()
