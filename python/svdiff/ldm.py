"""Weights by the names of Stable Diffusion's first checkpoints, which single files have, and kohya's LoRAs of SDXL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from svdiff_kernels import SVDiffError

_UNET_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}

_KINDS = ("StableDiffusion", "StableDiffusionXL")
_TASKS = ("", "Img2Img", "Inpaint")


def unet_path(path: str, config: Any) -> str:
    """The path of a UNet's module, or of its weight, in the original layout.

    Args:
        path: in diffusers.
        config: of the UNet.

    Raises:
        SVDiffError: the UNet has a block that the original does not.
    """
    for outer, original in _UNET_OUTER.items():
        if path == outer or path.startswith(outer + "."):
            return original + path.removeprefix(outer)
    each = config.layers_per_block
    found = re.match(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", path)
    if not found or not isinstance(each, int):
        raise SVDiffError(f"{path} has no place in Stable Diffusion's original layout: export merged instead")
    where, block, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        for name, original in _RESNET.items():
            if rest == name or rest.startswith(name + "."):
                rest = original + rest.removeprefix(name)
    if where == "mid_block":
        return f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}"
    first = (each + 1) * block
    if kind == "downsamplers":
        return f"input_blocks.{first + each + 1}.0.op{rest.removeprefix('conv')}"
    if kind == "upsamplers":
        attends = "CrossAttn" in config.up_block_types[block]
        return f"output_blocks.{first + each}.{2 if attends else 1}.{rest}"
    row, column = ("input_blocks", first + number + 1) if where == "down_blocks" else ("output_blocks", first + number)
    return f"{row}.{column}.{0 if kind == 'resnets' else 1}.{rest}"


def checkpoint_of(pipeline: Any) -> dict[str, Tensor]:
    """All weights of a pipeline of SD 1.x, 2.x or XL, under the names of a single file.

    A VAE of another kind than theirs is left out: it would have to come as a file of its own.

    Raises:
        SVDiffError: it is another kind of pipeline.
    """
    kind = type(pipeline).__name__
    if kind not in [f"{one}{task}Pipeline" for one in _KINDS for task in _TASKS]:
        raise SVDiffError(f"a {kind} has no single-file layout here: export merged instead")
    parts = {"model.diffusion_model.": _unet(pipeline.unet)}
    if holds_vae(pipeline):
        parts["first_stage_model."] = _vae(pipeline.vae)
    generation = generation_of(pipeline)
    if generation == "xl":
        if pipeline.text_encoder is not None:  # the refiner has only the second
            parts["conditioner.embedders.0.transformer."] = _clip(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = _open_clip(pipeline.text_encoder_2)
    elif generation == "2":
        parts["cond_stage_model.model."] = _open_clip(pipeline.text_encoder)
    else:
        parts["cond_stage_model.transformer."] = _clip(pipeline.text_encoder)
    return {prefix + key: tensor.contiguous() for prefix, part in parts.items() for key, tensor in part}


def generation_of(pipeline: Any) -> Literal["1", "2", "xl"]:
    """Which Stable Diffusion it is: 2.x has OpenCLIP's text encoder, with another activation than CLIP's."""
    if type(pipeline).__name__.startswith("StableDiffusionXL"):
        return "xl"
    encoder = getattr(pipeline, "text_encoder", None)
    return "2" if encoder is not None and getattr(encoder.config, "hidden_act", None) == "gelu" else "1"


def holds_vae(pipeline: Any) -> bool:
    """Whether `checkpoint_of` has the pipeline's VAE."""
    return type(pipeline.vae).__name__ == "AutoencoderKL"


def _unet(unet: Any) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in unet.state_dict().items():
        yield unet_path(key, unet.config), tensor


def _vae(vae: Any) -> Iterator[tuple[str, Tensor]]:
    last = len(vae.config.block_out_channels) - 1
    for key, tensor in vae.state_dict().items():
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", key)
        if ".attn_1." in key:
            for name, original in _VAE_ATTENTION.items():
                key = key.replace(f".attn_1.{name}.", f".attn_1.{original}.")
            if tensor.dim() == 2:
                tensor = tensor[:, :, None, None]  # a convolution of one pixel there
        yield key, tensor


def _clip(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in _bare(encoder.state_dict()).items():
        yield f"text_model.{key}", tensor


def _open_clip(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    """OpenCLIP has q, k and v in one matrix, and multiplies by its projection from the other side."""
    weights = _bare(encoder.state_dict())
    for key, tensor in weights.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in _OPEN_CLIP_OUTER:
            yield _OPEN_CLIP_OUTER[key], tensor
        elif key == "text_projection.weight":
            yield "text_projection", tensor.T
        elif layer and layer[2] in _OPEN_CLIP:
            yield f"transformer.resblocks.{layer[1]}.{_OPEN_CLIP[layer[2]]}.{layer[3]}", tensor
        elif layer and layer[2] == "self_attn.q_proj":
            together = [weights[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            yield f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}", torch.cat(together)
        elif not (layer and layer[2] in ("self_attn.k_proj", "self_attn.v_proj")):
            raise SVDiffError(f"{key} has no place in OpenCLIP's layout: export merged instead")


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that transformers had before its version 5, and without what is no weight."""
    return {key.removeprefix("text_model."): t for key, t in state.items() if not key.endswith("position_ids")}
