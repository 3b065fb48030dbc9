"""Being told to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from svdiff import termination
from svdiff.progress import progress_bar
from svdiff.sampling import sample


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    termination.exit_on_sigterm()
    yield
    termination.exit_on_sigterm()  # forgets the signal
    signal.signal(signal.SIGTERM, before)


def swallow_a_signal() -> None:
    """As numpy.random does if the signal arrives while it is imported."""
    with suppress(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_signal_is_an_exit() -> None:
    with pytest.raises(SystemExit, match="143"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_loops_go_on_if_nobody_told_them() -> None:
    assert list(progress_bar(range(3), "Steps")) == [0, 1, 2]


def test_an_exit_that_a_library_swallowed_comes_again() -> None:
    swallow_a_signal()
    with pytest.raises(SystemExit, match="143"):
        list(progress_bar(range(3), "Steps"))


def test_nothing_is_drawn_after_it() -> None:
    swallow_a_signal()
    pipeline: Any = None  # not asked for anything
    with pytest.raises(SystemExit, match="143"):
        list(sample(pipeline, ["a dog"], [0], batch_size=1, num_inference_steps=1, guidance_scale=1, resolution=(8, 8)))
