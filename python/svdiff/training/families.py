"""What is particular to each kind of pipeline: how it reads a prompt, and how its denoiser is asked.

A family is a small class. A new one says which tokenizers and text encoders there are, what the denoiser is told of a
prompt, and how it is called; everything else in `training` is the same for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from svdiff_kernels import SVDiffError

from ..pipelines import denoiser_of

Conditions = tuple[Tensor, ...]
"""What a denoiser is told of a prompt; each ``[B, ...]``."""


class Family:
    """One kind of pipeline.

    Attributes:
        pipeline: see below.
        denoiser: its UNet or transformer.
        text_encoders: of those that read prompts, by name.
        flow: whether it predicts the velocity from data to noise along a straight line (flow matching).
        has_cross_attention: whether its denoiser looks at the prompt in layers of their own.

    Args:
        pipeline: of diffusers.
        max_sequence_length: tokens of a T5 prompt; None for what the pipeline takes.
        guidance_scale: what a denoiser distilled for it is told.
    """

    flow: ClassVar[bool] = False
    has_cross_attention: ClassVar[bool] = False
    readers: ClassVar[tuple[tuple[str, str], ...]] = (("tokenizer", "text_encoder"),)

    def __init__(self, pipeline: Any, *, max_sequence_length: int | None = None, guidance_scale: float = 1.0) -> None:
        self.pipeline, self.denoiser = pipeline, denoiser_of(pipeline)
        self._guidance_scale, self._max_sequence_length = guidance_scale, max_sequence_length
        self.text_encoders: dict[str, Any] = {}
        self._tokenizers: dict[str, Any] = {}
        for tokenizer, encoder in self.readers:
            if getattr(pipeline, encoder, None) is not None:
                self.text_encoders[encoder] = getattr(pipeline, encoder)
                self._tokenizers[encoder] = getattr(pipeline, tokenizer)

    def trainable_encoders(self) -> dict[str, Any]:
        """CLIP's text encoders; T5 is too large, and nobody trains it."""
        return {name: model for name, model in self.text_encoders.items() if not _is_t5(model)}

    def tokens(self, encoder: str, captions: Sequence[str]) -> Tensor:
        """Token ids ``[len(captions), L]`` of one text encoder."""
        tokenizer = self._tokenizers[encoder]
        captions = [self._spelt(encoder, caption) for caption in captions]
        longest = self._t5_length() if _is_t5(self.text_encoders[encoder]) else tokenizer.model_max_length
        ids: Tensor = tokenizer(
            list(captions), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).input_ids
        return ids

    def token_places(self, encoder: str, caption: str, words: str) -> list[int]:
        """Where the tokens of `words` are in a caption, the first time they occur; empty if they do not."""
        ids = self.tokens(encoder, [caption])[0].tolist()
        wanted = self._tokenizers[encoder](self._spelt(encoder, words), add_special_tokens=False).input_ids
        for start in range(len(ids) - len(wanted) + 1):
            if ids[start : start + len(wanted)] == wanted:
                return list(range(start, start + len(wanted)))
        return []

    def encode(self, encoder: str, ids: Tensor) -> tuple[Tensor, ...]:
        """What one text encoder makes of token ids, for `conditions`."""
        raise NotImplementedError

    def conditions(self, encoded: dict[str, tuple[Tensor, ...]]) -> Conditions:
        """What the denoiser is told, of what the text encoders made."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """The denoiser's answer.

        Args:
            noisy: latents ``[B, C, h, w]``.
            timesteps: ``[B]``.
            conditions: see `conditions`.
            sizes: ``[B, 6]``: of the picture before scaling, its corner that was cut off, and of what is left, in
                pixels, height (top) first.
        """
        raise NotImplementedError

    def _spelt(self, encoder: str, caption: str) -> str:
        """The caption with every token of a learned word of several, as the pipeline will write it."""
        if not hasattr(self.pipeline, "maybe_convert_prompt"):
            return caption
        spelt: str = self.pipeline.maybe_convert_prompt(caption, self._tokenizers[encoder])
        return spelt

    def _t5_length(self) -> int:
        if self._max_sequence_length is not None:
            return self._max_sequence_length
        return int(inspect.signature(self.pipeline.__call__).parameters["max_sequence_length"].default)


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x."""

    has_cross_attention = True

    @override
    def encode(self, encoder: str, ids: Tensor) -> tuple[Tensor, ...]:
        return (self.text_encoders[encoder](ids)[0],)

    @override
    def conditions(self, encoded: dict[str, tuple[Tensor, ...]]) -> Conditions:
        return encoded["text_encoder"]

    @override
    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        (context,) = conditions
        predicted: Tensor = self.denoiser(noisy, timesteps, context, return_dict=False)[0]
        return predicted


class StableDiffusionXL(Family):
    """SDXL: two text encoders, and the sizes of the picture."""

    has_cross_attention = True
    readers = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))

    @override
    def encode(self, encoder: str, ids: Tensor) -> tuple[Tensor, ...]:
        return _penultimate(self.text_encoders[encoder], ids)

    @override
    def conditions(self, encoded: dict[str, tuple[Tensor, ...]]) -> Conditions:
        context = torch.cat([states for states, _ in encoded.values()], dim=-1)
        return context, encoded["text_encoder_2"][1]  # of the second alone: it has a projection

    @override
    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        context, pooled = conditions
        added = {"text_embeds": pooled, "time_ids": sizes.to(noisy.dtype)}
        predicted: Tensor = self.denoiser(noisy, timesteps, context, added_cond_kwargs=added, return_dict=False)[0]
        return predicted


class StableDiffusion3(Family):
    """SD3: two CLIPs side by side, then T5, which may be left out."""

    flow = True
    readers = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3"))

    @override
    def encode(self, encoder: str, ids: Tensor) -> tuple[Tensor, ...]:
        model = self.text_encoders[encoder]
        return (model(ids)[0],) if _is_t5(model) else _penultimate(model, ids)

    @override
    def conditions(self, encoded: dict[str, tuple[Tensor, ...]]) -> Conditions:
        clips = [encoded["text_encoder"], encoded["text_encoder_2"]]
        states = torch.cat([states for states, _ in clips], dim=-1)
        width = int(self.denoiser.config.joint_attention_dim)
        states = F.pad(states, (0, width - states.shape[-1]))
        if "text_encoder_3" in encoded:
            long = encoded["text_encoder_3"][0]
        else:
            long = states.new_zeros(states.shape[0], self._t5_length(), width)
        return torch.cat([states, long.to(states.dtype)], dim=1), torch.cat([pooled for _, pooled in clips], dim=-1)

    @override
    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        context, pooled = conditions
        predicted: Tensor = self.denoiser(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return predicted


class Flux(Family):
    """FLUX: CLIP's summary and T5's words; latents in patches of two by two."""

    flow = True
    readers = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))

    @override
    def encode(self, encoder: str, ids: Tensor) -> tuple[Tensor, ...]:
        model = self.text_encoders[encoder]
        return (model(ids)[0] if _is_t5(model) else model(ids).pooler_output,)

    @override
    def conditions(self, encoded: dict[str, tuple[Tensor, ...]]) -> Conditions:
        return encoded["text_encoder_2"][0], encoded["text_encoder"][0]

    @override
    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        context, pooled = conditions
        height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        rows = torch.arange(height, device=noisy.device).repeat_interleave(width)
        columns = torch.arange(width, device=noisy.device).repeat(height)
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=1).to(noisy.dtype)
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = noisy.new_full((noisy.shape[0],), self._guidance_scale)
        patches = F.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2)  # [B, patches, 4 C]
        predicted: Tensor = self.denoiser(
            hidden_states=patches,
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=context,
            txt_ids=places.new_zeros(context.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return F.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (height, width)), 2)


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""By the class of the pipeline; one that derives from it will do."""


def family_of(pipeline: Any, **settings: Any) -> Family:
    """The family of a pipeline; `settings` as of `Family`.

    Raises:
        SVDiffError: it is of none.
    """
    for kind in type(pipeline).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__](pipeline, **settings)
    known = ", ".join(FAMILIES)
    raise SVDiffError(f"svdiff train does not know a {type(pipeline).__name__}, only {known}")


def _is_t5(model: nn.Module) -> bool:
    return type(model).__name__.startswith("T5")


def _penultimate(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The states before the last layer, ``[B, L, D]``, and the projected summary, ``[B, P]``."""
    out = model(ids, output_hidden_states=True)
    return out.hidden_states[-2], out[0]
