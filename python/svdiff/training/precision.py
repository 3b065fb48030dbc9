"""Precision: what its names in the settings mean."""

from __future__ import annotations

import torch

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def autocast(name: str, device: torch.device) -> torch.autocast:
    """Products in the precision of this name; nothing is changed for that of fp32."""
    return torch.autocast(device.type, DTYPES[name], enabled=DTYPES[name] != torch.float32)
