"""svdiff.peft where others call PEFT: transformers' and diffusers' own adapter methods, and conversion to LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import relative
from peft import PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model, save_as_lora
from tiny import assert_unchanged, snapshot, tiny_unet
from tiny_peft import LANGUAGE_MODELS, MODELS, TARGETS, answer, config, layers, plain, shifted


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_in_transformers(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    base = answer(model, name)
    model.add_adapter(config(name), "first")
    model.add_adapter(config(name), "second")
    second = answer(model, name)
    assert relative(second, answer(plain(MODELS[name](), model, "second"), name)) < 2e-5
    model.set_adapter("first")
    first = answer(model, name)
    assert not torch.allclose(first, second)
    model.disable_adapters()
    assert torch.equal(answer(model, name), base)
    model.enable_adapters()
    assert torch.equal(answer(model, name), first)
    state = model.get_adapter_state_dict("first")
    assert len(state) == len(layers(model)) and all("svdiff_delta" in key for key in state)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    again = MODELS[name]()
    again.load_adapter(str(tmp_path))
    assert torch.equal(answer(again, name), first)
    assert torch.equal(answer(PeftModel.from_pretrained(MODELS[name](), str(tmp_path)).eval(), name), first)
    model.delete_adapter("first")
    assert set(model.peft_config) == {"second"} and torch.equal(answer(model, name), second)


@torch.no_grad()
def test_a_half_precision_model_of_transformers_loads_shifts_in_fp32(tmp_path: Path) -> None:
    model = MODELS["llama"]().bfloat16()
    model.add_adapter(config("llama"))
    model.save_pretrained(tmp_path)
    again = MODELS["llama"]().bfloat16()
    again.load_adapter(str(tmp_path))
    for name, layer in layers(again).items():
        assert layer.svdiff_delta["default"].dtype == torch.float32, name
        assert torch.equal(layer.svdiff_delta["default"], layers(model)[name].svdiff_delta["default"])
    assert torch.equal(answer(again, "llama"), answer(model, "llama"))


@torch.no_grad()
def test_in_diffusers() -> None:
    unet = tiny_unet()
    base, before = answer(unet, "unet"), snapshot(unet)
    unet.add_adapter(config("unet"), "first")
    first = answer(unet, "unet")
    unet.add_adapter(config("unet"), "second")
    second = answer(unet, "unet")
    assert relative(first, answer(plain(tiny_unet(), unet, "first"), "unet")) < 2e-5
    unet.set_adapter("first")
    assert torch.equal(answer(unet, "unet"), first)
    unet.set_adapters(["first", "second"], [0.5, 0.7])
    both = answer(unet, "unet")
    assert relative(both, answer(plain(tiny_unet(), unet, "first", "second"), "unet")) < 2e-5
    unet.fuse_lora()
    assert relative(answer(unet, "unet"), both) < 2e-5
    unet.unfuse_lora()
    assert torch.equal(answer(unet, "unet"), both)
    unet.disable_adapters()
    assert torch.equal(answer(unet, "unet"), base)
    unet.enable_adapters()
    assert torch.equal(answer(unet, "unet"), both)
    unet.delete_adapters("first")
    unet.set_adapters("second")
    torch.testing.assert_close(answer(unet, "unet"), second)
    unet.unload_lora()
    assert not layers(unet)
    assert_unchanged(unet, before)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_as_a_lora_it_keeps_the_largest_changes(name: str, tmp_path: Path) -> None:
    model = get_peft_model(MODELS[name](), config(name)).eval()
    assert model.supports_lora_conversion()
    _, state = convert_to_lora(model, rank=3)
    for path, layer in layers(model).items():
        A, B = (state[f"{path}.lora_{half}.weight"] for half in "AB")
        change = (shifted(layer, "default") - layer.weight.double()).detach()
        dsigma = torch.linalg.svdvals(change)
        kept = B.double() @ A.double()
        kept = kept.T if name == "gpt2" else kept
        # What is left over is the rest of |dsigma|, which are the singular values of the change.
        assert relative(torch.linalg.svdvals(change - kept)[: len(dsigma) - 3], dsigma[3:]) < 1e-4
        expected = torch.maximum(layer.svdiff_delta["default"], -layer.factors().sigma).abs().sort(descending=True)
        assert relative(dsigma, expected.values) < 1e-4
    truth = answer(model, name)
    save_as_lora(tmp_path, model, rank=1.0)  # all of it
    again = PeftModel.from_pretrained(MODELS[name](), str(tmp_path)).eval()
    assert again.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(answer(again, name), truth, rtol=1e-3, atol=1e-3)


def test_convolutions_are_no_lora_of_peft() -> None:
    model = get_peft_model(tiny_unet(), config("unet"))
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*svdiff\.peft\.layer\.Conv2d"):
        convert_to_lora(model, rank=2)
    linear = get_peft_model(tiny_unet(), config(target_modules=["to_q", "to_k"]))
    _, state = convert_to_lora(linear, rank=2)
    assert len(state) == 2 * len(layers(linear))


@torch.no_grad()
def test_without_a_peft_model() -> None:
    model = MODELS["llama"]()
    inject_adapter_in_model(config("llama"), model)
    assert relative(answer(model, "llama"), answer(plain(MODELS["llama"](), model, "default"), "llama")) < 2e-5
    assert {name.rpartition(".")[2] for name in layers(model)} == set(TARGETS["llama"])


def test_trained_by_the_trainer_of_transformers(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Tokens(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            row = torch.arange(3, 9) + i
            return {"input_ids": row, "labels": row}

    model = get_peft_model(MODELS["llama"](), config("llama", init_weights=True, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=Tokens()).train()
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(MODELS["llama"](), str(tmp_path / "checkpoint-3")).eval()
    assert torch.equal(answer(again, "llama"), answer(model.eval(), "llama"))
    assert all(layer.svdiff_delta["default"].any() for layer in layers(model).values())
