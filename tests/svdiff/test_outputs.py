"""Output folders that appear whole or not at all, or can be gone on with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from svdiff.outputs import RUN_FILE, resumable_directory, run_directory, write_run_file, writing

from svdiff_kernels import SVDiffError


def test_an_output_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with run_directory(target) as staging:
        (staging / "a").write_text("1")
        write_run_file(staging, "train", {"seed": 3}, loss=0.5)
        assert not target.exists()
    assert json.loads((target / RUN_FILE).read_text()) == {"command": "train", "config": {"seed": 3}, "loss": 0.5}
    assert [p.name for p in target.parent.iterdir()] == ["run"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_directory(tmp_path / "run") as staging:
        (staging / "a").write_text("1")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_is_replaced_on_request_only(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with run_directory(target) as staging:
        write_run_file(staging, "train", {})
        (staging / "old").write_text("")
    with pytest.raises(SVDiffError, match="already holds a run"), run_directory(target):
        pytest.fail("entered")
    with run_directory(target, overwrite=True) as staging:
        write_run_file(staging, "train", {})
    assert [p.name for p in target.iterdir()] == [RUN_FILE]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_peoples_files_are_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SVDiffError, match="not empty"), run_directory(tmp_path, overwrite=overwrite):
        pytest.fail("entered")
    with pytest.raises(SVDiffError, match="is a file"), run_directory(tmp_path / "thesis.tex", overwrite=overwrite):
        pytest.fail("entered")


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SVDiffError, match="cannot write"), run_directory(tmp_path / "file" / "run"):
        pytest.fail("entered")


def has_checkpoint(directory: Path) -> bool:
    return (directory / "checkpoint").exists()


@contextmanager
def long_run(target: Path, *, overwrite: bool = False, resume: bool = False, spare: bool = False) -> Iterator[Path]:
    with resumable_directory(
        target, overwrite=overwrite, resume=resume, keep=has_checkpoint, spare=lambda _: spare
    ) as directory:
        if not (directory / RUN_FILE).exists():
            write_run_file(directory, "train", {})
        yield directory


def finish(target: Path, name: str, **how: bool) -> None:
    """A run that comes to its end, and leaves a file."""
    with long_run(target, **how) as directory:
        (directory / name).touch()
        write_run_file(directory, "train", {}, loss=0.5)


def fail(target: Path, name: str, **how: bool) -> None:
    """A run that fails, having written a file."""
    with pytest.raises(KeyboardInterrupt), long_run(target, **how) as directory:
        (directory / name).touch()
        raise KeyboardInterrupt


def kill(target: Path, name: str, **how: bool) -> None:
    """A run that is killed, having written a file: what comes after is not done."""
    run = long_run(target, **how)
    (run.__enter__() / name).touch()
    KILLED.append(run)  # or its generator would be closed


KILLED: list[Any] = []


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_long_run_is_there_from_the_beginning(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with long_run(target) as directory:
        assert directory == target and names(target) == [RUN_FILE]
        write_run_file(directory, "train", {}, loss=0.5)
    assert names(target) == [RUN_FILE] and names(target.parent) == ["run"]


def test_a_failure_leaves_what_can_be_gone_on_from(tmp_path: Path) -> None:
    fail(tmp_path / "run", "picture")
    assert names(tmp_path) == []
    fail(tmp_path / "run", "picture", spare=True)
    assert names(tmp_path / "run") == ["picture", RUN_FILE]
    fail(tmp_path / "other", "checkpoint")
    assert names(tmp_path / "other") == ["checkpoint", RUN_FILE]


def test_results_outlast_a_failure_after_them(tmp_path: Path) -> None:
    """As of an upload."""
    with pytest.raises(KeyboardInterrupt), long_run(tmp_path / "run") as directory:
        write_run_file(directory, "train", {}, loss=0.5)
        raise KeyboardInterrupt
    assert names(tmp_path / "run") == [RUN_FILE]


@pytest.mark.parametrize("end", [fail, kill])
def test_a_run_that_has_not_ended(tmp_path: Path, end: Any) -> None:
    end(tmp_path / "run", "checkpoint")
    with pytest.raises(SVDiffError, match=r"has not ended: pass --resume_from_checkpoint latest .* or --overwrite"):
        finish(tmp_path / "run", "new")
    assert names(tmp_path / "run") == ["checkpoint", RUN_FILE]
    finish(tmp_path / "run", "more", resume=True)
    assert names(tmp_path / "run") == ["checkpoint", "more", RUN_FILE]
    with pytest.raises(SVDiffError, match="already holds a run"):
        finish(tmp_path / "run", "new")
    finish(tmp_path / "run", "again", resume=True)
    assert names(tmp_path / "run") == ["again", "checkpoint", "more", RUN_FILE]


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_run_that_is_killed_early_can_be_begun_again(tmp_path: Path, how: str) -> None:
    kill(tmp_path / "run", "picture")
    with pytest.raises(SVDiffError, match="has not ended"):
        finish(tmp_path / "run", "new")
    finish(tmp_path / "run", "new", **{how: True})
    assert names(tmp_path / "run") == ["new", *(["picture"] if how == "resume" else []), RUN_FILE]
    assert names(tmp_path) == ["run"]


def test_a_run_that_is_killed_before_it_can_say_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".{RUN_FILE}.partial").write_text("{")
    finish(tmp_path / "run", "a")
    assert names(tmp_path / "run") == ["a", RUN_FILE]


def test_a_new_run_replaces_an_earlier_one_when_it_has_something(tmp_path: Path) -> None:
    target = tmp_path / "run"
    finish(target, "a")
    finish(target, "b", overwrite=True)
    assert names(target) == ["b", RUN_FILE] and names(tmp_path) == ["run"]
    fail(target, "picture", overwrite=True)
    assert names(target) == ["b", RUN_FILE] and names(tmp_path) == ["run"]
    fail(target, "picture", overwrite=True, spare=True)  # which an earlier run is dearer than
    assert names(target) == ["b", RUN_FILE] and names(tmp_path) == ["run"]
    fail(target, "checkpoint", overwrite=True)
    assert names(target) == ["checkpoint", RUN_FILE] and names(tmp_path) == ["run"]


def test_what_a_killed_run_was_to_replace(tmp_path: Path) -> None:
    """Is back with the next, unless that goes on with the killed one; and is lost once there is something better."""
    target = tmp_path / "run"
    finish(target, "a")
    kill(target, "picture", overwrite=True)
    assert names(target) == ["picture", RUN_FILE] and len(names(tmp_path)) == 2
    with pytest.raises(SVDiffError, match="already holds a run"):
        finish(target, "new")
    assert names(target) == ["a", RUN_FILE] and names(tmp_path) == ["run"]

    kill(target, "picture", overwrite=True)
    fail(target, "other", resume=True)
    assert names(target) == ["a", RUN_FILE] and names(tmp_path) == ["run"]

    kill(target, "picture", overwrite=True)
    fail(target, "other", overwrite=True)
    assert names(target) == ["a", RUN_FILE] and names(tmp_path) == ["run"]

    kill(target, "picture", overwrite=True)
    shutil.rmtree(target)  # as if killed between two renames
    with pytest.raises(SVDiffError, match="already holds a run"):
        finish(target, "new")
    assert names(target) == ["a", RUN_FILE] and names(tmp_path) == ["run"]

    kill(target, "picture", overwrite=True)
    finish(target, "b", resume=True)
    assert names(target) == ["b", "picture", RUN_FILE] and names(tmp_path) == ["run"]

    kill(target, "checkpoint", overwrite=True)
    fail(target, "picture", overwrite=True)
    assert names(target) == ["checkpoint", RUN_FILE] and names(tmp_path) == ["run"]


@pytest.mark.parametrize("how", ["", "overwrite", "resume"])
def test_other_peoples_files_are_left_alone_by_long_runs_too(tmp_path: Path, how: str) -> None:
    (tmp_path / "thesis.tex").write_text("")
    flags = {how: True} if how else {}
    with pytest.raises(SVDiffError, match="not empty"):
        finish(tmp_path, "a", **flags)
    with pytest.raises(SVDiffError, match="is a file"):
        finish(tmp_path / "thesis.tex", "a", **flags)
    with pytest.raises(SVDiffError, match="cannot write"):
        finish(tmp_path / "thesis.tex" / "run", "a", **flags)
    assert names(tmp_path) == ["thesis.tex"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SVDiffError, match=r"cannot write .*gone: No such file or directory"):
        write_run_file(tmp_path / "gone", "train", {})
    with pytest.raises(SVDiffError, match="cannot write there: Error while serializing"), writing(Path("there")):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
