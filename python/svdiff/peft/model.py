"""SVDiffModel: PEFT's handle on a model with our layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from svdiff_kernels import FactorCache, SVDiffError

from .config import SVDiffConfig
from .layer import BASE, Conv2d, Embedding, Linear, SVDiffLayer

_KINDS: dict[type[nn.Module], type[SVDiffLayer]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Conv2d: Conv2d,
    nn.Embedding: Embedding,
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SVDiffModel(BaseTuner):
    """What `peft.get_peft_model` makes of a model and an `SVDiffConfig`: ``peft_model.base_model``.

    All weights are decomposed, or read from the factor cache, when an adapter is added: those of one short side
    together, and each once, however many adapters come. What PEFT's tuners can do, this one can; see docs/peft.md.

    Raises:
        SVDiffError: a target is no layer that has a spectral version, or holds NaN or inf; or a further adapter wants
            another rank or form than those that are there.
    """

    prefix = "svdiff_"
    tuner_layer_cls = SVDiffLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  (PEFT's; see _prepare_adapter_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, and decompose what it is the first to touch; see PEFT's."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        waiting: dict[int | None, dict[str, SVDiffLayer]] = defaultdict(dict)
        for name, layer in self._layers().items():
            weight = layer.weight  # on the meta device it has no values yet, and in fp64 nothing is cached
            if not (layer.has_factors or weight.is_meta or weight.dtype == torch.float64):
                waiting[layer.rank if layer.truncated else None][name] = layer
        cache = FactorCache(self.peft_config[adapter_name].svd_cache_dir)
        for rank, layers in waiting.items():
            for name, factors in cache.iterate({name: layer.matrix() for name, layer in layers.items()}, rank):
                layers[name].set_factors(factors)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter whose shifts are a weighted sum of others'. It is exact: what acts is their sum anyway.

        Args:
            adapters: names of those to add up.
            weights: a factor for each, of any sign.
            adapter_name: of the new one, which is not active, as one that `PeftModel.add_adapter` adds. It is trained
                as a "scale" if all of them are, else as a "shift".
            combination_type: "linear"; PEFT's LoRA has others, to spare ranks.

        Raises:
            SVDiffError: an adapter does not exist, or is saved with whole modules or biases, which cannot be added; the
                name is taken; or there are more or fewer weights than adapters.
        """
        if combination_type != "linear":
            raise SVDiffError(f'combination_type {combination_type!r}: shifts are added up by "linear" alone')
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise SVDiffError(f"Adapter {unknown[0]} does not exist")
        if adapter_name in self.peft_config:
            raise SVDiffError(f"Adapter {adapter_name} already exists")
        if not adapters or len(adapters) != len(weights):
            raise SVDiffError(f"{len(weights)} weights do not go with {len(adapters)} adapters")
        configs = [self.peft_config[name] for name in adapters]
        if any(config.modules_to_save or config.bias != "none" for config in configs):
            raise SVDiffError("adapters with modules_to_save, or with a bias, cannot be added up")
        kinds = {config.parametrization for config in configs}
        kind = kinds.pop() if len(kinds) == 1 else "shift"
        layers = {name: layer for name, layer in self._layers().items() if layer._present(adapters)}
        self.peft_config[adapter_name] = replace(
            configs[0],
            target_modules=list(layers),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            parametrization=kind,
            init_weights=True,
        )
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in layers.values():
                for name, weight in zip(adapters, weights, strict=True):
                    if name not in layer.svdiff_delta:
                        continue
                    own = layer.svdiff_delta[name] * layer.scaling[name] if kind == "scale" else layer.shift(name)
                    layer.svdiff_delta[adapter_name] += weight * own

    def _layers(self) -> dict[str, SVDiffLayer]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, SVDiffLayer)}

    def _check_new_adapter_config(self, config: SVDiffConfig) -> None:
        super()._check_new_adapter_config(config)
        for name, other in self.peft_config.items():
            for field in ("rank", "rank_pattern", "form"):
                if isinstance(other, SVDiffConfig) and getattr(config, field) != getattr(other, field):
                    raise SVDiffError(
                        f"{field} {getattr(config, field)} of the new adapter is not {getattr(other, field)}, that of "
                        f"{name}: adapters of one model share its decompositions"
                    )

    def _prepare_adapter_config(self, peft_config: SVDiffConfig, model_config: dict[str, Any]) -> SVDiffConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
            names = set(_maybe_include_all_linear_layers(peft_config, self.model).target_modules)
            ours = tuple(f"{name}." for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer))
            for name, module in self.model.named_modules():
                if isinstance(module, (nn.Conv2d, Conv2d)) and not name.startswith(ours):
                    names.add(name)
                elif isinstance(module, NonDynamicallyQuantizableLinear):
                    names.discard(name)
            if peft_config.layers_to_transform is not None:  # which PEFT looks at for ends of names alone
                ends = {name: replace(peft_config, target_modules=[name.rpartition(".")[2]]) for name in names}
                names = {name for name in names if "." in name and check_target_module_exists(ends[name], name)}
            peft_config.target_modules = names  # type: ignore[assignment]
        return peft_config

    def _create_and_replace(
        self,
        peft_config: SVDiffConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, SVDiffLayer):
            target.update_layer(adapter_name, peft_config)
            return
        rank = peft_config.rank_pattern.get(get_pattern_key(peft_config.rank_pattern, current_key), peft_config.rank)
        layer = _kind_of(target, current_key)(target, adapter_name, peft_config, rank)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """For a call with ``adapter_names``, hand them to the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise SVDiffError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        present = {name for layer in self._layers().values() for name in layer.svdiff_delta}
        if unexpected := sorted(set(names) - present - {BASE}):
            raise SVDiffError(f"Trying to infer with non-existing adapter(s): {', '.join(unexpected)}")
        copies = _copies_of_each_sample(self.model, kwargs)
        encoder = _encoder_of(self.model) if copies > 1 else None  # it sees each sample once
        once = set() if encoder is None else set(encoder.modules())
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, (SVDiffLayer, AuxiliaryTrainingWrapper)):
                    own = list(names) if module in once else [name for name in names for _ in range(copies)]
                    hook = partial(_hand_over, adapter_names=own)
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def _kind_of(target: nn.Module, name: str) -> type[SVDiffLayer]:
    """Which of our layers stands in for a module.

    Raises:
        SVDiffError: none does.
    """
    if isinstance(target, BaseTunerLayer):
        raise SVDiffError(f"{name} has an adapter of another PEFT method: merge or unload that first")
    found = next((kind for base, kind in _KINDS.items() if isinstance(target, base)), None)
    weight = getattr(target, "weight", None)
    if found is None or getattr(weight, "dtype", None) not in _DTYPES:
        what = f"a {type(target).__name__}" + (f" in {weight.dtype}" if found and weight is not None else "")
        raise SVDiffError(
            f"{name} is {what}, which is not supported: target nn.Linear, transformers' Conv1D, nn.Conv2d or "
            "nn.Embedding that are not quantized"
        )
    if isinstance(target, NonDynamicallyQuantizableLinear):
        raise SVDiffError(
            f"{name} belongs to an nn.MultiheadAttention, which never calls it: name it in exclude_modules"
        )
    if isinstance(target, nn.Embedding) and (target.max_norm is not None or target.scale_grad_by_freq or target.sparse):
        raise SVDiffError(f"{name}: an embedding with max_norm, scale_grad_by_freq or sparse has no spectral version")
    return found


def _copies_of_each_sample(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats each input, for beams or for several answers; 1 where nothing says so."""
    config = kwargs.get("generation_config")

    def number(name: str) -> int:
        value = kwargs.get(name, getattr(config, name, None))
        return value if isinstance(value, int) else 1

    return max(number("num_beams"), number("num_return_sequences"))


def _encoder_of(model: Any) -> nn.Module | None:
    """Of a model with a decoder too."""
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder


def _hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any], *, adapter_names: list[str]) -> Any:
    return args, kwargs | {"adapter_names": adapter_names}
