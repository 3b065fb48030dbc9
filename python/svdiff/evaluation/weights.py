"""Weights of networks that no library loads without torchvision: from one safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from svdiff_kernels import SVDiffError


def read_weights(path: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        SVDiffError: there is none, or it is none.
    """
    try:
        return load_file(Path(path).expanduser())
    except FileNotFoundError as error:
        raise SVDiffError(f"there is no file {path}") from error
    except (OSError, SafetensorError) as error:
        raise SVDiffError(f"{path} is no safetensors file, and nothing else is read: {error}") from error
