"""The delta file: what people share. One tensor a module under ``<module path>.delta``, in fp32 or half precision, and
metadata beside them.

A file is checked whole, against the model it is meant for, before anything is done with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdiff_kernels import SVDiffError, __version__

FORMAT = "svdiff"
FORMAT_VERSION = 1
FILE_NAMES = {
    "denoiser": "spectral_shifts.safetensors",
    "text_encoder": "spectral_shifts_te.safetensors",
    "text_encoder_2": "spectral_shifts_te2.safetensors",
    "text_encoder_3": "spectral_shifts_te3.safetensors",
}
"""Which part of a pipeline is written to which file."""

Content = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors and metadata of a file, by key."""

_SUFFIX = ".delta"
_AUTHORS_SUFFIX = ".parametrizations.weight.0.eigenvalues_delta"  # of phymhan/SVDiff
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HASH_DIGITS = 16
"""How much of a weight's content hash a file says: whole hashes would make up half of a small model's file."""

# transformers 5 dropped this prefix from CLIP's module paths; files keep it.
_CLIP_PREFIX = "text_model."
_CLIP_CHILDREN = ("embeddings.", "encoder.", "final_layer_norm")


@dataclass(frozen=True)
class Layout:
    """What a delta file for one model holds.

    Attributes:
        shapes: module path -> shape of its delta.
        hashes: module path -> content hash of its frozen weight; empty if not known.
        rank: how many singular values of each weight are trained at most; None for all.
        one_dim: "vector", "scalar" or "none".
        base_model: where the model came from, for people to read.
    """

    shapes: Mapping[str, torch.Size]
    hashes: Mapping[str, str]
    rank: int | None
    one_dim: str
    base_model: str


@dataclass(frozen=True)
class DeltaFile:
    """What a delta file says: shifts by module path (as written there), and its metadata."""

    path: Path
    deltas: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def rank(self) -> int | None:
        """How many singular values of each weight it shifts at most; None for all.

        Raises:
            SVDiffError: its metadata says nonsense.
        """
        rank = self.metadata.get("rank", "full")
        if rank != "full" and not (rank.isdecimal() and int(rank) > 0):
            raise SVDiffError(f"{self.path}: its metadata gives rank {rank!r}")
        return None if rank == "full" else int(rank)

    def for_layout(self, layout: Layout) -> dict[str, Tensor]:
        """The shifts by module path of a model, which they are checked against.

        A layer of the model that the file does not have is one that it does not shift, if the file says which weights
        it was trained on.

        Raises:
            SVDiffError: a key is unknown, a shape differs, or the file was trained on other weights; or it does not say
                on which, and a key is missing.
        """
        found = {model_path(path, layout.shapes): path for path in self.deltas}
        if unknown := sorted(found.keys() - layout.shapes.keys()):
            raise SVDiffError(
                f"{self._key(found[unknown[0]])} belongs to no adapted layer of this model"
                f"{_others(unknown)}: the file was made for another base, or other targets"
            )
        hashes = self.base_hashes()
        missing = sorted(layout.shapes.keys() - found.keys())
        if missing and not hashes:
            raise SVDiffError(
                f"{self._key(file_path(missing[0]))} is missing{_others(missing)}: "
                "the file was made for another base, or other targets"
            )
        for path in found:
            delta, shape = self.deltas[found[path]], layout.shapes[path]
            if delta.shape != shape:
                raise SVDiffError(
                    f"{self._key(found[path])} has shape {list(delta.shape)}, but the model's has {list(shape)}: "
                    "the file was made for another base, rank, one-dim mode or conv reshape"
                )
            expected = hashes.get(found[path])
            if expected is not None and expected != layout.hashes[path][:HASH_DIGITS]:
                base = self.metadata.get("base_model") or "another base model"
                raise SVDiffError(
                    f"{self._key(found[path])} was trained on other weights than this model's: the file is for {base}"
                )
        return {path: self.deltas[name] for path, name in found.items()}

    def base_hashes(self) -> dict[str, str]:
        """The beginnings of the content hashes of the weights it was trained on, by module path; empty if not told."""
        digits = self.metadata.get("base_hashes", "").split()
        if digits and len(digits) != len(self.deltas):
            raise SVDiffError(f"{self.path}: its metadata has {len(digits)} base hashes for {len(self.deltas)} keys")
        return dict(zip(sorted(self.deltas), digits, strict=False))

    def _key(self, path: str) -> str:
        return f"{self.path.name}: key {path + _SUFFIX}"


def read(path: Path) -> DeltaFile:
    """Read a delta file of ours, of svdiff-pytorch or of the paper's author, and check what needs no model for it.

    Raises:
        SVDiffError: no such file, not safetensors (nothing is ever unpickled), truncated, a key that is no delta, a
            value that is not finite, or a format version newer than this library.
    """
    tensors, metadata = read_tensors(path, "delta file")
    if not tensors:
        raise SVDiffError(f"{path} holds no spectral shifts")
    tensors = {_of_the_author(key): tensor for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not key.endswith(_SUFFIX) or not tensor.is_floating_point():
            raise SVDiffError(f"{path.name}: key {key} is no spectral shift")
        if not torch.isfinite(tensor).all():
            raise SVDiffError(f"{path.name}: key {key} holds NaN or inf")
    version = metadata.get("format_version", str(FORMAT_VERSION))
    if metadata.get("format", FORMAT) == FORMAT and version != str(FORMAT_VERSION):
        raise SVDiffError(f"{path} has format version {version}; this library reads version {FORMAT_VERSION}")
    deltas = {
        key.removesuffix(_SUFFIX): tensor if tensor.dtype in _DTYPES else tensor.to(torch.float32)
        for key, tensor in tensors.items()
    }
    return DeltaFile(path, deltas, metadata)


def read_all(path: str | os.PathLike[str]) -> dict[str, DeltaFile]:
    """Read the delta files of a folder, or a denoiser's file and those that stand beside it, by part of the pipeline.

    Raises:
        SVDiffError: there are none, one cannot be read (see `read`), or one is missing that was saved with the others.
    """
    files = {part: read(file) for part, file in _find_files(path).items()}
    for file in files.values():
        if missing := [part for part in file.metadata.get("parts", "").split() if part not in files]:
            raise SVDiffError(f"{file.path} was saved with a file for the {missing[0]}, which is not beside it")
    return files


def common_layout(files: Sequence[DeltaFile]) -> Layout:
    """What files for the same base hold together: every module that any of them has.

    Raises:
        SVDiffError: they are for different bases, ranks or modes.
    """
    first = files[0]
    shapes: dict[str, torch.Size] = {}
    hashes: dict[str, str] = {}
    said: dict[str, str] = {}
    for file in files:
        for name in ("rank", "one_dim", "conv_reshape"):
            value = file.metadata.get(name)
            if value is None or (name, value) == ("one_dim", "none"):  # it has no layers of which it could be wrong
                continue
            if said.setdefault(name, value) != value:
                raise SVDiffError(f"{file.path} has {name} {value}, others have {said[name]}: they cannot be combined")
        known = file.base_hashes()
        for path, delta in file.deltas.items():
            if shapes.setdefault(path, delta.shape) != delta.shape or (
                path in known and hashes.setdefault(path, known[path]) != known[path]
            ):
                raise SVDiffError(f"{first.path} and {file.path} are for different bases: {path} differs")
    if len(hashes) < len(shapes):
        hashes = {}  # of some files nobody knows
    return Layout(shapes, hashes, first.rank, said.get("one_dim", "none"), first.metadata.get("base_model", ""))


def encode(
    deltas: Mapping[str, Tensor],
    layout: Layout,
    parts: Iterable[str],
    extra: Mapping[str, object],
    dtype: torch.dtype = torch.float32,
) -> Content:
    """The tensors and the metadata of a delta file.

    Args:
        deltas: by module path.
        layout: of the model.
        parts: of the pipeline, that files are saved for together.
        extra: what else the metadata should say.
        dtype: of the tensors; a half precision halves the file, and the memory of who loads it.

    Raises:
        SVDiffError: a shift is too large for dtype.
    """
    named = {file_path(path): path for path in deltas}
    tensors = {name + _SUFFIX: deltas[path].detach().to("cpu", dtype).contiguous() for name, path in named.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise SVDiffError(f"{key} holds what {dtype} cannot: write it in float32")
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in extra.items()}
    metadata |= {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
        "base_model": layout.base_model,
        # In the order of the sorted keys.
        "base_hashes": " ".join(layout.hashes[named[name]][:HASH_DIGITS] for name in sorted(named) if layout.hashes),
        "rank": "full" if layout.rank is None else str(layout.rank),
        "one_dim": layout.one_dim,
        "conv_reshape": "co,ci*kh*kw",
        "parts": " ".join(parts),
    }
    return tensors, metadata


def read_tensors(path: Path, kind: str) -> Content:
    """Everything that a safetensors file holds; nothing is ever unpickled.

    Args:
        path: of the file.
        kind: what to call it where there is none.

    Raises:
        SVDiffError: no such file, not safetensors, or truncated.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise SVDiffError(f"there is no {kind} {path}") from error
    except (SafetensorError, OSError) as error:
        raise SVDiffError(f"{path} is not a readable safetensors file: {_first_line(error)}") from error


def write(files: Mapping[Path, Content]) -> None:
    """Write safetensors files, all of them or none.

    Raises:
        SVDiffError: the place cannot be written.
    """
    with _partial_files(list(files)) as partial:
        for path, (tensors, metadata) in files.items():
            save_file(tensors, partial[path], metadata)
        for path in files:
            os.replace(partial[path], path)


def file_path(path: str) -> str:
    """A module path as files write it."""
    return _CLIP_PREFIX + path if path.startswith(_CLIP_CHILDREN) else path


def model_path(path: str, known: Mapping[str, object]) -> str:
    """A module path of a file as the model has it."""
    bare = path.removeprefix(_CLIP_PREFIX)
    return bare if path not in known and bare in known else path


def _of_the_author(key: str) -> str:
    return key.removesuffix(_AUTHORS_SUFFIX) + _SUFFIX if key.endswith(_AUTHORS_SUFFIX) else key


@contextmanager
def _partial_files(paths: list[Path]) -> Iterator[dict[Path, Path]]:
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in paths}
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except (OSError, SafetensorError) as error:
        raise SVDiffError(f"cannot write {paths[0].parent}: {_first_line(error)}") from error
    finally:
        for path in partial.values():
            with suppress(OSError):
                path.unlink()


def _find_files(path: str | os.PathLike[str]) -> dict[str, Path]:
    """The delta files, by part of the pipeline, of a folder, or of a denoiser's file and those that stand beside it.

    Raises:
        SVDiffError: there are none.
    """
    given = Path(path).expanduser()
    denoiser = given / FILE_NAMES["denoiser"] if given.is_dir() else given
    stem = denoiser.name.removesuffix(".safetensors")
    default_stem = FILE_NAMES["denoiser"].removesuffix(".safetensors")
    files = {part: denoiser.with_name(stem + name.removeprefix(default_stem)) for part, name in FILE_NAMES.items()}
    files["denoiser"] = denoiser
    found = {part: file for part, file in files.items() if file.is_file()}
    if not found:
        raise SVDiffError(f"there is no delta file {denoiser}")
    return found


def _others(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
