"""Output directories that appear whole or not at all; or, of long runs, that can be gone on with."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from svdiff_kernels import SVDiffError

RUN_FILE = "run.json"
"""In every output directory: what made it. It marks a directory as a run, which may be overwritten."""

_PARTIAL_RUN_FILE = f".{RUN_FILE}.partial"


@contextmanager
def run_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A new directory to fill, which takes the name `path` when the block ends well and disappears when it does not.

    It lies beside `path` until then, as ``.<name>.partial-*``, so that pictures in it can be looked at meanwhile.

    Raises:
        SVDiffError: on entry, if `path` cannot be written, or is a file or a directory with something in it (with
            `overwrite`: anything but an earlier run).
    """
    target = Path(os.path.abspath(Path(path).expanduser()))
    _check_target(target, overwrite)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        _check_target(target, overwrite)
        _move_into_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def resumable_directory(
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    resume: bool,
    keep: Callable[[Path], bool],
    spare: Callable[[Path], bool] = lambda directory: False,
) -> Iterator[Path]:
    """The directory of a run that takes long: it is there from the beginning, for checkpoints and pictures.

    If the block fails and there is nothing in it to go on from, it is as if it had never been; an earlier run, which
    it was to replace and which waits beside it as ``.<name>.earlier``, is back then. A run that was killed is treated
    likewise by the next, unless that resumes it.

    Args:
        path: where.
        overwrite: replace an earlier run.
        resume: go on in it, if there is one.
        keep: whether a directory holds something to go on from.
        spare: whether it holds something too dear to be deleted, but not dearer than an earlier run.

    Raises:
        SVDiffError: on entry, if `path` cannot be written, is a file, or has something else in it.
    """
    target = Path(os.path.abspath(Path(path).expanduser()))
    earlier = target.with_name(f".{target.name}.earlier")

    def is_worth_keeping() -> bool:
        return is_finished(target) or keep(target)

    def undo() -> None:
        failed = target.with_name(f".{target.name}.failed")
        if earlier.exists():
            if target.exists():
                target.rename(failed)
            earlier.rename(target)
        else:
            failed = target
        shutil.rmtree(failed, ignore_errors=True)

    with writing(target):
        if earlier.exists() and not resume and not is_worth_keeping():
            undo()
    begun = (target / RUN_FILE).exists() and not is_finished(target)
    if begun and not (resume or overwrite):
        raise SVDiffError(
            f"the output directory {target} holds a run that has not ended: pass --resume_from_checkpoint latest to go "
            "on with it, or --overwrite"
        )
    _check_target(target, overwrite or resume)
    with writing(target):
        if not resume and target.exists() and not _is_empty(target):
            shutil.rmtree(earlier, ignore_errors=True)
            target.rename(earlier)
        target.mkdir(parents=True, exist_ok=True)
    fresh = _is_empty(target) or earlier.exists()
    try:
        yield target
    except BaseException:
        if fresh and not is_worth_keeping() and (earlier.exists() or not spare(target)):
            undo()
        raise
    finally:
        shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Within, whatever keeps a file from being written is an error that names the place.

    Raises:
        SVDiffError: the disk is full, a folder may not be written, ...
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SVDiffError(f"cannot write {place}: {getattr(error, 'strerror', None) or error}") from error


def write_run_file(directory: Path, command: str, config: dict[str, Any], **results: Any) -> None:
    """Say in ``run.json`` which command with which settings made the directory, and what came of it.

    Without results the run has only begun.

    Raises:
        SVDiffError: it cannot be written.
    """
    text = json.dumps({"command": command, "config": config, **results}, indent=2, default=str)
    partial = directory / _PARTIAL_RUN_FILE
    with writing(directory):
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(directory / RUN_FILE)


def is_finished(directory: Path) -> bool:
    """Whether a directory holds a run that came to its end."""
    try:
        return bool(json.loads((directory / RUN_FILE).read_text(encoding="utf-8")).keys() - {"command", "config"})
    except (OSError, ValueError):
        return False


def _is_empty(directory: Path) -> bool:
    return all(path.name == _PARTIAL_RUN_FILE for path in directory.iterdir())


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SVDiffError(f"the output directory {target} is a file")
    if not os.access(target, os.W_OK | os.X_OK):
        raise SVDiffError(f"cannot write {target}: Permission denied")
    holds_run = (target / RUN_FILE).exists()
    if holds_run and not overwrite:
        raise SVDiffError(f"the output directory {target} already holds a run: choose another, or pass --overwrite")
    if not holds_run and not _is_empty(target):
        raise SVDiffError(f"the output directory {target} is not empty and holds no run of svdiff: choose another")


def _move_into_place(staging: Path, target: Path) -> None:
    if target.exists():
        retired = staging.with_name(staging.name + ".old")
        os.rename(target, retired)
        os.rename(staging, target)
        shutil.rmtree(retired)
    else:
        os.rename(staging, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
