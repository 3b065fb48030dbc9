"""Batches whose samples have adapters of their own, by PEFT's ``adapter_names``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from svdiff.peft import SVDiffConfig, SVDiffLayer
from tiny import tiny_unet
from tiny_peft import LANGUAGE_MODELS, MODELS, config, ids, layers
from torch import Tensor

from svdiff_kernels import SVDiffError

NAMES = ["second", "__base__", "default", "second"]


def model_of(name: str, **changes: Any) -> Any:
    model = get_peft_model(MODELS[name](), config(name, **changes)).eval()
    model.add_adapter("second", config(name, **changes))
    return model


def given(name: str) -> dict[str, Any]:
    """A batch of four."""
    if name == "unet":
        rng = torch.Generator().manual_seed(3)
        x, context = torch.randn(4, 4, 8, 8, generator=rng), torch.randn(4, 5, 12, generator=rng)
        return {"sample": x, "timestep": torch.tensor([3, 700, 3, 20]), "encoder_hidden_states": context}
    more = {"decoder_input_ids": ids(4, 4, seed=6)} if name == "t5" else {}
    return {"input_ids": ids(4), **more}


def called(model: Any, batch: dict[str, Any], **more: Any) -> Tensor:
    out = model(**batch, **more)
    return out.sample if hasattr(out, "sample") else out.logits


@torch.no_grad()
def alone(model: Any, batch: dict[str, Any], names: list[str]) -> Tensor:
    """Each sample by itself, the usual way."""
    rows = []
    for i, name in enumerate(names):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(called(model, one))
        else:
            model.set_adapter(name)
            rows.append(called(model, one))
    model.set_adapter("default")
    return torch.cat(rows)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_sample_is_what_it_would_be_alone(name: str, rank: int | None) -> None:
    model = model_of(name, rank=rank)
    batch = given(name)
    mixed = called(model, batch, adapter_names=NAMES)
    torch.testing.assert_close(mixed, alone(model, batch, NAMES), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed[0], called(model, batch)[0], atol=1e-2)
    assert torch.equal(called(model, batch), called(model, batch, adapter_names=None))  # no hook stays behind


@torch.no_grad()
def test_adapters_of_other_layers_and_parametrizations() -> None:
    model = get_peft_model(MODELS["gpt2"](), config("gpt2")).eval()
    model.add_adapter("second", config(target_modules=["c_fc", "wpe"], parametrization="scale"))  # wpe: one row for all
    batch = given("gpt2")
    mixed = called(model, batch, adapter_names=NAMES)
    torch.testing.assert_close(mixed, alone(model, batch, NAMES), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_modules_to_save_are_those_of_each_sample() -> None:
    model = model_of("llama", modules_to_save=["lm_head"])
    for adapter, module in model.base_model.model.lm_head.modules_to_save.items():
        module.weight.add_(0.5 if adapter == "second" else -0.5)
    batch = given("llama")
    mixed = called(model, batch, adapter_names=NAMES)
    torch.testing.assert_close(mixed, alone(model, batch, NAMES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_generation_with_beams(name: str, how: dict[str, int]) -> None:
    from transformers import GenerationConfig

    model = model_of(name)
    prompts = ids(len(NAMES))
    copies = how.get("num_return_sequences", 1)
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    mixed = model.generate(input_ids=prompts, adapter_names=NAMES, **settings, **how)
    as_config = GenerationConfig(**settings, **how, pad_token_id=0, decoder_start_token_id=0)
    assert torch.equal(model.generate(input_ids=prompts, adapter_names=NAMES, generation_config=as_config), mixed)
    for i, adapter in enumerate(NAMES):
        if adapter == "__base__":
            with model.disable_adapter():
                one = model.generate(input_ids=prompts[i : i + 1], **settings, **how)
        else:
            model.set_adapter(adapter)
            one = model.generate(input_ids=prompts[i : i + 1], **settings, **how)
        assert torch.equal(mixed[i * copies : (i + 1) * copies], one)


@torch.no_grad()
def test_several_sampled_answers_to_each_prompt() -> None:
    model = model_of("llama")
    rows: list[int] = []
    layer = next(iter(layers(model).values()))
    layer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    how: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 2}
    out = model.generate(input_ids=ids(4), adapter_names=NAMES, **how)
    assert len(out) == 12 and set(rows) == {12}


def test_what_is_refused() -> None:
    model = model_of("llama")
    batch = given("llama")
    with pytest.raises(SVDiffError, match="same as the number of inputs, but got 3 and 4"):
        model(**batch, adapter_names=NAMES[:3])
    with pytest.raises(SVDiffError, match=r"non-existing adapter\(s\): absent, other"):
        model(**batch, adapter_names=["other", "default", "absent", "default"])
    with pytest.raises(TypeError, match="expected a list of str"):
        model(**batch, adapter_names="default")
    model.train()
    with pytest.raises(SVDiffError, match="training mode"):
        model(**batch, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(SVDiffError, match="merged adapters"):
        model(**batch, adapter_names=NAMES)
    model.unmerge_adapter()
    model(**batch)  # no hook is left of all these
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_batch_of_many_adapters_is_one_call_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_unet(), SVDiffConfig(init_weights=False)).eval()
    for i in range(3):
        model.add_adapter(f"{i}", SVDiffConfig(init_weights=False))
    calls: list[tuple[int, ...]] = []
    for kind in {type(layer) for layer in layers(model).values()}:
        spectral = kind._spectral

        def counted(self: SVDiffLayer, x: Tensor, factors: Any, delta: Tensor, spectral: Any = spectral) -> Tensor:
            calls.append(tuple(delta.shape))
            return spectral(self, x, factors, delta)

        monkeypatch.setattr(kind, "_spectral", counted)
    called(model, given("unet"), adapter_names=["default", "0", "1", "2"])
    assert len(calls) == len(layers(model)) and {shape[0] for shape in calls} == {4}
