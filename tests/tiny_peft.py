"""Models of each shape that PEFT is tried on: tiny, with random weights, and with inputs to call them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from svdiff.peft import SVDiffConfig, SVDiffLayer
from tiny import tiny_unet, unet_inputs
from torch import Tensor, nn


def tiny_llama(**changes: Any) -> Any:
    """Linear layers without biases; keys and values narrower than queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def tiny_gpt2(**changes: Any) -> Any:
    """Conv1D, whose weights are transposed, with biases; the output layer is tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = {
        "vocab_size": 37,
        "n_positions": 32,
        "n_embd": 16,
        "n_inner": 20,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    return GPT2LMHeadModel(GPT2Config(**{**config, **changes})).eval()


def tiny_t5(**changes: Any) -> Any:
    """An encoder and a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(2)
    config = {
        "vocab_size": 37,
        "d_model": 16,
        "d_kv": 6,
        "d_ff": 20,
        "num_layers": 2,
        "num_heads": 3,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "dropout_rate": 0.0,
    }
    return T5ForConditionalGeneration(T5Config(**{**config, **changes})).eval()


MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5, "unet": tiny_unet}
LANGUAGE_MODELS = ("llama", "gpt2", "t5")
# A few layers of each kind that the model has.
TARGETS: dict[str, Any] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "t5": ["q", "v", "wo"],
    "unet": ["to_q", "to_v", "conv1", "conv_shortcut", "time_emb_proj"],
}


def ids(samples: int = 3, length: int = 6, seed: int = 5) -> Tensor:
    """Tokens, none of them special."""
    return torch.randint(3, 37, (samples, length), generator=torch.Generator().manual_seed(seed))


def inputs(name: str) -> dict[str, Any]:
    """Keyword arguments of a call of `MODELS`."""
    if name == "unet":
        x, t, context = unet_inputs()
        return {"sample": x, "timestep": t, "encoder_hidden_states": context}
    if name == "t5":
        return {"input_ids": ids(), "decoder_input_ids": ids(length=4, seed=6)}
    return {"input_ids": ids()}


def answer(model: Any, name: str, **more: Any) -> Tensor:
    """Logits, or the UNet's sample, under the caller's grad mode."""
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    out = model(**given, **more)
    return out.sample if name == "unet" else out.logits


def config(name: str = "", **changes: Any) -> SVDiffConfig:
    """Random shifts for `TARGETS`, unless told otherwise."""
    given = {"target_modules": TARGETS.get(name), "init_weights": False}
    return SVDiffConfig(**{**given, **changes})


def layers(model: nn.Module) -> dict[str, SVDiffLayer]:
    """Ours in a model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SVDiffLayer)}


def shifted(layer: SVDiffLayer, *adapters: str, rank: int | None = None) -> Tensor:
    """The weight that adapters amount to, in fp64, by LAPACK's SVD of the base's."""
    weight = layer.matrix().double()
    U, sigma, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    scale = sigma.clone()
    for adapter in adapters:
        delta = layer.svdiff_delta[adapter].detach().double() * layer.scaling[adapter]
        kept = slice(len(delta))
        scale[kept] += delta * sigma[kept] if layer.parametrization[adapter] == "scale" else delta
    W = (U * scale.clamp_min(0)) @ Vh
    return layer._oriented(W.view(weight.shape))


@torch.no_grad()
def plain(base: Any, model: nn.Module, *adapters: str) -> Any:
    """A model without PEFT: the given base with the weights that adapters of `model` amount to, all in fp64."""
    base = base.double()
    for name, layer in layers(model).items():
        path = name.removeprefix("base_model.model.")
        present = [adapter for adapter in adapters if adapter in layer.svdiff_delta]
        base.get_submodule(path).weight.copy_(shifted(layer, *present))
    return base
