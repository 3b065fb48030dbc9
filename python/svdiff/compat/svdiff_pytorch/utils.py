"""svdiff-pytorch's functions: loading models and shifts, and the odds and ends of its scripts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from torch import Tensor

from svdiff_kernels import SVDiffError

from ... import latents
from ...checkpoint import FILE_NAMES
from ...pipelines import SCHEDULERS
from ...sampling import grid
from .models import CLIPTextModelForSVDiff, StrPath, UNet2DConditionModelForSVDiff

SCHEDULER_MAPPING = {
    name: getattr(diffusers, SCHEDULERS[name][0])
    for name in ("ddim", "plms", "lms", "euler", "euler_ancestral", "dpm_solver++")
}
"""Classes of diffusers' schedulers by the names that the scripts' flags have for them."""


def load_unet_for_svdiff(
    pretrained_model_name_or_path: StrPath,
    spectral_shifts_ckpt: StrPath | None = None,
    hf_hub_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> UNet2DConditionModelForSVDiff:
    """A UNet with spectral layers, in eval mode, all but its shifts frozen.

    Args:
        pretrained_model_name_or_path: a folder or a hub id.
        spectral_shifts_ckpt: a delta file, a folder or a hub repository with ``spectral_shifts.safetensors``; None
            starts at zero. What a file lacks is not shifted.
        hf_hub_kwargs: for `huggingface_hub.hf_hub_download`, if the shifts are on the hub.
        kwargs: for diffusers' ``from_pretrained``, such as ``subfolder`` and ``revision``. With ``torch_dtype`` the
            model is cast once it is decomposed, which happens in fp32; shifts stay in fp32.

    Raises:
        SVDiffError: no such model or file, or a file for another base.
    """
    shifts = _find_shifts(spectral_shifts_ckpt, "denoiser", hf_hub_kwargs)
    return UNet2DConditionModelForSVDiff.from_pretrained(pretrained_model_name_or_path, shifts, **kwargs)


def load_text_encoder_for_svdiff(
    pretrained_model_name_or_path: StrPath,
    spectral_shifts_ckpt: StrPath | None = None,
    hf_hub_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> CLIPTextModelForSVDiff:
    """A CLIP text encoder with spectral layers; see `load_unet_for_svdiff`.

    A folder or a hub repository without ``spectral_shifts_te.safetensors`` is of a run that trained the UNet alone:
    shifts are then zero.
    """
    shifts = _find_shifts(spectral_shifts_ckpt, "text_encoder", hf_hub_kwargs)
    return CLIPTextModelForSVDiff.from_pretrained(pretrained_model_name_or_path, shifts, **kwargs)


def image_grid(imgs: Sequence[Image.Image], rows: int, cols: int) -> Image.Image:
    """``rows * cols`` pictures of one size as one, row by row.

    Raises:
        SVDiffError: there are more or fewer.
    """
    if len(imgs) != rows * cols:
        raise SVDiffError(f"{len(imgs)} pictures do not fill a grid of {rows} x {cols}")
    return grid(imgs, cols)


def slerp(val: float, low: Tensor, high: Tensor) -> Tensor:
    """Along the arc from low (val = 0) to high (val = 1), for vectors along dimension 1.

    Args:
        val: how far.
        low: ``[B, n, ...]``.
        high: of the same shape.
    """
    rows, other = low.movedim(1, -1), high.movedim(1, -1)
    arc = latents.slerp(val, rows.reshape(-1, rows.shape[-1]), other.reshape(-1, rows.shape[-1]))
    return arc.view(rows.shape).movedim(-1, 1)


def slerp_tensor(val: float, low: Tensor, high: Tensor) -> Tensor:
    """Each sample of ``[B, ...]`` as one vector along the arc from low (val = 0) to high (val = 1)."""
    return latents.slerp(val, low, high)


def _find_shifts(place: StrPath | None, part: str, hf_hub_kwargs: dict[str, Any] | None) -> Path | None:
    """The delta file for a part of a pipeline; None if there is none, and need not be."""
    if not place:
        return None
    path, name = Path(place).expanduser(), FILE_NAMES[part]
    if path.is_dir():
        path /= name
        return path if part == "denoiser" or path.exists() else None
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", os.fspath(place)):
        return path
    try:
        return Path(hf_hub_download(os.fspath(place), filename=name, **(hf_hub_kwargs or {})))
    except Exception as error:  # of the client, of what it is built on, or of the network
        # Not if it is merely out of reach, which is an EntryNotFoundError too.
        if (
            part != "denoiser"
            and isinstance(error, EntryNotFoundError)
            and not isinstance(error, LocalEntryNotFoundError)
        ):
            return None
        raise SVDiffError(
            f"there is no delta file {place}, nor can {name} be had from a hub repository of that name: "
            f"{' '.join(str(error).split())}"
        ) from error
