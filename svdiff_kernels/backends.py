"""Which implementation serves the ops: the C++ extension on CPUs where it was built, `reference` everywhere else.

The environment variable ``SVDIFF_BACKEND`` overrides that: "reference" leaves the extension alone, "cpu" insists on it.
It is read once, when svdiff_kernels is imported.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from . import ops, reference  # noqa: F401  (reference registers the fallback of every device)
from .errors import SVDiffError

CHOICES = ("auto", "reference", "cpu")


def _load() -> tuple[ModuleType | None, str]:
    """The extension and, if there is none, why."""
    choice = os.environ.get("SVDIFF_BACKEND", "auto")
    if choice not in CHOICES:
        raise SVDiffError(f"SVDIFF_BACKEND={choice!r} is not one of {', '.join(CHOICES)}")
    if choice == "reference":
        return None, "SVDIFF_BACKEND=reference asks for plain torch"
    try:
        return importlib.import_module("svdiff_kernels._C"), ""
    except ModuleNotFoundError:
        why = "it was not built (install a C++ compiler, then reinstall with SVDIFF_BUILD=cpu)"
    except ImportError as error:  # built against another torch, most likely
        why = f"it does not load: {error}"
    if choice == "cpu":
        raise SVDiffError(f"SVDIFF_BACKEND=cpu, but there is no C++ extension: {why}")
    return None, why


extension, why_no_extension = _load()
if extension is None:
    ops.register_autograd()


def serving(device_type: str) -> str:
    """The name of the backend that runs the ops on this kind of device: "cpu" or "reference"."""
    return "cpu" if device_type == "cpu" and extension is not None else "reference"
