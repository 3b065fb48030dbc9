"""SVDiff for diffusers: fine-tune text-to-image models by the singular values of their weights.

Example::

    adapter = svdiff.attach(pipeline)  # train adapter.param_groups() with any optimiser
    adapter.save_weights("my-subject")
    svdiff.load(another_pipeline, "my-subject")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter
    from .attach import attach, load
    from .combine import CombineConfig, CombineResult, combine
    from .edit import EditConfig, EditResult, edit
    from .evaluate import EvaluateConfig, EvaluateResult, evaluate
    from .export import ExportConfig, ExportResult, export
    from .extract import ExtractConfig, ExtractResult, extract
    from .generate import GenerateConfig, GenerateResult, generate
    from .merge import MergeConfig, MergeResult, merge
    from .stylize import StylizeConfig, StylizeResult, stylize
    from .tokens import load_tokens, save_tokens
    from .train import TrainConfig, TrainResult, train

__all__ = [
    "Adapter",
    "CombineConfig",
    "CombineResult",
    "EditConfig",
    "EditResult",
    "EvaluateConfig",
    "EvaluateResult",
    "ExportConfig",
    "ExportResult",
    "ExtractConfig",
    "ExtractResult",
    "GenerateConfig",
    "GenerateResult",
    "MergeConfig",
    "MergeResult",
    "StylizeConfig",
    "StylizeResult",
    "TrainConfig",
    "TrainResult",
    "attach",
    "combine",
    "edit",
    "evaluate",
    "export",
    "extract",
    "generate",
    "load",
    "load_tokens",
    "merge",
    "save_tokens",
    "stylize",
    "train",
]

_HOMES = {
    "Adapter": "adapter",
    "attach": "attach",
    "load": "attach",
    **dict.fromkeys(("CombineConfig", "CombineResult", "combine"), "combine"),
    **dict.fromkeys(("EditConfig", "EditResult", "edit"), "edit"),
    **dict.fromkeys(("EvaluateConfig", "EvaluateResult", "evaluate"), "evaluate"),
    **dict.fromkeys(("ExportConfig", "ExportResult", "export"), "export"),
    **dict.fromkeys(("ExtractConfig", "ExtractResult", "extract"), "extract"),
    **dict.fromkeys(("GenerateConfig", "GenerateResult", "generate"), "generate"),
    **dict.fromkeys(("MergeConfig", "MergeResult", "merge"), "merge"),
    **dict.fromkeys(("StylizeConfig", "StylizeResult", "stylize"), "stylize"),
    **dict.fromkeys(("load_tokens", "save_tokens"), "tokens"),
    **dict.fromkeys(("TrainConfig", "TrainResult", "train"), "train"),
}


class _Package(ModuleType):
    """Imports its members on first use, since torch takes seconds and ``svdiff --help`` should not."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            home = importlib.import_module(f".{_HOMES[name]}", __name__)
        except ModuleNotFoundError as error:
            from .extras import lacking

            if (told := lacking(error, f"svdiff.{name}")) is None:
                raise
            raise told from error
        return getattr(home, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return  # importing the module svdiff.train must not hide the function svdiff.train
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_HOMES]


sys.modules[__name__].__class__ = _Package
