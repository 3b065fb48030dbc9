"""A LoRA that does what shifts do: ``dW = U diag(dsigma) Vh`` is a product of two factors as it stands.

With ``dsigma = relu(sigma + delta) - sigma`` the k largest ``|dsigma|`` are the best approximation of rank k, so that
nothing is decomposed again. What is left out is an error of ``sqrt(sum of dropped dsigma^2)`` in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .changes import Change
from .checkpoint import file_path
from .ldm import unet_path

Names = Callable[[Change], str | None]
"""What a file's keys for a layer begin with; None if the format has no place for it."""

_KOHYA_PREFIXES = {"denoiser": "lora_unet_", "text_encoder": "lora_te_"}
_KOHYA_XL_PREFIXES = {"denoiser": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # what loaders look for in a text encoder


@dataclass(frozen=True)
class Pair:
    """``dW = alpha / k * up @ down``.

    Attributes:
        down: ``[k, N]``, or ``[k, C_in, kh, kw]`` of a convolution.
        up: ``[M, k]``, or ``[M, k, 1, 1]``.
        alpha: k where the format has none.
    """

    down: Tensor
    up: Tensor
    alpha: int

    @property
    def rank(self) -> int:
        """k."""
        return self.down.shape[0]

    def product(self) -> Tensor:
        """dW as a matrix ``[M, N]``, in fp32."""
        return self.alpha / self.rank * (self.up.flatten(1).float() @ self.down.flatten(1).float())


def make_pair(change: Change, rank: int, alpha: int, dtype: torch.dtype) -> Pair:
    """The best pair of a rank for what shifts change in a weight, in dtype."""
    factors, shape = change.layer.factors(), change.layer.weight.shape
    kept = change.dsigma.abs().argsort(descending=True)[:rank]
    root = change.dsigma[kept].abs().sqrt()
    down = (root[:, None] * factors.Vh[kept].float()).unflatten(1, shape[1:])
    up = factors.U[:, kept].float() * (root * change.dsigma[kept].sign()) * (rank / alpha)
    up = up.view(*up.shape, *[1] * (len(shape) - 2))
    return Pair(down.to(dtype).contiguous(), up.to(dtype).contiguous(), alpha)


def choose_ranks(
    dsigma: Mapping[str, Tensor],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    share: float | None = None,
) -> dict[str, int]:
    """How many singular values of each weight to keep; all that move, if nothing is asked for.

    Args:
        dsigma: of each weight.
        rank: at most this many of each.
        energy: of each weight the fewest that keep this share of ``sum of dsigma^2``.
        max_error: the fewest in all, wherever they count most, so that no more than this share of the whole change's
            norm is lost. Ranks then differ from weight to weight.
        share: of each weight the fewest that keep this share of ``sum of |dsigma|``, by which Custom Diffusion counts
            (arXiv 2212.04488): at 0.6 its differences are a fifth of their size.
    """
    squares = {path: one.double().square().sort(descending=True).values for path, one in dsigma.items()}
    ranks = {path: int((one > 0).sum()) for path, one in squares.items()}
    if energy is not None:
        for path, one in squares.items():
            if ranks[path]:
                ranks[path] = min(ranks[path], 1 + int((one.cumsum(0) < energy * one.sum()).sum()))
    if share is not None:
        for path, one in squares.items():
            if ranks[path]:
                sizes = one.sqrt()
                ranks[path] = min(ranks[path], 1 + int((sizes.cumsum(0) < share * sizes.sum()).sum()))
    if max_error is not None and squares:
        together = torch.cat(list(squares.values())).sort().values
        allowed = max_error**2 * together.sum()
        droppable = int((together.cumsum(0) <= allowed).sum())
        least = together[droppable] if droppable < len(together) else torch.inf
        ranks = {path: min(ranks[path], int((one >= least).sum())) for path, one in squares.items()}
    return {path: count if rank is None else min(count, rank) for path, count in ranks.items()}


def diffusers_names(denoiser: str) -> Names:
    """Of the layout of diffusers and PEFT, for a pipeline whose denoiser is its "unet" or "transformer"."""

    def name(change: Change) -> str | None:
        if not _can_be_low_rank(change):
            return None
        return f"{denoiser if change.role == 'denoiser' else change.role}.{file_path(change.path)}"

    return name


def kohya_names(unet_config: object, *, xl: bool) -> Names:
    """Of the layout of sd-scripts, which A1111 and ComfyUI read; of SDXL's UNet it has the original's names."""
    prefixes = _KOHYA_XL_PREFIXES if xl else _KOHYA_PREFIXES

    def name(change: Change) -> str | None:
        if not (_can_be_low_rank(change) or change.layer.one_dim):
            return None
        path = unet_path(change.path, unet_config) if xl and change.role == "denoiser" else file_path(change.path)
        return prefixes[change.role] + path.replace(".", "_")

    return name


def _can_be_low_rank(change: Change) -> bool:
    """Whether loaders of LoRAs know such a layer."""
    if change.layer.one_dim or getattr(change.layer, "groups", 1) > 1:
        return False
    return change.role == "denoiser" or change.path.endswith(_TEXT_LAYERS)


def diffusers_tensors(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """``lora_A`` is down and ``lora_B`` up; there is no alpha, which means a factor of one."""
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        tensors |= {f"{name}.lora_A.weight": pair.down, f"{name}.lora_B.weight": pair.up}
    return tensors


def kohya_tensors(pairs: Mapping[str, Pair], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of sd-scripts; norms as LyCORIS has them. All alphas should be one: some consumers mix up different ones."""
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        tensors |= {
            f"{name}.lora_down.weight": pair.down,
            f"{name}.lora_up.weight": pair.up,
            f"{name}.alpha": torch.tensor(float(pair.alpha)),
        }
    for name, change in norms.items():
        tensors |= {f"{name}.w_norm": change, f"{name}.b_norm": torch.zeros_like(change)}  # one reader wants both
    return tensors
