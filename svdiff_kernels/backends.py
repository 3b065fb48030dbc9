"""Which implementation serves the ops: the C++ extension on CPUs where it was built, Triton on GPUs, `reference` else.

Where Triton is missing, the extension's CUDA kernels serve GPUs, if it was built with any.

The environment variable ``SVDIFF_BACKEND`` overrides that, and raises where its choice cannot serve: "reference" leaves
the others alone, "cpu" insists on the extension, "cuda" on its kernels for GPUs, "triton" serves nothing but GPUs (with
``TRITON_INTERPRET=1`` also CPUs, slowly). It is read once, when svdiff_kernels is imported; Triton itself is imported
by the first call on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .errors import SVDiffError

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


def _register_triton(key: str) -> None:
    """Have Triton serve what it can of a dispatch key; what it cannot goes to `reference`, unless Triton is forced."""

    def serve(op: str, module: str, can: Callable[..., bool]) -> None:
        fallback = getattr(reference, op)

        @cache
        def launcher() -> Callable[..., Any]:
            return getattr(importlib.import_module(f".triton.{module}", __package__), op)

        def launch(first: Tensor, *rest: Any) -> Any:
            return (launcher() if can(first, *rest) else fallback)(first, *rest)

        ops.library.impl(op, launch, key)

    serve("expand", "expand", _is_for_triton)
    serve("expand_backward", "expand", _is_for_triton)
    serve("frozen_linear", "frozen", _is_mixed)
    serve("linear", "linear", _is_for_triton)
    serve("linear_backward", "linear", _is_for_triton)
    serve("gains", "bank", _is_for_triton)
    serve("gains_backward", "bank", _is_for_triton)


def _is_for_triton(first: Tensor, *_: Any) -> bool:
    """Does Triton have a product for it?

    Raises:
        SVDiffError: it has none, and was asked for by name.
    """
    able = first.dtype != torch.float64 and (first.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    if _choice == "triton" and not able:
        kind = str(first.dtype).removeprefix("torch.")
        raise SVDiffError(f"SVDIFF_BACKEND=triton cannot serve {kind} on {first.device.type}")
    return able


def _is_mixed(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, alpha: float) -> bool:
    """Where all types are one, the vendor's product is the best there is."""
    return not x.dtype == weight.dtype == (dtype or x.dtype) and _is_for_triton(x)


def _register_cuda() -> None:
    """Have the extension serve GPUs what it can; what it cannot goes to `reference`, unless it is forced."""

    def serve(op: str, can: Callable[..., bool]) -> None:
        fallback, launch = getattr(reference, op), getattr(torch.ops.svdiff_cuda, op).default

        def run(*arguments: Any) -> Any:
            if can(*arguments):
                return launch(*arguments)
            if _choice == "cuda":
                kinds = ", ".join(str(t.dtype).removeprefix("torch.") for t in arguments if isinstance(t, Tensor))
                raise SVDiffError(f"SVDIFF_BACKEND=cuda cannot serve {op} of {kinds}")
            return fallback(*arguments)

        ops.library.impl(op, run, "CUDA")

    serves = torch.ops.svdiff_cuda
    serve("expand", lambda z, U, scale, bias, dtype: serves.serves_expand(z, U, dtype))
    serve("expand_backward", lambda dy, z, U, scale, need_dz: serves.serves_expand_backward(dy, z, U))


_choice = _choose()
extension, why_no_extension = _load_extension()
why_no_cuda = _why_no_cuda()
why_no_triton = _why_no_triton()
if extension is None:
    ops.register_autograd()
if not why_no_triton:
    _register_triton("CUDA")
    if _choice == "triton":
        _register_triton("CPU")
elif not why_no_cuda:
    _register_cuda()


def fuses(device_type: str) -> bool:
    """Whether whole layers had better go to what serves this kind of device than be made of ops here."""
    return serving(device_type) == "triton"


def serving(device_type: str) -> str:
    """The name of the backend that runs the ops on this kind of device: "cpu", "cuda", "triton" or "reference"."""
    if device_type == "cpu" and extension is not None:
        return "cpu"
    if not why_no_triton and (device_type == "cuda" or _choice == "triton"):
        return "triton"
    if not why_no_cuda and device_type == "cuda":
        return "cuda"
    return "reference"
