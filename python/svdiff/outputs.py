"""Output directories that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdiff_kernels import SVDiffError

RUN_FILE = "run.json"
"""In every output directory: what made it. It marks a directory as a run, which may be overwritten."""


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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise SVDiffError(f"cannot write the output directory {target}: {error.strerror}") from error
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        _check_target(target, overwrite)
        _move_into_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_run_file(directory: Path, command: str, config: dict[str, Any], **results: Any) -> None:
    """Say in ``run.json`` which command with which settings made the directory, and what came of it."""
    text = json.dumps({"command": command, "config": config, **results}, indent=2, default=str)
    (directory / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SVDiffError(f"the output directory {target} is a file")
    if not os.access(target, os.W_OK | os.X_OK):
        raise SVDiffError(f"cannot write the output directory {target}: Permission denied")
    holds_run = (target / RUN_FILE).exists()
    if holds_run and not overwrite:
        raise SVDiffError(f"the output directory {target} already holds a run: choose another, or pass --overwrite")
    if not holds_run and any(target.iterdir()):
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
