"""The UNet and the text encoder with spectral layers, as classes of their own: scripts tell them apart by that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

from svdiff_kernels import FactorCache, SVDiffError
from svdiff_kernels.decompose import cost

from ... import checkpoint
from ...attached import layout_of, weight_of
from ...checkpoint import Layout
from ...pipelines import loading
from ...progress import arithmetic_bar
from ...targets import select
from .layers import MATRICES, NORMS, SVDLayer

StrPath = str | os.PathLike[str]


class _SpectralModel(nn.Module):
    """What both models share: what must not be asked of the parameters, and what cannot be saved."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what the model computes. Its first parameter, a delta, is in fp32 whatever the model is cast to."""
        layers: Iterator[Any] = (layer for layer in self.modules() if isinstance(layer, SVDLayer))
        dtype: torch.dtype = getattr(next(layers, None), "dtype", torch.float32)  # while it is loaded there are none
        return dtype

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: nobody could load what would be written, for it has factors instead of weights."""
        raise SVDiffError(
            f"a {type(self).__name__} is no checkpoint to save: write those tensors of its state_dict() that have "
            "'delta' in their names, with safetensors.torch.save_file"
        )


class UNet2DConditionModelForSVDiff(_SpectralModel, UNet2DConditionModel):
    """diffusers' UNet with shifts of every linear layer, convolution, LayerNorm and GroupNorm."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: StrPath,
        spectral_shifts: Path | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """The model in eval mode, on the CPU, all but its shifts frozen; see `utils.load_unet_for_svdiff`.

        Args:
            pretrained_model_name_or_path: see there.
            spectral_shifts: a delta file; None starts at zero.
            torch_dtype: of what the model computes; its weights are decomposed in fp32 whatever that is.
            kwargs: see there.

        Raises:
            SVDiffError: see there.
        """
        with loading(str(pretrained_model_name_or_path)):
            unet: Self = super().from_pretrained(pretrained_model_name_or_path, **_in_fp32(kwargs))
        make_spectral(unet, select(unet), spectral_shifts)
        return unet if torch_dtype is None else unet.to(torch_dtype)


class CLIPTextModelForSVDiff(_SpectralModel, CLIPPreTrainedModel):
    """transformers' CLIP text encoder with shifts of every layer and both embeddings.

    It holds the original as ``text_model``, so that its parameters have the names that svdiff-pytorch's files have,
    and is itself no `CLIPTextModel`: scripts that scale shifts look at that.
    """

    base_model_prefix = "text_model"

    def __init__(self, text_model: CLIPTextModel) -> None:
        super().__init__(text_model.config)
        self.text_model = text_model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: StrPath,
        spectral_shifts: Path | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """See `UNet2DConditionModelForSVDiff.from_pretrained`."""
        with loading(str(pretrained_model_name_or_path)):
            model = cls(CLIPTextModel.from_pretrained(pretrained_model_name_or_path, **_in_fp32(kwargs)))
        make_spectral(model, select(model, embeddings=True), spectral_shifts)
        return model if torch_dtype is None else model.to(torch_dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of `CLIPTextModel`."""
        return self.text_model(*args, **kwargs)


def make_spectral(model: nn.Module, modules: dict[str, nn.Module], shifts: Path | None) -> None:
    """Put spectral layers in, at the shifts of a file or at zero, and freeze all else.

    Args:
        model: in fp32.
        modules: of it, by path.
        shifts: a delta file; what it lacks is not shifted.

    Raises:
        SVDiffError: a file for another base, or damaged weights.
    """
    layout = layout_of(modules, rank=None, one_dim="scalar", base_model="")
    deltas = {} if shifts is None else _deltas_of(shifts, layout)
    model.requires_grad_(False)
    weights = {path: weight_of(module) for path, module in modules.items() if type(module) in MATRICES}
    costs = {path: cost(weight) for path, weight in weights.items()}
    for path in modules.keys() - weights.keys():
        model.set_submodule(path, NORMS[type(modules[path])].from_module(modules[path], mode="scalar"))
    with arithmetic_bar(sum(costs.values()), "Decomposing", delay=3) as bar:
        for path, factors in FactorCache().iterate(weights, contents=layout.hashes):
            model.set_submodule(path, MATRICES[type(modules[path])].from_module(modules[path], factors))
            weights[path].data = weights[path].new_empty(0)  # memory never holds all weights and all factors
            bar.advance(costs[path])
    for path, delta in deltas.items():
        model.get_parameter(f"{path}.delta").data.copy_(delta)
    # Or DDP would send all factors to all processes in every step.
    frozen = [f"{path}.{name}" for path in modules for name, _ in model.get_submodule(path).named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    model.eval()


def _deltas_of(shifts: Path, layout: Layout) -> dict[str, Tensor]:
    """A file's shifts by module path; svdiff-pytorch takes files that lack some."""
    file = checkpoint.read(shifts)
    held = {checkpoint.model_path(path, layout.shapes) for path in file.deltas}
    return file.for_layout(replace(layout, shapes={path: s for path, s in layout.shapes.items() if path in held}))


def _in_fp32(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Weights as they are trained on: a shift belongs to the basis of these. Nothing is ever unpickled."""
    return {**kwargs, "torch_dtype": torch.float32, "use_safetensors": True}
