"""Custom Diffusion's file (arXiv 2212.04488): the whole weights of the keys and values of cross-attention.

It is laid out as diffusers' `load_attn_procs` reads it. The weight of ``<block>.attn2.to_k`` has the key
``<block>.attn2.processor.to_k_custom_diffusion.weight``, that of to_v likewise. ``<block>.attn1.processor`` is an empty
tensor: the attention there keeps its own weights, and diffusers wants an entry for each.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svdiff_kernels import Factors, SVDiffError, __version__, decompose
from svdiff_kernels.nn import SpectralModule
from svdiff_kernels.objects import content_hash

from . import checkpoint
from .changes import Change
from .pipelines import denoiser_of
from .targets import own_modules

FILE_NAME = "pytorch_custom_diffusion_weights.safetensors"
FORMAT = "custom_diffusion"
FORMAT_VERSION = "1"

_KEY = re.compile(r"(?P<attention>.+)\.processor\.(?P<name>to_[kv])_custom_diffusion\.weight")
_PATH = re.compile(r"(?P<attention>.+)\.(?P<name>to_[kv])")
_MARKER = re.compile(r".+\.processor")


@dataclass(frozen=True)
class WeightFile:
    """What a file says: weights ``[M, N]`` by the path of their layer, such as ``....attn2.to_k``, and its metadata."""

    path: Path
    weights: dict[str, Tensor]
    metadata: dict[str, str]

    def told(self, key: str) -> Any:
        """What the metadata says under a key, as it was given to `write`; None if nothing."""
        text = self.metadata.get(key)
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            return text

    def layers_of(self, model_or_pipeline: Any) -> dict[str, nn.Linear]:
        """The layers of a model whose weights these are to replace, by path.

        Raises:
            SVDiffError: a layer is not there, has another shape or spectral shifts; or the file was trained on weights
                other than those of the model.
        """
        model = model_or_pipeline if isinstance(model_or_pipeline, nn.Module) else denoiser_of(model_or_pipeline)
        modules = dict(own_modules(model))
        if attached := [path for path, module in modules.items() if isinstance(module, SpectralModule)]:
            raise SVDiffError(f"{type(model).__name__} has spectral layers ({attached[0]}): unload its adapter first")
        hashes, found = self.base_hashes(), {}
        for path, weight in self.weights.items():
            layer = modules.get(path)
            if type(layer) is not nn.Linear:
                raise SVDiffError(f"{self._key(path)}: {type(model).__name__} has no such linear layer")
            if layer.weight.shape != weight.shape:
                raise SVDiffError(
                    f"{self._key(path)} has shape {list(weight.shape)}, but the model's has "
                    f"{list(layer.weight.shape)}: the file was made for another base"
                )
            if hashes and content_hash(layer.weight)[: checkpoint.HASH_DIGITS] != hashes[path]:
                base = self.metadata.get("base_model") or "another base model"
                raise SVDiffError(
                    f"{self._key(path)} was trained on other weights than this model's: the file is for {base}"
                )
            found[path] = layer
        return found

    def base_hashes(self) -> dict[str, str]:
        """The beginnings of the content hashes of the weights it was trained on, by path; empty if not told."""
        digits = self.metadata.get("base_hashes", "").split()
        if digits and len(digits) != len(self.weights):
            raise SVDiffError(
                f"{self.path}: its metadata has {len(digits)} base hashes for {len(self.weights)} weights"
            )
        return dict(zip(sorted(self.weights), digits, strict=False))

    def _key(self, path: str) -> str:
        return f"{self.path.name}: key {_key(path)}"


def hashes_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Content hashes of the base's weights by path, for `write`; to be taken before they are trained."""
    return {path: content_hash(weight) for path, weight in weights.items()}


def write(
    path: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, object] | None = None,
    *,
    hashes: Mapping[str, str] | None = None,
) -> Path:
    """Write trained weights.

    Args:
        path: a folder, in which the file is called `FILE_NAME`; or a file, ``*.safetensors``.
        weights: ``[M, N]`` by the path of their layer. diffusers reads the file if it has to_k and to_v of all
            attentions that are called ``attn2``.
        metadata: what the file should say, of what JSON can hold: "base_model", "modifier_tokens",
            "instance_prompts", ...
        hashes: `hashes_of` the base's weights, by which another base is told.

    Returns:
        The file.

    Raises:
        SVDiffError: a path is not that of a key or value, one of the two is missing, a weight is no finite matrix, or
            the place cannot be written.
    """
    if not weights:
        raise SVDiffError("Custom Diffusion: there are no weights to write")
    tensors: dict[str, Tensor] = {}
    for layer, weight in weights.items():
        if not _PATH.fullmatch(layer):
            raise SVDiffError(f"Custom Diffusion trains keys and values of cross-attention, not {layer!r}")
        tensors[_key(layer)] = weight.detach().to("cpu", copy=True).contiguous()
    _check(tensors, "Custom Diffusion")
    if hashes is not None and (missing := sorted(weights.keys() - hashes.keys())):
        raise SVDiffError(f"Custom Diffusion: there is no hash of the base's {missing[0]}")
    for attention in {key.removesuffix(".processor") for key in map(_attention_key, weights)}:
        block, _, name = attention.rpartition(".")
        if name == "attn2":
            tensors[f"{block}.attn1.processor"] = torch.empty(0)
    said = {key: one if isinstance(one, str) else json.dumps(one) for key, one in (metadata or {}).items()} | {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base_hashes": " ".join(hashes[layer][: checkpoint.HASH_DIGITS] for layer in sorted(weights)) if hashes else "",
    }
    file = Path(path).expanduser()
    file = file if file.suffix == ".safetensors" else file / FILE_NAME
    checkpoint.write({file: (tensors, said)})
    return file


def find(path: str | os.PathLike[str]) -> Path | None:
    """The file of this kind that a folder holds, or that a path is; None if there is none.

    Raises:
        SVDiffError: see `read`.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        place = place / FILE_NAME
        return place if place.is_file() else None
    if place.suffix != ".safetensors" or not place.is_file():
        return None
    return place if any(map(_KEY.fullmatch, checkpoint.read_tensors(place, "file")[0])) else None


def read(path: str | os.PathLike[str]) -> WeightFile:
    """Read a file of ours or of diffusers', and check what needs no model for it.

    Args:
        path: a folder or a file.

    Raises:
        SVDiffError: no such file, not safetensors (nothing is ever unpickled), truncated, a key that is neither that
            of a key's or value's weight nor an empty marker, one of the two without the other, a value that is not
            finite, or a format version newer than this library.
    """
    place = Path(path).expanduser()
    place = place / FILE_NAME if place.is_dir() else place
    tensors, metadata = checkpoint.read_tensors(place, "file of Custom Diffusion")
    version = metadata.get("format_version", FORMAT_VERSION)
    if metadata.get("format") == FORMAT and version != FORMAT_VERSION:
        raise SVDiffError(f"{place} has format version {version}; this library reads version {FORMAT_VERSION}")
    tensors = {key: one for key, one in tensors.items() if one.numel() or not _MARKER.fullmatch(key)}
    if not tensors:
        raise SVDiffError(f"{place} holds no weights of Custom Diffusion")
    _check(tensors, place.name)
    weights = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        assert found is not None  # checked above
        weights[f"{found['attention']}.{found['name']}"] = tensor
    return WeightFile(place, weights, metadata)


class Placed:
    """Weights that a model has instead of its own, until `unload`."""

    def __init__(self, layers: Mapping[str, nn.Linear], originals: Mapping[str, Tensor]) -> None:
        self._layers, self.originals = dict(layers), dict(originals)

    def unload(self) -> None:
        """Give the originals back, to the bit (cast and moved, if the model has been since)."""
        for path, layer in self._layers.items():
            layer.weight.data = self.originals[path].to(layer.weight.device, layer.weight.dtype)
        self._layers.clear()


def load(model_or_pipeline: Any, path: str | os.PathLike[str], scale: float = 1.0) -> Placed:
    """Put trained weights into a model's own layers.

    Args:
        model_or_pipeline: a UNet, or a pipeline that has one.
        path: a folder or a file.
        scale: how much of the change: ``W0 + scale * (W - W0)``.

    Returns:
        What gives the original weights back.

    Raises:
        SVDiffError: see `read` and `WeightFile.layers_of`. The model is then as it was.
    """
    file = read(path)
    layers = file.layers_of(model_or_pipeline)
    originals = {layer_path: layer.weight.data for layer_path, layer in layers.items()}
    for layer_path, layer in layers.items():
        old, new = originals[layer_path], file.weights[layer_path].float()
        if scale != 1.0:
            new = torch.lerp(old.float().cpu(), new, scale)
        layer.weight.data = new.to(old.device, old.dtype)
    return Placed(layers, originals)


def changes_of(originals: Mapping[str, Tensor], weights: Mapping[str, Tensor], scale: float = 1.0) -> list[Change]:
    """What weights change, decomposed: ``scale * (W - W0) = U diag(dsigma) Vh``.

    Args:
        originals: the base's, ``[M, N]`` by path of their layer.
        weights: trained ones.
        scale: how much of the change.
    """
    paths = list(weights)
    factors = decompose([weights[path].float() - originals[path].float().cpu() for path in paths], names=paths)
    return [
        Change("denoiser", path, Difference(originals[path], one), scale * one.sigma)
        for path, one in zip(paths, factors, strict=True)
    ]


@dataclass(frozen=True)
class Difference:
    """A weight that has been trained as it is, for `Change.layer`: singular vectors of its change."""

    weight: Tensor
    own_factors: Factors
    one_dim: ClassVar[bool] = False

    def factors(self) -> Factors:
        """Of ``W - W0``."""
        return self.own_factors


def _key(path: str) -> str:
    found = _PATH.fullmatch(path)
    assert found is not None
    return f"{found['attention']}.processor.{found['name']}_custom_diffusion.weight"


def _attention_key(path: str) -> str:
    return path.rpartition(".")[0] + ".processor"


def _check(tensors: Mapping[str, Tensor], where: str) -> None:
    """What a file holds apart from markers."""
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise SVDiffError(f"{where}: key {key} is not of a key's or value's weight, which is all that is read")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise SVDiffError(f"{where}: key {key} is no matrix of numbers")
        if not torch.isfinite(tensor).all():
            raise SVDiffError(f"{where}: key {key} holds NaN or inf")
        other = "to_v" if found["name"] == "to_k" else "to_k"
        if (missing := _key(f"{found['attention']}.{other}")) not in tensors:
            raise SVDiffError(f"{where}: key {missing} is missing")
