"""What turns pictures and prompts into features: CLIP, DINO, Inception-v3, and the miniature's own encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from svdiff_kernels import SVDiffError

from ..miniature import NAME as MINIATURE
from ..pipelines import loading
from ..termination import exit_if_told
from .inception import InceptionV3, load_inception_weights
from .pictures import Judged, open_picture
from .preparation import image_processor

Pictures = Sequence[Judged | Path | Image.Image]

_DINO = {"vit": "DINO", "dinov2": "DINOv2", "dinov2_with_registers": "DINOv2", "dinov3_vit": "DINOv3"}
"""What models of these types are called: ViT is what DINO's first version is written as."""


@dataclass(frozen=True)
class Encoder:
    """Features of pictures and, if it has them, of texts.

    Attributes:
        name: what tables call its features.
        source: where it was loaded from.
        of_pixels: one batch of pictures in RGB, of any sizes, to ``[B, D]``.
        of_texts: one batch of texts to ``[B, D]``, which may be compared with pictures'; None if it reads none.
    """

    name: str
    source: str
    of_pixels: Callable[[list[Image.Image]], Tensor]
    of_texts: Callable[[list[str]], Tensor] | None = None

    def images(self, pictures: Pictures, batch_size: int = 16) -> Tensor:
        """Features ``[N, D]`` in fp32 on the CPU, as the network gives them: not of unit length.

        Raises:
            SVDiffError: there are no pictures, or one cannot be read.
        """
        return _batched(lambda part: self.of_pixels([open_picture(one) for one in part]), pictures, batch_size)

    def texts(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Features ``[N, D]`` in fp32 on the CPU; each different prompt is computed once.

        Raises:
            SVDiffError: this encoder reads no texts, or there are none.
        """
        if self.of_texts is None:
            raise SVDiffError(f"{self.name} reads no texts")
        different = list(dict.fromkeys(prompts))
        found = _batched(self.of_texts, different, batch_size)
        return found[[different.index(prompt) for prompt in prompts]]


def load_clip(name_or_path: str, device: torch.device | str = "cpu") -> Encoder:
    """CLIP (arXiv 2103.00020): a folder or hub id that transformers loads as a CLIPModel; ``miniature`` for its own.

    Raises:
        SVDiffError: no such model, no safetensors, or no CLIP.
    """
    if name_or_path == MINIATURE:
        return load_miniature_encoder(device)
    from transformers import AutoTokenizer, CLIPModel

    place = _place_of(name_or_path)
    _check_type(place, name_or_path, ("clip",), "--clip takes a CLIPModel")
    with _loading(name_or_path):
        model = CLIPModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32)
        tokenizer, processor = AutoTokenizer.from_pretrained(place), image_processor(place)
    return _of_clip("CLIP", name_or_path, model.eval().to(device), processor, tokenizer)


def load_miniature_encoder(device: torch.device | str = "cpu") -> Encoder:
    """What stands in for CLIP and DINO where the miniature is judged, under its own name."""
    from ..miniature.encoder import load_encoder

    with loading(MINIATURE):
        model, processor = load_encoder()
    return _of_clip("miniature encoder", MINIATURE, model.to(device), processor.image_processor, processor.tokenizer)


def load_dino(name_or_path: str, device: torch.device | str = "cpu") -> Encoder:
    """DINO (arXiv 2104.14294, as the DreamBooth paper uses it), DINOv2 or DINOv3: a folder or hub id of transformers.

    The feature is the last layer's class token, after its norm.

    Raises:
        SVDiffError: no such model, no safetensors, or none of these.
    """
    from transformers import AutoModel

    place = _place_of(name_or_path)
    kind = _check_type(place, name_or_path, tuple(_DINO), "--dino takes DINO, DINOv2 or DINOv3")
    with _loading(name_or_path):
        model = AutoModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32).eval().to(device)
        processor = image_processor(place)

    def of_pixels(images: list[Image.Image]) -> Tensor:
        pixels = processor(images=images, return_tensors="pt").pixel_values
        return model(pixel_values=pixels.to(device)).last_hidden_state[:, 0]

    return Encoder(_DINO[kind], name_or_path, of_pixels)


def load_inception(path: str, device: torch.device | str = "cpu") -> Encoder:
    """Inception-v3 as FID and KID are defined with it, its 2048 pooled features.

    Pictures are resized as clean-fid does (arXiv 2104.11222): by Pillow's antialiased bicubic filter, without rounding.

    Args:
        path: a safetensors file with the weights of ``pt_inception-2015-12-05``.
        device: where to compute.

    Raises:
        SVDiffError: no such file, or other weights.
    """
    model = InceptionV3().eval()
    load_inception_weights(model, path)
    model.to(device)

    def of_pixels(images: list[Image.Image]) -> Tensor:
        return model(torch.stack([model.prepared(image) for image in images]).to(device))

    return Encoder("Inception-v3", path, of_pixels)


def _of_clip(name: str, source: str, model: Any, processor: Any, tokenizer: Any) -> Encoder:
    def of_pixels(images: list[Image.Image]) -> Tensor:
        pixels = processor(images=images, return_tensors="pt").pixel_values
        return _pooled(model.get_image_features(pixel_values=pixels.to(model.device)))

    def of_texts(prompts: list[str]) -> Tensor:
        length = model.config.text_config.max_position_embeddings
        told = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        told = told.to(model.device)
        return _pooled(model.get_text_features(input_ids=told.input_ids, attention_mask=told.attention_mask))

    return Encoder(name, source, of_pixels, of_texts)


def _pooled(output: Any) -> Tensor:
    """Some versions of transformers give the features, others a structure with them."""
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.inference_mode()
def _batched(compute: Callable[[Any], Tensor], given: Sequence[Any], size: int) -> Tensor:
    if not given:
        raise SVDiffError("there is nothing to compute features of")
    parts = []
    for start in range(0, len(given), size):
        exit_if_told()
        parts.append(compute(list(given[start : start + size])).float().cpu())
    return torch.cat(parts)


def _place_of(name_or_path: str) -> str:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return str(folder)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise SVDiffError(f"there is no folder {name_or_path}, and it is no hub id")
    return name_or_path


def _check_type(place: str, name: str, allowed: tuple[str, ...], wanted: str) -> str:
    from transformers import AutoConfig

    with _loading(name):
        kind = str(AutoConfig.from_pretrained(place).model_type)
    if kind not in allowed:
        raise SVDiffError(f"{wanted}, but {name} is a model of type {kind!r}")
    return kind


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        with loading(name):
            yield
    except SVDiffError as error:
        if "safetensors" in str(error):
            raise SVDiffError(
                f"{name} has no safetensors weights, and nothing else is read: convert them once, with a program you "
                "trust them to"
            ) from error
        raise
