"""The shapes of real layers: every linear and conv of models that people fine-tune, read off their configurations.

Each model is built and run on the meta device, where neither weights nor arithmetic exist, with hooks that write down
what every layer sees. For machines without diffusers `python -m benchmarks.registry` keeps what comes out for the usual
sizes in configs/layers.json.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdiff_kernels import SVDiffError

CONFIGS = Path(__file__).parent / "configs"
MODELS = {
    "sd15": "sd15_unet.json",
    "sd21": "sd21_unet.json",
    "sdxl": "sdxl_unet.json",
    "flux": "flux_block.json",
    "clip": "clip_l_text.json",
}
TEXT_TOKENS = 77
_KEPT = CONFIGS / "layers.json"
_PIXELS = {"sd15": (256, 512), "sdxl": (512, 1024)}


@dataclass(frozen=True, order=True)
class Layer:
    """What one layer computes for one picture; `inputs` is the shape of its x for a batch of 1.

    Attributes:
        kind: "linear" or "conv".
        M: output features or channels.
        N: length of a weight's row: input features, or C_in * kh * kw.
        T: rows: tokens, or output pixels.
        inputs: shape of x, `[1, tokens, N]` or `[1, C_in, H, W]`.
        kernel, stride, padding: of a conv; 0 for a linear.
    """

    kind: str
    M: int
    N: int
    T: int
    inputs: tuple[int, ...]
    kernel: int = 0
    stride: int = 0
    padding: int = 0

    def __str__(self) -> str:
        about = f" {self.kernel}x{self.kernel}" if self.kernel else ""
        about += f"/{self.stride}" if self.stride > 1 else ""
        return f"{self.kind}{about} {self.M}x{self.N} T={self.T}"

    @property
    def fold(self) -> float:
        """Numbers of x in memory for each number of its rows: 1, or less where the pixels of a conv's rows overlap."""
        return math.prod(self.inputs) / (self.T * self.N)

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Linear | nn.Conv2d:
        """A frozen layer of this shape on the meta device."""
        with torch.device("meta"):
            if self.kind == "linear":
                return nn.Linear(self.N, self.M, dtype=dtype).requires_grad_(False)
            size, stride, padding = self.kernel, self.stride, self.padding
            return nn.Conv2d(self.inputs[1], self.M, size, stride, padding, dtype=dtype).requires_grad_(False)


@cache
def layers(model: str | Path, pixels: int = 512) -> dict[Layer, int]:
    """Every distinct layer shape of a model for pictures of `pixels` a side, with how often it occurs.

    Args:
        model: a key of `MODELS`, or a configuration file.
        pixels: side of the picture.

    Raises:
        SVDiffError: this machine has no diffusers, and the shapes of the model at this size are not kept.
    """
    if importlib.util.find_spec("diffusers") is None:
        return _kept(str(model), pixels)
    return _read_off(model, pixels)


def _kept(model: str, pixels: int) -> dict[Layer, int]:
    kept = json.loads(_KEPT.read_text(encoding="utf-8"))
    rows = kept.get(f"{model} {pixels}")
    if rows is None:
        raise SVDiffError(f"the layers of {model} at {pixels} pixels need diffusers; without it: {', '.join(kept)}")
    return {
        Layer(kind, M, N, T, tuple(inputs), *rest): n for n, kind, M, N, T, inputs, *rest in kept[f"{model} {pixels}"]
    }


def _read_off(model: str | Path, pixels: int) -> dict[Layer, int]:
    config = CONFIGS / MODELS[model] if isinstance(model, str) else model
    with torch.device("meta"):
        network, inputs = network_of(json.loads(config.read_text()), pixels)
    found: Counter[Layer] = Counter()

    def write_down(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        weight, shape = module.weight, tuple(args[0].shape)
        M, N = weight.shape[0], weight[0].numel()
        rows = y.numel() // M
        if isinstance(module, nn.Conv2d):
            kernel, stride, padding = module.kernel_size[0], module.stride[0], module.padding[0]
            assert isinstance(padding, int)
            found[Layer("conv", M, N, rows, shape, kernel, stride, padding)] += 1
        else:
            found[Layer("linear", M, N, rows, (1, rows, N))] += 1

    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(write_down)
    network(**inputs)
    return dict(sorted(found.items()))


def network_of(config: dict[str, Any], pixels: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a configuration and inputs for one picture, on the present device."""
    if config.get("model_type") == "clip_text_model":
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**config)), {"input_ids": torch.zeros(1, TEXT_TOKENS, dtype=torch.long)}
    if config["_class_name"] == "FluxTransformer2DModel":
        from diffusers import FluxTransformer2DModel

        tokens, text = (pixels // 16) ** 2, 512
        return FluxTransformer2DModel.from_config(config), {
            "hidden_states": torch.zeros(1, tokens, config["in_channels"]),
            "encoder_hidden_states": torch.zeros(1, text, config["joint_attention_dim"]),
            "pooled_projections": torch.zeros(1, config["pooled_projection_dim"]),
            "timestep": torch.zeros(1),
            "guidance": torch.zeros(1),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(text, 3),
        }
    from diffusers import UNet2DConditionModel

    inputs: dict[str, Any] = {
        "sample": torch.zeros(1, config["in_channels"], pixels // 8, pixels // 8),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, TEXT_TOKENS, config["cross_attention_dim"]),
    }
    if added := added_conditions(config, 1):
        inputs["added_cond_kwargs"] = added
    return UNet2DConditionModel.from_config(config), inputs


def added_conditions(config: Any, batch: int) -> dict[str, Tensor]:
    """What SDXL's UNet wants besides text: a pooled text embedding and sizes; nothing for others."""
    if config.get("addition_embed_type") != "text_time":
        return {}
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {"text_embeds": torch.zeros(batch, pooled), "time_ids": torch.zeros(batch, 6)}


def keep() -> str:
    """The text of configs/layers.json."""
    sizes = [(model, pixels) for model, many in _PIXELS.items() for pixels in many]
    blocks = []
    for model, pixels in sizes:
        rows = [json.dumps([count, *astuple(layer)]) for layer, count in _read_off(model, pixels).items()]
        blocks.append(f'"{model} {pixels}": [\n' + ",\n".join(rows) + "\n]")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    _KEPT.write_text(keep(), encoding="utf-8")
