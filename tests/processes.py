"""Tests of what processes do to each other: forked, waited for, killed.

Such a test runs in a process of its own, which has computed nothing by several threads and so can be forked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

Test = Callable[[Path], None]
_ALONE: dict[str, Test] = {}


def alone(test: Test) -> Test:
    """A test that runs in a process of its own; the file that it is in ends by `run_alone`."""
    _ALONE[test.__name__] = test

    def run(tmp_path: Path) -> None:
        command = [sys.executable, test.__code__.co_filename, test.__name__, str(tmp_path)]
        errors = tmp_path / "errors"
        with errors.open("w") as file:
            process = subprocess.Popen(command, env=environment(), stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait(timeout=280)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it forked, if it failed
        if status:
            pytest.fail(errors.read_text(), pytrace=False)

    run.__name__ = test.__name__
    return run


def environment() -> dict[str, str]:
    """Of a process that imports what this one does, has one thread, and libraries as quiet as a command's."""
    quiet = {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return os.environ | quiet | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def run_alone() -> None:
    """In the process of a test's own: run it."""
    import torch

    torch.set_num_threads(1)
    _ALONE[sys.argv[1]](Path(sys.argv[2]))


def fork(work: Callable[[], Any]) -> int:
    """A process that does this; a warning is an error there."""
    process = os.fork()
    if process == 0:
        status: Any = 1
        try:
            warnings.simplefilter("error")
            work()
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def exit_code(process: int, seconds: float = 60) -> int | None:
    """How it ended: 0, or -9 if it was killed. None if it ran on; it does no longer."""
    for _ in range(int(seconds * 200)):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def ended(process: int) -> int:
    """How it ended, as it should have by now."""
    code = exit_code(process)
    assert code is not None, "it ran on"
    return code


def killed(process: int) -> int:
    """How it ended, if not before, then by this."""
    os.kill(process, signal.SIGKILL)
    return ended(process)


class Signal:
    """Given by one process, waited for by others."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def give(self) -> None:
        os.write(self._write, b"." * 100)

    def wait(self) -> None:
        assert os.read(self._read, 1)
