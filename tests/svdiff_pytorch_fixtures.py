"""What svdiff-pytorch 0.2 computes, and the files that it writes, from its formula alone; no code of this package.

Every weight of a Linear, Conv2d, Embedding, LayerNorm and GroupNorm is a matrix: a kernel is ``co (ci h w)``, a vector
one row. ``W = U diag(S) Vh`` becomes ``U diag(relu(S + scale * delta)) Vh``. A file holds ``<module path>.delta``,
``[r]`` in fp32, without metadata: of the UNet in ``spectral_shifts.safetensors``, of the text encoder in
``spectral_shifts_te.safetensors``, where paths begin with ``text_model.``, which transformers 5 has no longer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

KINDS = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
UNET_FILE, TEXT_FILE = "spectral_shifts.safetensors", "spectral_shifts_te.safetensors"

Decomposed = dict[str, tuple[Tensor, Tensor, Tensor, torch.Size]]
"""U, S, Vh and the weight's shape, by module path."""


def randomise_norms(model: nn.Module) -> None:
    """As no fresh model has them: of both signs, and no two alike."""
    rng = torch.Generator().manual_seed(11)
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            for parameter in (module.weight, module.bias):
                parameter.data = torch.randn(parameter.shape, generator=rng)


def decomposed(model: nn.Module) -> Decomposed:
    """In fp64, of the weights as they are."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, KINDS):
            weight = module.weight.detach().double()
            matrix = weight.unsqueeze(0) if weight.dim() == 1 else weight.flatten(1)
            found[path] = (*torch.linalg.svd(matrix, full_matrices=False), weight.shape)
    return found


def some_deltas(factors: Decomposed, seed: int = 5) -> dict[str, Tensor]:
    """A fifth of the singular values in size, and one of a layer beyond the ReLU's kink; fp32, by module path."""
    rng = torch.Generator().manual_seed(seed)
    deltas = {}
    for path, (_, S, _, _) in factors.items():
        delta = 0.2 * S * torch.randn(S.shape, generator=rng, dtype=S.dtype)
        if len(S) > 2:
            delta[1] = -1.5 * S[1]
        deltas[path] = delta.float()
    return deltas


def weights(factors: Decomposed, deltas: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """The shifted weights, by parameter name; differentiable."""
    return {
        f"{path}.weight": (U @ torch.diag(torch.relu(S + scale * deltas[path])) @ Vh).reshape(shape)
        for path, (U, S, Vh, shape) in factors.items()
    }


def shifted(model: nn.Module, deltas: dict[str, Tensor], scale: float = 1.0) -> Any:
    """A plain copy of the model, in fp64, with the shifted weights."""
    plain = copy.deepcopy(model).double()
    plain.load_state_dict(weights(decomposed(model), deltas, scale), strict=False)
    return plain


def save_deltas(folder: Path, unet: dict[str, Tensor], text_encoder: dict[str, Tensor] | None = None) -> Path:
    """A folder with what training leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{path}.delta": delta for path, delta in unet.items()}, folder / UNET_FILE)
    if text_encoder is not None:
        save_file({text_key(path): delta for path, delta in text_encoder.items()}, folder / TEXT_FILE)
    return folder


def text_key(path: str) -> str:
    """The key of a text encoder's module path, of transformers 4 or 5."""
    return f"text_model.{path.removeprefix('text_model.')}.delta"
