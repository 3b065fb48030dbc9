"""The folder of runs: their names, their adapters, and the pictures that they learn from."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

from PIL import Image

from svdiff_kernels import SVDiffError

from ..checkpoint import FILE_NAMES
from ..outputs import RUN_FILE, writing
from ..sampling import slug
from ..training import state
from ..training.config import TrainConfig
from ..training.data import CAPTIONS_FILE

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PICTURES = ".pictures"


class Runs:
    """A folder with a sub-folder for each run, and one for the pictures of all.

    Args:
        folder: made if need be.

    Raises:
        SVDiffError: it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()

    def path(self, name: str) -> Path:
        """Where a run of this name is, or would be.

        Raises:
            SVDiffError: no name of a run.
        """
        if not _NAME.fullmatch(name):
            raise SVDiffError(
                f"{name[:64]!r} is no name of a run: use letters, digits, - and _, and begin with none of the last two"
            )
        return self._folder / name

    def free(self, name: str, kind: str) -> str:
        """A new run's name: the one given, or if that is empty, the first of ``<kind>-1``, ``<kind>-2``, ... not taken.

        Raises:
            SVDiffError: no name of a run, or there is one of this name.
        """
        if not name:
            return next(n for i in count(1) if not self.path(n := f"{kind}-{i}").exists())
        if self.path(name).exists():
            raise SVDiffError(f"there is a run called {name!r} already: choose another name, or resume that")
        return name

    def adapters(self) -> dict[str, Path]:
        """What has been learnt, by run: its result; of one that was stopped, its newest checkpoint."""
        found = {}
        for run in sorted(self._folder.iterdir()):
            if not _NAME.fullmatch(run.name):
                continue
            for path in (run, *reversed(state.checkpoints(run))):
                if (path / FILE_NAMES["denoiser"]).is_file():
                    found[run.name] = path
                    break
        return found

    def to_resume(self, name: str) -> TrainConfig:
        """The settings with which a training run goes on from its newest checkpoint.

        Raises:
            SVDiffError: there is no run of this name that could be gone on with.
        """
        path = self.path(name)
        try:
            run = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
            known = {field.name for field in fields(TrainConfig)}
            config = TrainConfig(**{key: value for key, value in run["config"].items() if key in known})
        except FileNotFoundError as error:
            raise SVDiffError(f"there is no run called {name!r} to go on with") from error
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SVDiffError(f"{name} is no training run that could be gone on with: {error}") from error
        kept = self._folder / _PICTURES / name
        return replace(
            config,
            output_dir=str(path),
            instance_data_dir=str(kept) if kept.is_dir() else config.instance_data_dir,
            resume_from_checkpoint="latest",
            overwrite=False,
        )

    def keep_pictures(self, name: str, pictures: Sequence[str], captions: Sequence[str] = ()) -> Path:
        """Copy pictures to where a run of this name finds them, now and when it is resumed; returns the folder.

        Args:
            name: of the run.
            pictures: files; of a run that came to nothing, those that were there make way for these.
            captions: one for each, or none.

        Raises:
            SVDiffError: there are none, one is of a kind that cannot be read, or they cannot be copied.
        """
        if not pictures:
            raise SVDiffError("there are no pictures: drop some")
        readable = Image.registered_extensions()
        target = self._folder / _PICTURES / self.path(name).name
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as place:
                partial = Path(place) / "pictures"
                partial.mkdir()
                for i, picture in enumerate(map(Path, pictures)):
                    if picture.suffix.lower() not in readable:
                        raise SVDiffError(f"{picture.name} is no picture that can be read: use PNG or JPEG")
                    file = partial / f"{i:03d}-{slug(picture.stem)}{picture.suffix.lower()}"
                    shutil.copyfile(picture, file)
                    if captions:
                        with (partial / CAPTIONS_FILE).open("a", encoding="utf-8") as lines:
                            lines.write(json.dumps({"file_name": file.name, "text": captions[i]}) + "\n")
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
        return target

    def forget_pictures(self, name: str) -> None:
        """Delete the pictures of a run that has come to nothing."""
        if not self.path(name).exists():
            shutil.rmtree(self._folder / _PICTURES / name, ignore_errors=True)
