"""Sharing decompositions: one person's SVD serves all.

A remote is laid out as a cache is (``objects/...``), so that any cache directory can be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from svdiff_kernels import FactorCache, SVDiffError
from svdiff_kernels.cache import Wanted

from .progress import progress_bar

Place = Path | str
"""A folder, or the id of a hub repository."""


def place_of(remote: str, *, must_exist: bool = False) -> Place:
    """What a user means by the name of a remote.

    Raises:
        SVDiffError: it is neither a folder nor a hub repository; or a folder that is not there, and must be.
    """
    path = Path(remote).expanduser()
    if path.is_dir() or remote.startswith(("/", "./", "../", "~")):
        if must_exist and not path.is_dir():
            raise SVDiffError(f"there is no folder {path}")
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", remote):
        return remote
    raise SVDiffError(
        f"{remote!r} is neither a folder (a new one begins with ./ or /) nor a hub repository (owner/name)"
    )


def push(store: FactorCache, wanted: Mapping[str, Wanted], place: Place, *, private: bool = False) -> str:
    """Copy the decompositions of a model to a folder or a hub repository; returns a summary.

    Raises:
        SVDiffError: they are not all there, or the remote cannot be written.
    """
    if missing := [name for name, one in wanted.items() if not one.path.exists()]:
        raise SVDiffError(
            f"{len(missing)} weights, such as {missing[0]}, are not in the cache: svdiff cache build makes them"
        )
    if isinstance(place, Path):
        there = FactorCache(place)
        copied = 0
        for one in progress_bar(wanted.values(), "Copying"):
            copied += there.add(one.path, replace(one, path=there.dir / _relative(one, store)))
        return f"{copied} decompositions copied to {place}, {len(wanted) - copied} were there"
    with _hub_errors(place):
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(place, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=place,
            folder_path=store.dir,
            allow_patterns=[_relative(one, store) for one in wanted.values()],
            commit_message=f"{len(wanted)} decompositions for svdiff",
        )
    return f"{len(wanted)} decompositions pushed to {place}"


def pull(store: FactorCache, wanted: Mapping[str, Wanted], place: Place) -> str:
    """Copy what a folder or a hub repository has of the decompositions of a model; returns a summary.

    Every object is checked, against its checksum and against the weight, before it is taken.

    Raises:
        SVDiffError: the remote cannot be read, has none of them, or a damaged one.
    """
    needed = {name: one for name, one in wanted.items() if not one.path.exists()}
    if not needed:
        return f"all {len(wanted)} decompositions are here"
    if isinstance(place, Path):
        taken = _take(store, needed, place)
    else:
        with store.scratch() as partial, _hub_errors(place):
            from huggingface_hub import snapshot_download

            patterns = [_relative(one, store) for one in needed.values()]
            snapshot_download(place, allow_patterns=patterns, local_dir=partial)
            taken = _take(store, needed, partial)
    lacking = len(needed) - taken
    if not taken:
        raise SVDiffError(f"{place} has no decomposition that this model lacks: was it made of these very weights?")
    told = f", {lacking} are not in {place}: svdiff cache build makes them" if lacking else ""
    return f"{taken} decompositions pulled, {len(wanted) - len(needed)} were there{told}"


def _take(store: FactorCache, needed: Mapping[str, Wanted], folder: Path) -> int:
    """How many of the objects that lie in a folder the store has taken over."""
    taken = 0
    for one in progress_bar(needed.values(), "Copying"):
        source = folder / _relative(one, store)
        if source.is_file():
            taken += store.add(source, one)
    return taken


def _relative(wanted: Wanted, store: FactorCache) -> str:
    return wanted.path.relative_to(store.dir).as_posix()


@contextmanager
def _hub_errors(remote: str) -> Iterator[None]:
    """One line for what the hub, or the way to it, has to complain of."""
    try:
        yield
    except SVDiffError:
        raise
    except Exception as error:  # of the client, of what it is built on, or of the network
        raise SVDiffError(f"hub repository {remote}: {' '.join(str(error).split())}") from error
