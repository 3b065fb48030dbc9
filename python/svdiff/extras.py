"""Which extra of the package brings a module that is not installed."""

from __future__ import annotations

from svdiff_kernels import SVDiffError

_EXTRAS = {
    **dict.fromkeys(
        ("diffusers", "transformers", "accelerate", "huggingface_hub", "PIL", "scipy", "tensorboard", "yaml"),
        "diffusers",
    ),
    "peft": "peft",
    "gradio": "ui",
    "matplotlib": "evaluate",
}


def lacking(error: ImportError, who: str) -> SVDiffError | None:
    """The error that tells what to install for who; None if error is about a module that no extra brings."""
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in _EXTRAS:
        return None
    return SVDiffError(f'{who} needs {module}: pip install "svdiff-kernels[{_EXTRAS[module]}]"')
