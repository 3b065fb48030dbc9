"""Pipelines of every family that `svdiff train` knows, in miniature with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from tiny import tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae


def tiny_sdxl_pipeline(folder: Path) -> Any:
    """SDXL: two text encoders, of which the second has a projection."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = tiny_unet(
        cross_attention_dim=12 + 20,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=10 + 6 * 4,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=tiny_text_encoder(hidden_size=20, projection_dim=10),
        tokenizer=tiny_tokenizer(folder),
        tokenizer_2=tiny_tokenizer(folder, pad_token="z"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        add_watermarker=False,
    )


def tiny_sd3_pipeline(folder: Path, *, t5: bool = True) -> Any:
    """SD3, with T5 or without."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=6,
        out_channels=6,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=28,
        caption_projection_dim=16,
        pooled_projection_dim=14 + 10,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(latent_channels=6, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=tiny_text_encoder(projection_dim=14),
        tokenizer=tiny_tokenizer(folder),
        text_encoder_2=tiny_text_encoder(hidden_size=10, projection_dim=10),
        tokenizer_2=tiny_tokenizer(folder, pad_token="z"),
        text_encoder_3=tiny_t5(width=28) if t5 else None,
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,
    )


def tiny_flux_pipeline(folder: Path, *, guidance: bool = True) -> Any:
    """FLUX, distilled for guidance (dev) or not (schnell)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=6 * 4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=28,
        pooled_projection_dim=12,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance),
        vae=tiny_vae(latent_channels=6, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(folder),
        text_encoder_2=tiny_t5(width=28),
        tokenizer_2=tiny_t5_tokenizer(),
    )


def tiny_t5(width: int) -> Any:
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    config = T5Config(
        vocab_size=64, d_model=width, d_kv=6, d_ff=20, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def tiny_t5_tokenizer() -> Any:
    """T5's tokenizer over single characters."""
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *ascii_lowercase]
    return T5TokenizerFast([(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)], extra_ids=0)


PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd": tiny_pipeline,
    "sdxl": tiny_sdxl_pipeline,
    "sd3": tiny_sd3_pipeline,
    "sd3 without t5": lambda folder: tiny_sd3_pipeline(folder, t5=False),
    "flux dev": tiny_flux_pipeline,
    "flux schnell": lambda folder: tiny_flux_pipeline(folder, guidance=False),
}
"""A pipeline of each family, in each of its variants, by a name."""


def draw(pipeline: Any, prompt: str = "a dog") -> np.ndarray:
    """A picture of ``[1, 16, 16, 3]``, always of the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        prompt, height=16, width=16, num_inference_steps=2, guidance_scale=3.0, output_type="np", generator=generator
    ).images
    return np.asarray(images)
