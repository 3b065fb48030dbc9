"""Pictures prepared for models of transformers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def image_processor(folder_or_id: str) -> Any:
    """A model's image processor, the one that goes through Pillow.

    Where torchvision is installed, transformers would rather resize with that, and figures would depend on it.
    """
    from transformers import AutoImageProcessor

    is_new = find_spec("transformers.image_processing_backends") is not None
    how: dict[str, Any] = {"backend": "pil"} if is_new else {"use_fast": False}
    return AutoImageProcessor.from_pretrained(folder_or_id, **how)
