"""Networks of real size with random weights and factors, which timing does not need to be true."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from svdiff.bench import BenchConfig
from svdiff.miniature import load_pipeline
from torch import Tensor, nn

from svdiff_kernels import FactorCache, Factors, SVDiffError

from . import registry

_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


class RandomFactors(FactorCache):
    """Stands in for the cache: factors of the right shapes and magnitudes, since timing needs no decomposition."""

    def iterate(
        self, weights: Mapping[str, Tensor], rank: int | None = None, *, contents: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, Factors]]:
        for name, weight in weights.items():
            rows, columns = weight.shape[0], weight[0].numel()
            r = min(rows, columns, rank or rows)
            device = str(weight.device)
            sigma = torch.linspace(1.5, 0.1, r, device=device)
            U, Vh = filled((rows, r), rows**-0.5, device), filled((r, columns), columns**-0.5, device)
            yield name, Factors(U, sigma, Vh)


def random_unet(config: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A UNet with random weights, made without the minutes that the usual initialisation takes."""
    from diffusers import UNet2DConditionModel  # not at hand on every machine; single layers do without

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(json.loads(config.read_text()))
    model.to_empty(device=device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.data = filled(tuple(parameter.shape), parameter[0].numel() ** -0.5, device).to(dtype)
            else:
                parameter.data = torch.full_like(parameter.data, 1.0 if name == "weight" else 0.0, dtype=dtype)
    return model


def random_pipeline(bench: BenchConfig) -> Any:
    """A Stable Diffusion pipeline of real size in fp32, with random weights and the miniature's tokenizer.

    Raises:
        SVDiffError: of another model than SD 1.5 or 2.1.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    if bench.model not in ("sd15", "sd21"):
        raise SVDiffError(f"bench {bench.level} knows sd15 and sd21, not {bench.model}")
    torch.manual_seed(0)
    small = load_pipeline()
    small.tokenizer.model_max_length = registry.TEXT_TOKENS
    text = json.loads((registry.CONFIGS / "clip_l_text.json").read_text())
    config = Path(bench.config) if bench.config else registry.CONFIGS / registry.MODELS[bench.model]
    unet = random_unet(config, torch.float32)
    models: dict[str, nn.Module] = {
        "unet": unet,
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text | {"hidden_size": unet.config.cross_attention_dim})),
        "vae": AutoencoderKL(**_VAE),
    }
    return StableDiffusionPipeline(
        **models,
        tokenizer=small.tokenizer,
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_distinct(model: nn.Module) -> None:
    """Give layers of one shape weights of their own, or one decomposition would serve them all."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


class Call(NamedTuple):
    """What a module was given in a forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def calls_of(model: nn.Module, names: Iterable[str], inputs: Mapping[str, Any]) -> dict[str, Call]:
    """What each of the named modules is given while the model runs on `inputs`."""
    seen: dict[str, Call] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.update({name: Call(args, kwargs)}), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def filled(shape: tuple[int, ...], std: float, device: str = "cpu") -> Tensor:
    """Random numbers, repeated past the first million."""
    count = torch.Size(shape).numel()
    generator = torch.Generator(device).manual_seed(count)
    pool = torch.randn(min(count, 1_000_003), generator=generator, device=device) * std
    return pool.repeat(-(-count // len(pool)))[:count].view(shape)


def twin(model: nn.Module) -> nn.Module:
    """A second model, with modules and parameters of its own, that shares the memory of the first one's weights."""
    return copy.deepcopy(
        model, {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    )
