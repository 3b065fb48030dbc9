"""A Stable Diffusion 1.x in miniature with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESOLUTION = 16


def tiny_unet(**changes: Any) -> Any:
    """A UNet with every kind of layer that SD 1.5's has; all widths differ from one another."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def tiny_text_encoder(**changes: Any) -> Any:
    """CLIP's text encoder, two narrow layers of it; with a projection if `projection_dim` is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = {
        "vocab_size": 64,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    kind = CLIPTextModelWithProjection if "projection_dim" in changes else CLIPTextModel
    return kind(CLIPTextConfig(**{**config, **changes})).eval()


def tiny_tokenizer(folder: Path, **changes: Any) -> Any:
    """CLIP's tokenizer over single characters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16, **changes)


def tiny_vae(**changes: Any) -> Any:
    """AutoencoderKL that halves each side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": RESOLUTION,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def tiny_clip() -> Any:
    """CLIP, for its image encoder: 16 pixels in patches of 8."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(4)
    narrow = {"intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 64, "hidden_size": 12, "max_position_embeddings": 16, **narrow},
            vision_config={"hidden_size": 20, "image_size": RESOLUTION, "patch_size": 8, **narrow},
            projection_dim=14,
        )
    ).eval()


def tiny_pipeline(folder: Path) -> Any:
    """The whole pipeline, as `from_pretrained` would give it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(folder),
        unet=tiny_unet(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and text embeddings for `tiny_unet`."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=rng).to(dtype)
    context = torch.randn(2, 5, 12, generator=rng).to(dtype)
    return x, torch.tensor([3, 700]), context


@torch.no_grad()
def output(unet: Any) -> Tensor:
    """What a tiny UNet makes of `unet_inputs`."""
    x, t, context = unet_inputs()
    return unet(x.to(unet.dtype), t, context.to(unet.dtype)).sample


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model holds, for `assert_unchanged`."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Fail unless the model holds what it held, to the bit."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
