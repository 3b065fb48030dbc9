"""Being told to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from svdiff import cli, info, termination
from svdiff.progress import progress_bar
from svdiff.sampling import sample

from svdiff_kernels import SVDiffError


@pytest.fixture(autouse=True)
def _as_a_command(_signals: None) -> None:
    termination.exit_on_signals()


def swallow_a_signal(number: int = signal.SIGTERM) -> None:
    """As numpy.random does if the signal arrives while it is imported."""
    with suppress(SystemExit, KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_the_signal_is_an_exit() -> None:
    with pytest.raises(SystemExit, match="143"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_loops_go_on_if_nobody_told_them() -> None:
    assert list(progress_bar(range(3), "Steps")) == [0, 1, 2]


def test_an_exit_that_a_library_swallowed_comes_again() -> None:
    swallow_a_signal()
    with pytest.raises(SystemExit, match="143"):
        list(progress_bar(range(3), "Steps"))


def test_so_does_ctrl_c() -> None:
    swallow_a_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(progress_bar(range(3), "Steps"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", [ValueError, SVDiffError])
def test_an_error_that_a_library_made_of_the_exit_is_not_reported(
    number: int, code: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch does if the signal arrives while it asks an object for its shape."""

    def work(config: Any) -> None:
        swallow_a_signal(number)
        raise kind("could not determine the shape")

    monkeypatch.setattr(info, "info", work)
    try:
        found = cli.main(["info"])
    except SystemExit as left:
        found = left.code
    assert found == code
    assert capsys.readouterr().err == ""


def test_nothing_is_drawn_after_it() -> None:
    swallow_a_signal()
    pipeline: Any = None  # not asked for anything
    with pytest.raises(SystemExit, match="143"):
        list(sample(pipeline, ["a dog"], [0], batch_size=1, num_inference_steps=1, guidance_scale=1, resolution=(8, 8)))


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_exit_can_wait(number: int, end: type[BaseException]) -> None:
    """Until there is something saved, which is for whoever asks to do."""
    done = []
    with pytest.raises(end) as caught, termination.deferred_exit() as told:
        assert not told()
        signal.raise_signal(number)
        done.append("saved")
        assert told()
        told.leave()
    assert done == ["saved"]
    assert getattr(caught.value, "code", 143) == 143


def test_an_exit_does_not_wait_longer_than_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with termination.deferred_exit():
            signal.raise_signal(signal.SIGINT)
            done.append("rest of the block")
        done.append("after it")
    assert done == ["rest of the block"]


def test_an_error_is_not_hidden_by_a_signal() -> None:
    with pytest.raises(ValueError, match="of its own"), termination.deferred_exit():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of its own")


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)])
def test_launchers_repeat_what_the_terminal_has_said(numbers: tuple[int, int]) -> None:
    """Both within a moment mean one thing: not to wait would lose what is there to be saved."""
    done = []
    end = KeyboardInterrupt if numbers[0] == signal.SIGINT else SystemExit
    with pytest.raises(end), termination.deferred_exit() as told:
        for number in numbers:
            signal.raise_signal(number)
        done.append("saved")
        told.leave()
    assert done == ["saved"]


def test_whoever_tells_again_later_does_not_want_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "_ECHO", 0.01)
    with pytest.raises(KeyboardInterrupt), termination.deferred_exit():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")


def test_handlers_are_given_back() -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with termination.deferred_exit():
        assert all(ours != theirs for ours, theirs in zip(handlers(), before, strict=True))
    assert handlers() == before
    with suppress(ValueError), termination.deferred_exit():
        raise ValueError
    assert handlers() == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As Ctrl-C is of a command that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with termination.deferred_exit() as told:
            signal.raise_signal(signal.SIGINT)
            assert not told()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_of_the_program_around_hears_of_it() -> None:
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    with pytest.raises(SystemExit, match="143"), termination.deferred_exit():
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
    assert heard == [signal.SIGTERM]


def test_without_a_handler_the_program_is_not_cut_off() -> None:
    """What is to be cleared away is, where the system would have ended the process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit, match="143"), termination.deferred_exit():
        signal.raise_signal(signal.SIGTERM)


def test_threads_are_told_nothing() -> None:
    said = []

    def work() -> None:
        with termination.deferred_exit() as told:
            said.append(told())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [False]
