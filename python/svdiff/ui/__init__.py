"""svdiff ui: a page in the browser that trains, draws and edits."""

from .page import UIConfig, ui

__all__ = ["UIConfig", "ui"]
