"""svdiff.peft as a method of PEFT: registered, configured, put into models, refused where it does not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.hotswap import hotswap_adapter
from svdiff.peft import SVDiffConfig, SVDiffModel
from svdiff.peft.layer import Linear
from tiny_peft import LANGUAGE_MODELS, MODELS, TARGETS, answer, config, ids, layers, tiny_llama
from torch import nn

from svdiff_kernels import FactorCache, SVDiffError

ROOT = Path(__file__).parents[2]


def python(code: str, *hidden: str) -> subprocess.CompletedProcess[str]:
    """Run code where some packages cannot be imported."""
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in hidden)
    script = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'python')!r}]; {hide}{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_it_is_registered_beside_the_methods_of_peft() -> None:
    before = list(PeftType)
    assert "SVDIFF" not in before  # their enum is as it was
    for mapping, value in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, SVDiffConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, SVDiffModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, "svdiff_"),
    ):
        assert mapping["SVDIFF"] == value  # by the name, as a file has it
        assert mapping[SVDiffConfig().peft_type] == value


def test_peft_stays_optional() -> None:
    done = python("import svdiff; svdiff.attach; print('fine')", "peft")
    assert done.stdout == "fine\n", done.stderr
    done = python("import svdiff.peft", "peft")
    assert done.stderr.splitlines()[-1].endswith('svdiff.peft needs PEFT: pip install "svdiff-kernels[peft]"')


def test_another_method_of_the_name_is_not_overwritten() -> None:
    code = "import peft.mapping; peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING['SVDIFF'] = object; import svdiff.peft"
    assert "PEFT has another method named SVDIFF" in python(code).stderr.splitlines()[-1]


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    ours = SVDiffConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["lm_head"],
        rank=3,
        rank_pattern={"v_proj": 2},
        parametrization="scale",
        form="residual",
        bias="svdiff_only",
        modules_to_save=["lm_head"],
        layers_to_transform=[0],
        layers_pattern="layers",
        svd_cache_dir=str(tmp_path / "factors"),
    )
    ours.save_pretrained(str(tmp_path))
    for loaded in (PeftConfig.from_pretrained(str(tmp_path)), SVDiffConfig.from_pretrained(str(tmp_path))):
        assert isinstance(loaded, SVDiffConfig)
        assert asdict(loaded) == asdict(ours) | {"svd_cache_dir": None}
    text = (tmp_path / "adapter_config.json").read_text()
    assert '"peft_type": "SVDIFF"' in text and str(tmp_path) not in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parametrization": "delta"}, "parametrization 'delta' is not one of shift, scale"),
        ({"form": "recomposed"}, "form 'recomposed' is not one of auto, factored, residual"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not one of none, all, svdiff_only"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"rank_pattern": {"q_proj": -1}}, "rank must be at least 1, not -1"),
        ({"layers_pattern": "layers"}, "layers_pattern says where layers_to_transform counts"),
    ],
)
def test_a_wrong_value_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        SVDiffConfig(**wrong)


def test_without_targets_it_is_every_matrix_but_the_output(unet: Any) -> None:
    found = {
        name: set(layers(get_peft_model(MODELS[name](), SVDiffConfig()).base_model.model)) for name in LANGUAGE_MODELS
    }
    assert {n.rpartition(".")[2] for n in found["llama"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert {n.rpartition(".")[2] for n in found["gpt2"]} == {"c_attn", "c_proj", "c_fc"}
    assert {n.rpartition(".")[2] for n in found["t5"]} == {"q", "k", "v", "o", "wi", "wo"}
    matrices = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    model = get_peft_model(unet, SVDiffConfig())
    assert set(layers(model.base_model.model)) == matrices
    model.add_adapter("second", SVDiffConfig())  # which sees base layers of the first
    assert set(layers(model.base_model.model)) == matrices
    assert all("second" in layer.svdiff_delta for layer in layers(model).values())


def test_layers_of_multihead_attention_are_left_alone_or_refused() -> None:
    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 12)

    assert set(layers(get_peft_model(block(), SVDiffConfig()).base_model.model)) == {"linear1", "linear2"}
    with pytest.raises(SVDiffError, match=r"self_attn.out_proj belongs to an nn.MultiheadAttention.*exclude_modules"):
        get_peft_model(block(), SVDiffConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.LayerNorm(4), "a LayerNorm, which is not supported"),
        (nn.Conv3d(2, 2, 1), "a Conv3d, which is not supported"),
        (nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
        (nn.Linear(4, 3).to(torch.float8_e4m3fn), "a Linear in torch.float8_e4m3fn, which is not supported"),
    ],
)
def test_what_cannot_be_a_target(target: nn.Module, message: str) -> None:
    with pytest.raises(SVDiffError, match=rf"^base.*{message}"):
        get_peft_model(nn.ModuleDict({"base": target}), SVDiffConfig(target_modules=["base"]))


def test_a_model_with_adapters_of_another_method_is_refused() -> None:
    model = tiny_llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    with pytest.raises(SVDiffError, match="has an adapter of another PEFT method"):
        model.add_adapter(SVDiffConfig(target_modules=["q_proj"]), "ours")


def test_targets_by_expression_layers_and_exclusion() -> None:
    def found(**changes: Any) -> set[str]:
        return set(layers(get_peft_model(tiny_llama(), SVDiffConfig(**changes)).base_model.model))

    attention = {f"model.layers.{i}.self_attn" for i in (0, 1)}
    assert found(target_modules=r".*self_attn\.(q|k)_proj") == {f"{a}.{n}_proj" for a in attention for n in "qk"}
    assert found(target_modules=["q_proj"], layers_to_transform=[1]) == {"model.layers.1.self_attn.q_proj"}
    assert found(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers") == {
        "model.layers.0.self_attn.q_proj"
    }
    assert found(target_modules=["q_proj", "k_proj"], exclude_modules=["layers.0.self_attn.q_proj"]) == {
        "model.layers.1.self_attn.q_proj",
        *(f"{a}.k_proj" for a in attention),
    }
    assert len(found(target_modules="all-linear")) == 14
    first = found(layers_to_transform=[0], exclude_modules=["up_proj"])
    assert len(first) == 6 and all(name.startswith("model.layers.0.") for name in first)
    assert found(target_modules=["embed_tokens"]) == {"model.embed_tokens"}
    with pytest.raises(ValueError, match="not found in the base model"):
        found(target_modules=["absent"])


def test_ranks_by_module() -> None:
    model = get_peft_model(tiny_llama(), config("llama", rank=5, rank_pattern={"v_proj": 3, r"layers\.0.*q_proj": 20}))
    ranks = {name.removeprefix("base_model.model.model."): layer.rank for name, layer in layers(model).items()}
    assert ranks == {
        "layers.0.self_attn.q_proj": 16,
        "layers.1.self_attn.q_proj": 5,
        **{f"layers.{i}.self_attn.v_proj": 3 for i in (0, 1)},
        **{f"layers.{i}.mlp.down_proj": 5 for i in (0, 1)},
    }
    assert {name.split(".")[-2]: len(p) for name, p in model.named_parameters() if "svdiff_delta" in name}


@pytest.mark.parametrize("change", [{"rank": 2}, {"rank_pattern": {"q_proj": 2}}, {"form": "residual"}])
def test_adapters_share_a_decomposition_and_so_its_rank(change: dict[str, Any]) -> None:
    model = get_peft_model(tiny_llama(), config("llama"))
    before = answer(model, "llama")
    with pytest.raises(SVDiffError, match=f"{next(iter(change))} .* of the new adapter is not .*, that of default"):
        model.add_adapter("second", config("llama", **change))
    assert set(model.peft_config) == {"default"} and torch.equal(answer(model, "llama"), before)
    model.add_adapter("second", config("llama", parametrization="scale"))  # these may differ


def test_all_weights_are_decomposed_in_one_go_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []
    iterate = FactorCache.iterate
    monkeypatch.setattr(
        FactorCache, "iterate", lambda self, weights, *rest: asked.append(len(weights)) or iterate(self, weights, *rest)
    )
    store = tmp_path / "factors"
    model = get_peft_model(tiny_llama(), config("llama", svd_cache_dir=str(store)))
    assert asked == [6]
    assert len(list(store.glob("objects/*/*.safetensors"))) == 6
    model.add_adapter("second", config("llama", target_modules=["q_proj", "k_proj"]))
    assert asked == [6, 2]  # the keys, which were new
    factors = {id(layer.factors()) for layer in layers(model).values()}
    assert len(factors) == 8


def test_what_peft_says_of_the_model(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config("llama", task_type="CAUSAL_LM"))
    model.add_adapter("second", config("llama", task_type="CAUSAL_LM"))
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM" and status.adapter_model_type == "SVDiffModel"
    assert status.peft_types == {"default": "SVDIFF", "second": "SVDIFF"}
    assert status.active_adapters == ["default"] and status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False} and status.merged_adapters == []
    assert {layer.module_type for layer in model.get_layer_status()} == {"svdiff.Linear"}
    # q: 16, v: 8, down: 16, in two layers
    trained, everything = model.get_nb_trainable_parameters()
    assert (
        trained == 2 * (16 + 8 + 16) and everything == sum(p.numel() for p in tiny_llama().parameters()) + 2 * trained
    )
    model.save_pretrained(str(tmp_path))
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    with pytest.warns(UserWarning, match="should not be contained in the prefix"):
        get_peft_model(tiny_llama(), config("llama"), adapter_name="svdiff")


def test_a_folder_is_loaded_by_all_that_load_peft(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    model = get_peft_model(
        type(tiny_llama()).from_pretrained(base), config("llama", task_type="CAUSAL_LM", rank=3), adapter_name="default"
    )
    model.save_pretrained(str(folder))
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    truth = answer(model.eval(), "llama")
    auto = AutoPeftModelForCausalLM.from_pretrained(str(folder)).eval()
    assert isinstance(auto, PeftModel) and isinstance(auto.base_model, SVDiffModel)
    assert torch.equal(answer(auto, "llama"), truth)
    again = PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
    assert torch.equal(answer(again, "llama"), truth)
    done = python(f"from peft import PeftConfig; PeftConfig.from_pretrained({str(folder)!r})")
    assert done.stderr.splitlines()[-1] == "KeyError: 'SVDIFF'"  # PEFT's own, as for any method it does not know


def test_modules_to_save_travel_with_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config("llama", modules_to_save=["lm_head"]))
    assert not isinstance(model.base_model.model.lm_head, Linear)
    with torch.no_grad():
        model.base_model.model.lm_head.weight.add_(1.0)
    truth = answer(model.eval(), "llama")
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert torch.equal(answer(again, "llama"), truth)


def test_biases_that_learn_travel_with_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["gpt2"](), config("gpt2", bias="svdiff_only"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"default", "bias"}
    assert {name.split(".")[-3] for name in trained if name.endswith("bias")} == set(TARGETS["gpt2"])
    answer(model, "gpt2").square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p.add_(0.1)
    truth = answer(model.eval(), "gpt2")
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(MODELS["gpt2"](), str(tmp_path)).eval()
    assert torch.equal(answer(again, "gpt2"), truth)


def test_shifts_are_swapped_in_place(tmp_path: Path) -> None:
    model, other = (get_peft_model(tiny_llama(), config("llama")).eval() for _ in range(2))
    other.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but SVDIFF was passed"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    addresses = [layer.svdiff_delta["default"].data_ptr() for layer in layers(model).values()]
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path), device="cpu"))
    assert [layer.svdiff_delta["default"].data_ptr() for layer in layers(model).values()] == addresses
    assert torch.equal(answer(model, "llama"), answer(other, "llama"))


def test_peft_allows_one_method_in_a_model() -> None:
    model = get_peft_model(tiny_llama(), config("llama"))
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


def test_the_example_of_the_package() -> None:
    model = get_peft_model(tiny_llama(), SVDiffConfig(task_type="CAUSAL_LM"))
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
