"""Networks for tests: those of public packages with weights made by rule, and tiny ones in transformers' folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tiny import tiny_tokenizer
from torch import Tensor

_LPIPS = {
    "alex": {
        "slice1.0": (64, 3, 11, 11), "slice2.3": (192, 64, 5, 5), "slice3.6": (384, 192, 3, 3),
        "slice4.8": (256, 384, 3, 3), "slice5.10": (256, 256, 3, 3),
    },
    "vgg": {
        "slice1.0": (64, 3, 3, 3), "slice1.2": (64, 64, 3, 3), "slice2.5": (128, 64, 3, 3),
        "slice2.7": (128, 128, 3, 3), "slice3.10": (256, 128, 3, 3), "slice3.12": (256, 256, 3, 3),
        "slice3.14": (256, 256, 3, 3), "slice4.17": (512, 256, 3, 3), "slice4.19": (512, 512, 3, 3),
        "slice4.21": (512, 512, 3, 3), "slice5.24": (512, 512, 3, 3), "slice5.26": (512, 512, 3, 3),
        "slice5.28": (512, 512, 3, 3),
    },
}  # fmt: skip
_SIDES = {"height": 24, "width": 24}
_TAPPED = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


def by_rule(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that are the same everywhere: so that what a public package made of them can be written down."""
    rng, found = np.random.default_rng(0), {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.startswith("lin"):
            value = rng.uniform(0, 1, shape) / shape[1]
        elif len(shape) == 4:
            value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        elif name.endswith(("bn.weight", "running_var")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 0.1, shape)
        found[name] = torch.from_numpy(value.astype(np.float32))
    return found


def lpips_weights(network: str) -> dict[str, Tensor]:
    """By `by_rule`, with the names that the package lpips gives them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _LPIPS[network].items():
        shapes |= {f"net.{name}.weight": shape, f"net.{name}.bias": shape[:1]}
    return by_rule(shapes | {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(_TAPPED[network])})


def pattern(size: int, seed: int) -> np.ndarray:
    """A picture ``[size, size, 3]`` of bytes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((size // 8 + 1, size // 8 + 1, 1), dtype=np.uint8))[:size, :size]


def save_tiny_clip(folder: Path) -> Path:
    """A CLIPModel with random weights, its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(exist_ok=True)
    tokenizer = tiny_tokenizer(folder)
    text = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "crop_size": _SIDES}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_tiny_dino(folder: Path, version: int) -> Path:
    """DINO (a ViT) or DINOv2 with random weights, with its image processor."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    shape = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24, "patch_size": 8}
    if version == 1:
        ViTModel(ViTConfig(**shape, intermediate_size=20), add_pooling_layer=False).save_pretrained(folder)
        processor = {"image_processor_type": "ViTImageProcessor", "size": _SIDES}
    else:
        Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
        processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 26}, "crop_size": _SIDES}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
