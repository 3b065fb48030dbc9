"""What PEFT's own tests ask of a tuner, on a Llama, a GPT-2, a T5 and a UNet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import relative
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from svdiff.peft import SVDiffConfig
from tiny import assert_unchanged, snapshot
from tiny_peft import LANGUAGE_MODELS, MODELS, TARGETS, answer, config, ids, layers, plain

from svdiff_kernels import SVDiffError

ALL = list(MODELS)
TOLERANCE = 2e-5  # relative, of a whole model in fp32 against fp64


def model_of(name: str, *adapters: str, **changes: Any) -> Any:
    """With an adapter "default" and those named, all of random shifts."""
    model = get_peft_model(MODELS[name](), config(name, **changes)).eval()
    for adapter in adapters:
        model.add_adapter(adapter, config(name, **changes))
    return model


@pytest.mark.parametrize("name", ALL)
def test_attributes(name: str) -> None:
    model = model_of(name)
    for attribute in ("save_pretrained", "from_pretrained", "push_to_hub"):
        assert hasattr(model, attribute)
    for attribute in ("merge_and_unload", "unload", "merge_adapter", "delete_adapter", "add_weighted_adapter"):
        assert callable(getattr(model.base_model, attribute))
    assert model.active_adapter == "default" and set(model.peft_config) == {"default"}
    assert get_peft_model(MODELS[name](), config(name), adapter_name="ours").active_adapter == "ours"


@pytest.mark.parametrize("parametrization", ["shift", "scale"])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_it_computes_what_the_shifted_weights_do(name: str, parametrization: str) -> None:
    model = model_of(name, "second", parametrization=parametrization)
    truth = answer(plain(MODELS[name](), model, "default"), name)
    assert relative(answer(model, name), truth) < TOLERANCE
    assert relative(answer(MODELS[name](), name), truth) > 0.01
    model.base_model.set_adapter(["default", "second"])
    assert relative(answer(model, name), answer(plain(MODELS[name](), model, "default", "second"), name)) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_new_adapter_is_the_base(name: str) -> None:
    base = MODELS[name]()
    truth = answer(base, name)
    model = get_peft_model(base, config(name, init_weights=True)).eval()
    torch.testing.assert_close(answer(model, name), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_saved_and_loaded_it_computes_the_same(name: str, tmp_path: Path) -> None:
    model = model_of(name, "second")
    truth = answer(model, name)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(layers(model)) and all(key.endswith(".svdiff_delta") for key in saved)
    assert all(value.dtype == torch.float32 and value.dim() == 1 for value in saved.values())
    other = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert other.keys() == saved.keys() and not any(other[key].equal(saved[key]) for key in saved)
    for low in (False, True):
        again = PeftModel.from_pretrained(MODELS[name](), str(tmp_path), low_cpu_mem_usage=low).eval()
        assert torch.equal(answer(again, name), truth)
        assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(MODELS[name](), str(tmp_path), is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again.load_adapter(str(tmp_path / "second"), adapter_name="renamed", low_cpu_mem_usage=True)
    again.set_adapter("renamed")
    model.set_adapter("second")
    assert torch.equal(answer(again, name), answer(model, name))


@torch.no_grad()
def test_only_the_adapters_asked_for_are_saved(tmp_path: Path) -> None:
    model = model_of("llama", "second")
    folder = tmp_path / "adapters"
    model.save_pretrained(str(folder), selected_adapters=["second"])
    assert {p.name for p in folder.iterdir()} == {"second", "README.md"}
    again = PeftModel.from_pretrained(MODELS["llama"](), str(folder / "second")).eval()
    model.set_adapter("second")
    assert torch.equal(answer(again, "llama"), answer(model, "llama"))


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip(name: str) -> None:
    model, other = model_of(name), model_of(name)
    state = get_peft_model_state_dict(model)
    assert all(key.endswith(".svdiff_delta") for key in state)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys and not any("svdiff" in key for key in result.missing_keys)
    assert torch.equal(answer(model, name), answer(other, name))
    whole = model_of(name)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(answer(model, name), answer(whole, name))


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_merging_keeps_the_answer_and_unmerging_the_weights(name: str) -> None:
    model = model_of(name, "second")
    before, truth = snapshot(model), answer(model, name)
    model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    assert relative(answer(model, name), truth) < TOLERANCE
    model.unmerge_adapter()
    assert_unchanged(model, before)
    assert torch.equal(answer(model, name), truth)
    model.base_model.set_adapter(["default", "second"])
    both = answer(model, name)
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="You are now additionally merging second"):
        model.merge_adapter(adapter_names=["second"])
    assert relative(answer(model, name), both) < TOLERANCE
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_merge_and_unload(name: str, tmp_path: Path) -> None:
    model = model_of(name, "second")
    truth = answer(model, name)
    model.set_adapter("second")
    second = answer(model, name)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default"])
    assert type(merged) is type(MODELS[name]()) and not layers(merged) and not hasattr(merged, "peft_config")
    assert relative(answer(merged, name), truth) < TOLERANCE
    merged.save_pretrained(tmp_path)  # a model as any other
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(answer(again, name), answer(merged, name))
    assert relative(answer(model.merge_and_unload(), name), second) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_unloading_gives_the_base_back(name: str) -> None:
    base = MODELS[name]()
    before = snapshot(base)
    unloaded = get_peft_model(base, config(name)).unload()
    assert unloaded is base
    assert_unchanged(unloaded, before)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_safe_merge_notices_broken_shifts(name: str) -> None:
    model = model_of(name)
    before = snapshot(model)
    for layer in layers(model).values():
        layer.svdiff_delta["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
        model.merge_and_unload(safe_merge=True)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "svdiff_delta" in k}


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_disabled_it_is_the_base(name: str) -> None:
    base = answer(MODELS[name](), name)
    model = model_of(name)
    on = answer(model, name)
    with model.disable_adapter():
        assert torch.equal(answer(model, name), base)
    assert torch.equal(answer(model, name), on) and not torch.equal(on, base)
    model.merge_adapter()
    with model.disable_adapter():  # which unmerges
        assert torch.equal(answer(model, name), base)
    assert torch.equal(answer(model, name), on)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("svdiff_delta" in n for n in trained)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_switching(name: str) -> None:
    model = model_of(name, "second")
    first = answer(model, name)
    model.set_adapter("second")
    second = answer(model, name)
    assert not torch.allclose(first, second)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(answer(model, name), first)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("second")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_deleting(name: str) -> None:
    base = answer(MODELS[name](), name)
    model = model_of(name, "second", "third")
    first = answer(model, name)
    model.delete_adapter("second")
    assert set(model.peft_config) == {"default", "third"} and torch.equal(answer(model, name), first)
    for layer in layers(model).values():
        assert set(layer.svdiff_delta) == set(layer.scaling) == set(layer.parametrization) == {"default", "third"}
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["third"] and not torch.allclose(answer(model, name), first)
    model.delete_adapter("third")
    assert torch.equal(answer(model.base_model.model, name), base)  # a PeftModel wants one adapter at least
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("third")


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_weighted_adapters_add_up_exactly(name: str) -> None:
    model = model_of(name, "second")
    for mix, weights in {"average": [0.3, 0.7], "difference": [1.0, -0.5]}.items():
        model.add_weighted_adapter(["default", "second"], weights, mix)
        model.set_adapter(mix)
        mixed = answer(model, name)
        model.base_model.set_adapter(["default", "second"])
        for layer in layers(model).values():
            layer.set_scale("default", weights[0])
            layer.set_scale("second", weights[1])
        torch.testing.assert_close(mixed, answer(model, name), rtol=1e-5, atol=1e-5)
        for layer in layers(model).values():
            layer.unscale_layer()


@torch.no_grad()
def test_weighted_adapters_of_other_targets_and_parametrizations(tmp_path: Path) -> None:
    model = model_of("llama")
    model.add_adapter("scale", config("llama", target_modules=["q_proj", "up_proj"], parametrization="scale"))
    model.add_weighted_adapter(["default", "scale"], [1.0, 1.0], "sum")
    assert model.peft_config["sum"].parametrization == "shift"
    assert sum("sum" in layer.svdiff_delta for layer in layers(model).values()) == 8
    model.base_model.set_adapter(["default", "scale"])
    truth = answer(model, "llama")
    model.set_adapter("sum")
    torch.testing.assert_close(answer(model, "llama"), truth, rtol=1e-5, atol=1e-5)
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    again = PeftModel.from_pretrained(MODELS["llama"](), str(tmp_path / "sum")).eval()
    assert torch.equal(answer(again, "llama"), answer(model, "llama"))
    model.add_weighted_adapter(["scale"], [0.5], "halved")
    assert model.peft_config["halved"].parametrization == "scale"
    model.set_adapter("halved")
    half = answer(model, "llama")
    model.set_adapter("scale")
    for layer in layers(model).values():
        layer.scale_layer(0.5)
    torch.testing.assert_close(half, answer(model, "llama"), rtol=1e-5, atol=1e-5)


def test_weighted_adapters_that_cannot_be() -> None:
    model = model_of("llama", "second")
    model.add_adapter("whole", config("llama", modules_to_save=["lm_head"]))
    for arguments, message in (
        ((["default", "absent"], [1, 1], "new"), "Adapter absent does not exist"),
        ((["default"], [1], "second"), "Adapter second already exists"),
        ((["default", "second"], [1], "new"), "1 weights do not go with 2 adapters"),
        ((["default", "whole"], [1, 1], "new"), "cannot be added up"),
        ((["default", "second"], [1, 1], "new", "svd"), "combination_type 'svd'"),
    ):
        with pytest.raises(SVDiffError, match=message):
            model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default", "second", "whole"}


@pytest.mark.parametrize("name", ALL)
def test_training_changes_shifts_and_nothing_else(name: str) -> None:
    model = get_peft_model(MODELS[name](), config(name, init_weights=True)).train()
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = answer(model, name).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "svdiff_delta" in key} and len(changed) == len(layers(model))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_training_some_layers(name: str) -> None:
    changes: dict[str, Any] = {"layers_to_transform": [0]}
    if name == "t5":
        changes["layers_pattern"] = "block"
    model = get_peft_model(MODELS[name](), config(name, **changes))
    answer(model, name).square().mean().backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained and all(".layers.0." in n or ".h.0." in n or "block.0." in n for n in trained)


@pytest.mark.parametrize("name", ALL)
def test_gradient_checkpointing(name: str) -> None:
    model = model_of(name).train()
    answer(model, name).square().mean().backward()
    truth = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    if name == "unet":
        model.base_model.model.enable_gradient_checkpointing()
    else:
        model.base_model.model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    answer(model, name).square().mean().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, truth[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "unet"])
def test_in_half_precision(name: str) -> None:
    model = get_peft_model(MODELS[name]().bfloat16(), config(name)).eval()
    assert {p.dtype for n, p in model.named_parameters() if "svdiff_delta" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "svdiff_delta" not in n} == {torch.bfloat16}
    y = answer(model, name)
    truth = answer(plain(MODELS[name]().bfloat16(), model, "default"), name)
    dense = answer(plain(MODELS[name]().bfloat16(), model, "default").bfloat16(), name)
    assert y.dtype == torch.bfloat16 and relative(y, truth) < 3 * relative(dense, truth)
    y.float().square().mean().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.to(torch.float16)
    assert {p.dtype for n, p in model.named_parameters() if "svdiff_delta" in n} == {torch.float32}


@pytest.mark.parametrize("low", [False, True])
def test_a_half_precision_model_is_loaded_with_its_shifts_in_fp32(low: bool, tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"]().bfloat16(), config("llama")).eval()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(
        MODELS["llama"]().bfloat16(), str(tmp_path), low_cpu_mem_usage=low, autocast_adapter_dtype=False
    ).eval()
    assert {p.dtype for n, p in again.named_parameters() if "svdiff_delta" in n} == {torch.float32}
    assert torch.equal(answer(again, "llama"), answer(model, "llama"))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_generation(name: str) -> None:
    model = model_of(name)
    tokens = model.generate(input_ids=ids(), max_new_tokens=4, do_sample=False)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(tokens, merged.generate(input_ids=ids(), max_new_tokens=4, do_sample=False))
    with model.disable_adapter():
        assert torch.equal(
            model.generate(input_ids=ids(), max_new_tokens=4, do_sample=False),
            MODELS[name]().generate(input_ids=ids(), max_new_tokens=4, do_sample=False),
        )


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_embeddings_as_inputs(name: str) -> None:
    model = model_of(name)
    embeddings = model.get_input_embeddings()(ids())
    more = {"decoder_input_ids": ids(length=4, seed=6)} if name == "t5" else {}
    torch.testing.assert_close(model(inputs_embeds=embeddings, **more).logits, answer(model, name))


@torch.no_grad()
def test_an_adapted_embedding_travels(tmp_path: Path) -> None:
    model = model_of("llama", target_modules=["embed_tokens", "q_proj"])
    truth = answer(plain(MODELS["llama"](), model, "default"), "llama")
    assert relative(answer(model, "llama"), truth) < TOLERANCE
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    again = PeftModel.from_pretrained(MODELS["llama"](), str(tmp_path)).eval()
    assert torch.equal(answer(again, "llama"), answer(model, "llama"))


@torch.no_grad()
def test_a_copied_model_computes_the_same() -> None:
    model = model_of("unet")
    assert torch.equal(answer(copy.deepcopy(model), "unet"), answer(model, "unet"))


def test_two_adapters_train_in_turn() -> None:
    model = get_peft_model(MODELS["llama"](), SVDiffConfig(target_modules=TARGETS["llama"]))
    model.add_adapter("second", SVDiffConfig(target_modules=TARGETS["llama"]))
    model.set_adapter("second")
    answer(model, "llama").square().mean().backward()
    graded = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert graded == {"second"}
    assert all(isinstance(layer, BaseTunerLayer) for layer in layers(model).values())
