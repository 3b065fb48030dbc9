"""The processes of one run, as torchrun and ``accelerate launch`` start them: who tells what, and how all end."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from svdiff_kernels import SVDiffError

from .training.chance import seed_of

T = TypeVar("T")

_ASK_EVERY = 1.0  # seconds
_runs = itertools.count()


class FailedElsewhereError(SVDiffError):
    """Another process of the run has failed, and says why."""


def is_first() -> bool:
    """Whether this process is the one that prints, shows bars and writes files."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print it in the first process."""
    if is_first():
        print(text)


def share(items: Sequence[T], process: int, processes: int) -> list[T]:
    """The items that a process works on, as many for each: the last ones begin again at the front.

    So what all processes make of theirs, one after the other, begins with what is made of all items, in order.
    """
    count = -(-len(items) // processes)
    return [items[i % len(items)] for i in range(process * count, (process + 1) * count)]


class Agreement:
    """Whether any process has been told to end, for a loop that all of them must leave at one step.

    They ask each other about once a second: what is asked waits for the device, and launchers do not wait for long
    before they kill.

    Args:
        host: accelerate's handle on the processes.
    """

    def __init__(self, host: Any) -> None:
        self._host = host
        self._steps, self._since, self._patience = 0, time.monotonic(), 1

    def __call__(self, told: bool) -> bool:
        """The same answer for all processes, each of which asks after each step, and says whether itself is told."""
        if self._host.num_processes == 1:
            return told
        self._steps += 1
        if self._steps < self._patience:
            return False
        pace = (time.monotonic() - self._since) / self._steps
        answers = self._host.reduce(torch.tensor([float(told), pace], device=self._host.device), "mean")
        anyone, pace = answers.tolist()
        self._steps, self._since, self._patience = 0, time.monotonic(), max(1, int(_ASK_EVERY / pace))
        return bool(anyone > 0)


@contextmanager
def failing_once() -> Iterator[None]:
    """Within, of several processes that fail the first to do so says why.

    The others, whether they have found the same mistake or have lost the one that failed, raise
    `FailedElsewhereError`.

    Raises:
        SVDiffError: a process has disappeared, and nobody has said why.
    """
    run = next(_runs)
    try:
        yield
    except FailedElsewhereError:
        raise
    except Exception as error:
        if not _is_first_to_fail(run):
            raise FailedElsewhereError("another process of this run has failed") from error
        if _is_of_lost_connection(error):
            raise SVDiffError(
                "another process of this run has ended without a word: killed, or out of memory?"
            ) from error
        raise


def by_the_first(host: Any, work: Callable[[], object]) -> None:
    """Have the first process do something while the others wait; if it fails, all do.

    Args:
        host: accelerate's handle on the processes.
        work: what to do.

    Raises:
        FailedElsewhereError: in all processes but the first, if it has failed.
    """
    error = None
    if host.is_main_process:
        try:
            work()
        except Exception as caught:
            error = caught
    failed = host.reduce(torch.tensor(float(error is not None), device=host.device), "sum")
    if error is not None:
        raise error
    if failed:
        raise FailedElsewhereError("the first process of this run has failed")


def check_same(host: Any, what: str, value: object) -> None:
    """Go on only if all processes have found the same.

    Raises:
        SVDiffError: they have not, as processes on machines without a common disk would.
    """
    found = host.gather(torch.tensor([seed_of(0, repr(value))], device=host.device))
    if (found != found[0]).any():
        raise SVDiffError(f"not all processes see the same {what}: use a folder that all machines share")


def _is_first_to_fail(run: int) -> bool:
    if not dist.is_initialized():  # all make the same mistake: one line a machine
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return bool(dist.distributed_c10d._get_default_store().add(f"svdiff/{run}/failures", 1) == 1)
    except dist.DistError:  # without a launcher the store is the first process's, and has ended with it
        return False


def _is_of_lost_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
