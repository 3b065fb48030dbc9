"""Unmix: in a mixed picture no subject's token may look at the other subject's half (SVDiff, 3.3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from svdiff_kernels import SVDiffError

from .cutmix import COLUMNS, PLAIN


class Unmix:
    """Records cross-attention maps of a UNet, and gives their loss.

    Only some layers are recorded, those below full resolution if there are such: they compute their maps outright, all
    others go on without. `release` undoes it.

    Args:
        unet: the denoiser.
        spots: ``[captions, 2, L]``: which tokens of a caption are the first subject's own, and the second's.

    Raises:
        SVDiffError: the UNet has no cross-attention.
    """

    def __init__(self, unet: Any, spots: Tensor) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        self._spots = spots
        self._maps: list[Tensor] = []
        self._undo: list[Callable[[], None]] = []
        for module in _layers(unet):
            self._undo.append(partial(_restore, module, module.processor))
            module.set_processor(AttnProcessor())
            module.get_attention_scores = self._recording(module.get_attention_scores)

    def start(self) -> None:
        """Forget what has been recorded: a forward pass follows."""
        self._maps.clear()

    def loss(self, captions: Tensor, arrangements: Tensor, size: Sequence[int]) -> Tensor:
        """Of the maps of the last forward pass: mean square, over the other's half, of each subject's attention.

        Args:
            captions: ``[B]``, numbers of the batch's captions.
            arrangements: ``[B]``, of `cutmix`; a plain picture adds nothing.
            size: height and width of the latents.
        """
        spots = self._spots[captions]
        mixed = (arrangements != PLAIN).float()
        losses = []
        for probabilities in self._maps:
            # [B, heads, T, L] -> [B, heads, 2, h, w]: how much each place looks at the tokens of each subject
            seen = torch.einsum("bhtl,bsl->bhst", probabilities.unflatten(0, (len(mixed), -1)).float(), spots)
            height = round((seen.shape[-1] * size[0] / size[1]) ** 0.5)
            outside = self._outside(arrangements, height, seen.shape[-1] // height)
            square = seen.unflatten(-1, outside.shape[-2:]).square() * outside[:, None]
            losses.append(square.sum(dim=(2, 3, 4)).mean(dim=1) / outside.sum(dim=(1, 2, 3)))
        self._maps.clear()
        return (torch.stack(losses).mean(dim=0) * mixed).mean()

    def release(self) -> None:
        """Give the UNet its attention back."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _recording(self, scores: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def get_attention_scores(*args: Any, **kwargs: Any) -> Tensor:
            probabilities = scores(*args, **kwargs)
            self._maps.append(probabilities)
            return probabilities

        return get_attention_scores

    @staticmethod
    def _outside(arrangements: Tensor, height: int, width: int) -> Tensor:
        """``[B, 2, h, w]``: 1 where the first, and the second, subject is not."""
        rows = torch.arange(height, device=arrangements.device)[:, None].expand(height, width) >= height / 2
        columns = torch.arange(width, device=arrangements.device).expand(height, width) >= width / 2
        later = torch.where((arrangements == COLUMNS)[:, None, None], columns, rows).float()
        return torch.stack([later, 1 - later], dim=1)


def _layers(unet: Any) -> list[Any]:
    found = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
    last = len(getattr(unet, "up_blocks", ())) - 1
    lower = [m for name, m in found.items() if not re.match(rf"(down_blocks\.0|up_blocks\.{last})\.", name)]
    if not found:
        raise SVDiffError(f"unmix_loss_weight: {type(unet).__name__} has no cross-attention to look at")
    return lower or list(found.values())


def _restore(module: Any, processor: Any) -> None:
    del module.get_attention_scores
    module.set_processor(processor)
