"""What the miniature is made of: the configurations of its tokenizer, text encoder, autoencoder, UNet and scheduler."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path

from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import world

LATENT_CHANNELS = 8
MAX_TOKENS = 32
_TEXT_WIDTH = 96
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose every word of the world is one token; other words fall into letters.

    The merges of a word build it from its end, letter by letter: such pieces all end in `</w>`, so no merge of one word
    can apply inside another.
    """
    listed = (world.COLORS, world.BACKGROUNDS, world.SHAPES, world.POSITIONS, world.SIZES, world.STYLES, world.SUBJECTS)
    words = {word for values in (*listed, world.RARE_TOKENS) for word in values}
    words |= {world.CLASS_NOUN, *["a", "photo", "picture", "of", "on", "in", "the", "and", "background", "style"]}
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[str] = []
    for word in sorted(words):
        piece = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if letter + piece not in vocabulary:
                merges.append(f"{letter} {piece}")
                vocabulary.append(letter + piece)
            piece = letter + piece
    vocabulary += [_BOS, _EOS]
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab_file.write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        merges_file.write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=MAX_TOKENS, pad_token=_EOS)


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """Three layers of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def autoencoder() -> AutoencoderTiny:
    """Four pixels a side to one latent of 8 channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 1, 2),
        decoder_block_out_channels=(40, 40, 40),
        num_decoder_blocks=(2, 2, 0),
        latent_channels=LATENT_CHANNELS,
    )


def unet() -> UNet2DConditionModel:
    """Three levels, with attention to the text on the lower two."""
    return UNet2DConditionModel(
        sample_size=world.IMAGE_SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, rescaled to end in pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def pipeline(
    vae: AutoencoderTiny, words: CLIPTokenizer, encoder: CLIPTextModel, denoiser: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts put together."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        unet=denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
