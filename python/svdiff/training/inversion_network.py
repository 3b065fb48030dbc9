"""InST's inversion: a network that reads a new word's embedding off pictures (arXiv 2211.13203).

Textual inversion trains the embedding itself. Here a network trains: the word's first embeddings look at what a
frozen CLIP sees in the pictures, by layers of cross-attention, and what they become is what the word stands for.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svdiff_kernels import SVDiffError

from ..outputs import writing
from ..pipelines import loading
from .data import Picture, load_picture

FILE_NAME = "inversion_network.safetensors"
_BATCH = 8


class InversionNetwork(nn.Module):
    """From a word's first embeddings and the states of an image encoder to the word's embeddings.

    It begins as the identity: the last layer is zero, and what it gives is added to the first embeddings, in units of
    their root mean square.

    Args:
        width: of the embeddings.
        context_width: of the image encoder's states.
        layers: of cross-attention.
        dropout: of each layer's answer while training; InST's rate is 0.05.
    """

    def __init__(self, width: int, context_width: int, *, layers: int = 2, dropout: float = 0.05) -> None:
        super().__init__()
        self.config = {"width": width, "context_width": context_width, "layers": layers, "dropout": dropout}
        self.norm_context = nn.LayerNorm(context_width)
        self.layers = nn.ModuleList(_CrossAttention(width, context_width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, start: Tensor, states: Tensor) -> Tensor:
        """The word's embeddings ``[n, width]``.

        Args:
            start: its first ones, ``[n, width]``.
            states: of all pictures, one after the other, ``[T, context_width]``. As attention is a mean over them, a
                network may be shown any number of pictures.
        """
        with torch.autocast(start.device.type, enabled=False):  # or training would see another word than is saved
            unit = start.square().mean().sqrt()
            context, hidden = self.norm_context(states), start / unit
            for layer in self.layers:
                hidden = hidden + layer(hidden, context)
            found: Tensor = start + unit * self.out(self.dropout(self.norm(hidden)))
        return found


class _CrossAttention(nn.Module):
    """Embeddings look at states; in up to eight heads, as in InST, of as many as divide the width."""

    def __init__(self, width: int, context_width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, math.gcd(8, width), kdim=context_width, vdim=context_width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        answer: Tensor = self.attention(self.norm(hidden), context, context, need_weights=False)[0]
        found: Tensor = self.dropout(answer)
        return found


@torch.no_grad()
def image_states(name: str, pictures: Sequence[Picture], device: torch.device | str = "cpu") -> Tensor:
    """What a frozen CLIP image encoder sees in pictures, ``[pictures x (1 + patches), width]`` in fp32.

    All states of the last layer, the class token's first: over a lone image embedding, InST's choice, a softmax has
    nothing to choose from, and every layer of attention is but a linear one.

    Args:
        name: folder or hub id of a CLIPModel or CLIPVisionModelWithProjection; ``miniature`` for its own encoder.
        pictures: which; of each the square in the middle is seen.
        device: where to compute.

    Raises:
        SVDiffError: no such encoder, no CLIP, no safetensors, or a picture that cannot be read.
    """
    model, processor = _load(name)
    side = int(model.config.image_size)
    model.to(device).eval()
    states = []
    for start in range(0, len(pictures), _BATCH):
        images = [load_picture(picture, [(side, side)]).image for picture in pictures[start : start + _BATCH]]
        pixels = processor(images=images, return_tensors="pt").pixel_values.to(device)
        states.append(model(pixel_values=pixels).last_hidden_state.float().flatten(0, 1))
    return torch.cat(states)


def save_network(
    directory: str | os.PathLike[str],
    networks: Mapping[str, InversionNetwork],
    starts: Mapping[str, Tensor],
    **told: str,
) -> Path:
    """Write the networks of a word, one for each text encoder, with the embeddings they start from; returns the file.

    Args:
        directory: where.
        networks: by text encoder.
        starts: likewise, ``[n, width]``.
        told: what else the metadata should say, such as the word and the image encoder.

    Raises:
        SVDiffError: the folder cannot be written.
    """
    path = Path(directory) / FILE_NAME
    tensors = {f"{name}.start": start.detach().float().cpu().contiguous() for name, start in starts.items()}
    for name, network in networks.items():
        tensors |= {f"{name}.{key}": tensor.detach().cpu() for key, tensor in network.state_dict().items()}
    configs = json.dumps({name: network.config for name, network in networks.items()})
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        save_file(tensors, partial, {"format": "pt", "config": configs, **told})
        partial.replace(path)
    return path


def load_network(path: str | os.PathLike[str]) -> tuple[dict[str, InversionNetwork], dict[str, Tensor]]:
    """The networks of a file, or of the one in a folder, ready to be asked, and what they start from.

    Raises:
        SVDiffError: there is no such file, or it holds no networks.
    """
    file = Path(path).expanduser()
    file = file / FILE_NAME if file.is_dir() else file
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (no mapping)
            configs = json.loads((handle.metadata() or {})["config"])
        networks, starts = {}, {}
        for name, config in configs.items():
            own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            starts[name] = own.pop("start")
            networks[name] = InversionNetwork(**config).eval()
            networks[name].load_state_dict(own)
    except FileNotFoundError as error:
        raise SVDiffError(f"there is no file {file}") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise SVDiffError(f"{file} is no inversion network: {' '.join(str(error).split())}") from error
    return networks, starts


def _load(name: str) -> tuple[Any, Any]:
    """An image encoder in fp32 on the CPU, and what prepares pictures for it."""
    if name == "miniature":
        from ..miniature.encoder import load_encoder

        model, both = load_encoder()
        return model.vision_model, both.image_processor
    from transformers import AutoConfig, CLIPModel, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    place = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    with loading(f"{name} (image_encoder)"):
        kind = AutoConfig.from_pretrained(place).model_type
    if kind not in ("clip", "clip_vision_model"):
        raise SVDiffError(f"image_encoder {name} is a {kind}, not a CLIPModel or CLIPVisionModelWithProjection")
    with loading(f"{name} (image_encoder)"):
        made: Any = CLIPModel if kind == "clip" else CLIPVisionModelWithProjection
        model, told = made.from_pretrained(place, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(key for key in told["missing_keys"] if key.startswith("vision_model.")):
            raise SVDiffError(f"{missing[0]} is missing")
        try:
            processor = CLIPImageProcessorPil.from_pretrained(place)
        except OSError:  # no file says how pictures are prepared: as for all CLIPs, then
            side = model.vision_model.config.image_size
            processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return model.vision_model, processor
