"""Which implementation serves the ops: the C++ extension on CPUs where it was built, `reference` where none other can.

On GPUs Triton and the extension's CUDA kernels serve, whichever is there; for what both can, see `fastest.py`.

The environment variable ``SVDIFF_BACKEND`` overrides that, and raises where its choice cannot serve: "reference" leaves
the others alone, "cpu" insists on the extension, "cuda" on its kernels for GPUs, "triton" serves nothing but GPUs (with
``TRITON_INTERPRET=1`` also CPUs, slowly). It is read once, when svdiff_kernels is imported; Triton itself is imported
by the first call on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .errors import SVDiffError
from .fastest import capturing, exactly, fastest, tensors_of

CHOICES = ("auto", "reference", "cpu", "cuda", "triton")


def _choose() -> str:
    choice = os.environ.get("SVDIFF_BACKEND", "auto")
    if choice not in CHOICES:
        raise SVDiffError(f"SVDIFF_BACKEND={choice!r} is not one of {', '.join(CHOICES)}")
    return choice


def _load_extension() -> tuple[ModuleType | None, str]:
    """The extension and, if there is none, why."""
    if _choice == "reference":
        return None, "SVDIFF_BACKEND=reference asks for plain torch"
    if _choice == "triton":
        return None, "SVDIFF_BACKEND=triton asks for Triton"
    try:
        return importlib.import_module("svdiff_kernels._C"), ""
    except ModuleNotFoundError:
        why = "it was not built (install a C++ compiler, then reinstall with SVDIFF_BUILD=cpu)"
    except ImportError as error:  # built against another torch, most likely
        why = f"it does not load: {error}"
    if _choice in ("cpu", "cuda"):
        raise SVDiffError(f"SVDIFF_BACKEND={_choice}, but there is no C++ extension: {why}")
    return None, why


def _why_no_cuda() -> str:
    """Empty if the extension has kernels for GPUs."""
    if extension is None:
        return why_no_extension
    if extension.build_info().get("cuda"):
        return ""
    if _choice == "cuda":
        raise SVDiffError("SVDIFF_BACKEND=cuda, but no CUDA kernels were built: reinstall with SVDIFF_BUILD=cuda")
    return "none were built (reinstall with SVDIFF_BUILD=cuda, which says what is missing)"


def _why_no_triton() -> str:
    """Empty if Triton will serve GPUs."""
    if _choice == "reference":
        return "SVDIFF_BACKEND=reference asks for plain torch"
    if _choice == "cuda":
        return "SVDIFF_BACKEND=cuda asks for the extension's kernels"
    if importlib.util.find_spec("triton") is not None:
        return ""
    if _choice == "triton":
        raise SVDiffError("SVDIFF_BACKEND=triton, but triton is not installed (pip install triton)")
    return "triton is not installed"


# The module of each op in Triton; the extension's are all in cuda.py.
_TRITON = {
    "expand": "expand",
    "expand_backward": "expand",
    "frozen_linear": "frozen",
    "linear": "linear",
    "linear_backward": "linear",
    "linear_group": "group",
    "linear_group_backward": "group",
    "gains": "bank",
    "gains_backward": "bank",
}
_CUDA = ("expand", "expand_backward", "linear", "linear_backward", "gains", "gains_backward")


def _register(key: str, backends: Sequence[str]) -> None:
    """Have `backends` serve what they can of a dispatch key; what none can goes to `reference`, unless one is forced.

    Where several can, the fastest serves, or the first of them where nothing can be measured.
    """
    for op in _TRITON:
        homes = {"triton": f".triton.{_TRITON[op]}"} if "triton" in backends else {}
        if "cuda" in backends and op in _CUDA:
            homes["cuda"] = ".cuda"
        if homes:
            ops.library.impl(op, _server(op, homes), key)


def _server(op: str, homes: Mapping[str, str]) -> Callable[..., Any]:
    fallback = getattr(reference, op)

    @cache
    def launchers() -> dict[str, Callable[..., Any]]:
        return {name: getattr(importlib.import_module(home, __package__), op) for name, home in homes.items()}

    def decide(arguments: Sequence[Any]) -> Callable[..., Any]:
        if op == "frozen_linear" and _is_of_one_type(*arguments):
            return fallback  # the vendor's product is the best there is
        able = {name: launch for name, launch in launchers().items() if _CAN[name](op, arguments)}
        if able:
            return fastest(op, able, arguments)
        if _choice in homes:
            first = next(tensors_of(arguments))
            kinds = ", ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors_of(arguments)))
            raise SVDiffError(f"SVDIFF_BACKEND={_choice} cannot serve {op} of {kinds} on {first.device.type}")
        return fallback

    decided: dict[tuple[object, ...], Callable[..., Any]] = {}

    def serve(*arguments: Any) -> Any:
        key = exactly(arguments)
        launch = decided.get(key)
        if launch is None:
            launch = decide(arguments)
            if not capturing():  # what was taken unseen may be measured yet
                decided[key] = launch
        return launch(*arguments)

    return serve


def _is_of_one_type(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, alpha: float) -> bool:
    return x.dtype == weight.dtype == (dtype or x.dtype)


def _triton_can(op: str, arguments: Sequence[Any]) -> bool:
    first = next(tensors_of(arguments))
    return first.dtype != torch.float64 and (first.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _cuda_can(op: str, arguments: Sequence[Any]) -> bool:
    from . import cuda  # whose ops the extension brings

    return cuda.can_serve(op, arguments)


_CAN = {"triton": _triton_can, "cuda": _cuda_can}

_choice = _choose()
extension, why_no_extension = _load_extension()
why_no_cuda = _why_no_cuda()
why_no_triton = _why_no_triton()
if extension is None:
    ops.register_autograd()
_register("CUDA", [name for name, why_not in (("triton", why_no_triton), ("cuda", why_no_cuda)) if not why_not])
if _choice == "triton":
    _register("CPU", ["triton"])


def fuses(device_type: str) -> bool:
    """Whether whole layers had better go to what serves this kind of device than be made of ops here."""
    return serving(device_type) in ("triton", "cuda")


def outruns_plain_layers(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's own layers are so slow here that a spectral one, with its additional operations, is faster."""
    if extension is None or device.type != "cpu" or dtype != torch.float32:
        return False
    return bool(extension.prefers_onednn())


def factor_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the factors of a model in dtype: fp16 for bf16 on a GPU, where both are as fast and fp16 is eight times finer.

    No entry of U or Vh is larger than 1, so that fp16 holds them all. But only Triton multiplies the two.
    """
    finer = dtype == torch.bfloat16 and device.type == "cuda" and serving("cuda") == "triton"
    return torch.float16 if finer else dtype


def serving(device_type: str) -> str:
    """The name of the backend that runs the ops on this kind of device: "cpu", "cuda", "triton" or "reference".

    Where both "triton" and "cuda" are there, it is "triton", which serves all types; who runs a call is measured.
    """
    if device_type == "cpu" and extension is not None:
        return "cpu"
    if not why_no_triton and (device_type == "cuda" or _choice == "triton"):
        return "triton"
    if not why_no_cuda and device_type == "cuda":
        return "cuda"
    return "reference"
