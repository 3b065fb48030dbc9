"""Settings: what cannot be met is refused before anything is loaded, by a line that names the setting."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from svdiff import TrainConfig
from svdiff.training import config as config_module
from svdiff.training.concepts import concepts_of
from svdiff.training.config import check, differences

from svdiff_kernels import SVDiffError

GOOD = TrainConfig("miniature", "pictures", instance_prompt="a sks dog")
PRIOR: dict[str, Any] = {"with_prior_preservation": True, "class_prompt": ["a dog"]}


def test_what_is_in_order_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check(GOOD)
    check(replace(GOOD, method="lora", lora_rank=2, max_grad_norm=0, report_to="tensorboard", seed=2**32 - 1))
    check(replace(GOOD, with_prior_preservation=True, class_prompt=["a dog"], prior_generation_scheduler_type="ddim"))
    monkeypatch.setattr(config_module, "has_cuda", lambda: True)
    check(replace(GOOD, cuda_graphs=True, size_augmentation=True))
    check(replace(GOOD, with_prior_preservation=True, class_prompt=["a dog"], real_prior=True, real_prior_dir="dogs"))
    check(replace(GOOD, init_from="."))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_data_dir": None}, "no pictures: give instance_data_dir, concepts_list or dataset_name"),
        ({"dataset_name": "a", "concepts_list": "b"}, "instance_data_dir and concepts_list and dataset_name exclude"),
        ({"instance_prompt": " "}, "instance_prompt is empty"),
        ({"validation_prompt": ["a", ""]}, "validation_prompt is empty"),
        ({"with_prior_preservation": True}, "with_prior_preservation needs a class_prompt"),
        ({"method": "dora"}, "method 'dora' is not one of svdiff, lora, full"),
        ({"mixed_precision": "fp64"}, "mixed_precision 'fp64' is not one of no, fp16, bf16"),
        ({"lr_scheduler": "sine"}, "lr_scheduler 'sine' is not one of constant, .*piecewise_constant"),
        ({"report_to": "paper"}, "report_to 'paper' is not one of"),
        ({"prior_generation_scheduler_type": "magic"}, "prior_generation_scheduler_type 'magic' is not one of"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1, not 0"),
        ({"checkpointing_steps": 0}, "checkpointing_steps must be at least 1"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit must be at least 1"),
        ({"lr_num_cycles": 0}, "lr_num_cycles must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number, not below 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"text_encoder_lr": float("inf")}, "text_encoder_lr must be a finite number"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps must be a finite number, not below 0"),
        ({"adam_epsilon": -1.0}, "adam_epsilon"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be at least 0 and below 1"),
        ({"adam_beta2": -0.1}, "adam_beta2 must be at least 0 and below 1"),
        ({"ema_decay": 1.1}, "ema_decay must be from 0 to 1"),
        ({"cut_mix_probability": 60.0}, "cut_mix_probability must be from 0 to 1"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, not -1"),
        ({"seed": 2**32}, "seed must be from 0"),
        ({"rank": 4, "method": "lora"}, "rank is of method svdiff, not of lora"),
        ({"shift_penalty": 0.1, "method": "full"}, "shift_penalty is of method svdiff, not of full"),
        ({"shard_factors": True, "method": "full"}, "shard_factors is of method svdiff, not of full"),
        ({"use_8bit_adam": True, "optimizer": "prodigy"}, "use_8bit_adam and optimizer prodigy exclude each other"),
        ({"unmix_loss_weight": 0.1}, "unmix_loss_weight needs mixed pictures"),
        ({"cut_mix_probability": 0.6}, "cut_mix_probability needs several subjects: give a concepts_list"),
        ({"cut_mix_prompts": ["{first} on the left"]}, r"'\{first\} on the left' lacks \{first\} or \{second\}"),
        ({"size_augmentation": True, "noaug": True}, "size_augmentation and noaug exclude each other"),
        (
            {
                "instance_data_dir": None,
                "concepts_list": "a",
                "cut_mix_probability": 0.6,
                "instance_prompt": None,
                "size_augmentation": True,
            },
            "cut_mix_probability and size_augmentation exclude each other: leave it out",
        ),
        (
            {
                "instance_data_dir": None,
                "concepts_list": "a",
                "cut_mix_probability": 0.6,
                "instance_prompt": None,
                "method": "custom_diffusion",
            },
            "cut_mix_probability and size_augmentation exclude each other: pass noaug",
        ),
        ({"real_prior": True}, "real_prior needs with_prior_preservation"),
        ({"real_prior_clip": "x"}, "real_prior_clip needs real_prior"),
        (PRIOR | {"real_prior_dir": "x"}, "real_prior_dir needs real_prior"),
        (
            PRIOR | {"real_prior": True, "real_prior_dir": "x", "class_data_dir": "y"},
            "class_data_dir and real_prior_dir exclude each other",
        ),
        (PRIOR | {"real_prior_min_similarity": 1.5}, "real_prior_min_similarity must be from -1 to 1"),
        ({"init_from": "/nowhere"}, "init_from: there is no folder /nowhere"),
        ({"lr_scheduler": "piecewise_constant"}, "piecewise_constant needs lr_step_rules"),
        ({"cuda_graphs": True}, "cuda_graphs needs an NVIDIA GPU"),
        ({"cuda_graphs": True, "aspect_ratio_buckets": "auto"}, "cuda_graphs and aspect_ratio_buckets exclude"),
    ],
)
def test_what_is_not_is_named(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "has_cuda", lambda: False)
    with pytest.raises(SVDiffError, match=message):
        check(replace(GOOD, **changes))


@pytest.mark.parametrize("name", ["instance_prompt", "class_prompt", "class_data_dir"])
def test_what_belongs_to_each_subject(name: str) -> None:
    several = TrainConfig("miniature", concepts_list="list.json")
    check(several)
    with pytest.raises(SVDiffError, match=f"{name} belongs to each subject"):
        check(replace(several, **{name: ["a"] if name == "class_prompt" else "a"}))


@pytest.mark.parametrize(
    ("changes", "package"),
    [
        ({"report_to": "tensorboard"}, "tensorboard"),
        ({"report_to": "all"}, "tensorboard"),
        ({"report_to": "wandb"}, "wandb"),
        ({"use_8bit_adam": True}, "bitsandbytes"),
        ({"optimizer": "prodigy"}, "prodigyopt"),
        ({"method": "lora"}, "peft"),
        ({"instance_data_dir": None, "dataset_name": "x"}, "datasets"),
    ],
)
def test_a_library_that_is_missing(changes: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "installed", lambda module: False)
    check(GOOD)
    with pytest.raises(SVDiffError, match=f"needs {package}, which is not installed: pip install {package}"):
        check(replace(GOOD, **changes))


def test_pushing_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(SVDiffError, match="push_to_hub needs a token: run `hf auth login`, or set HF_TOKEN"):
        check(replace(GOOD, push_to_hub=True))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_a")
    check(replace(GOOD, push_to_hub=True))


def test_differences_are_those_that_matter() -> None:
    before = asdict(replace(GOOD, checkpointing_steps=3, validation_steps=7, overwrite=True))
    del before["seed"]  # as of a version that had no such setting
    assert differences(before, GOOD) == []
    assert differences(before, replace(GOOD, learning_rate=0.5, rank=2, output_dir="x")) == [
        "rank None -> 2",
        "learning_rate 0.001 -> 0.5",
    ]


def of_list(tmp_path: Path, content: object, **changes: Any) -> Any:
    path = tmp_path / "list.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return concepts_of(TrainConfig("miniature", concepts_list=str(path), **changes))


def test_a_list_of_concepts(tmp_path: Path) -> None:
    one, two = of_list(
        tmp_path,
        [
            {"instance_data_dir": "cat", "instance_prompt": "a photo of sks cat", "class_prompt": "a photo of a cat"},
            {"instance_data_dir": "dog", "class_prompt": ["a dog", "a hound"], "num_class_images": 9, "token": None},
        ],
    )
    assert one.names() == ("sks cat", "a cat") and one.own_token() == "sks"
    assert (two.class_prompt, two.instance_prompt) == (("a dog", "a hound"), None)
    with pytest.raises(SVDiffError, match="concept dog: mixed pictures need an instance_prompt"):
        two.names()
    with pytest.raises(SVDiffError, match="concept cat: no token of its own in 'a cat'"):
        replace(one, phrase="a cat").own_token()


DOG = {"instance_data_dir": "dog", "instance_prompt": "a sks dog"}


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("[", {}, r"cannot read concepts_list .*list\.json"),
        ({}, {}, "must hold a list of concepts"),
        ([], {}, "must hold a list of concepts"),
        ([DOG, "dog"], {}, r"list\.json, concept 2 is no object with .*instance_prompt"),
        ([{"instance_promt": "a"}], {}, "concept 1 has an unknown key 'instance_promt'; known are .*instance_prompt"),
        ([{"instance_prompt": "a"}], {}, "concept 1 has no instance_data_dir"),
        ([{"instance_data_dir": None}], {}, "concept 1 has no instance_data_dir"),
        ([DOG | {"token": " "}], {}, "every value must be a text that is not empty"),
        ([DOG | {"phrase": 3}], {}, "every value must be a text that is not empty"),
        ([DOG | {"class_prompt": 3}], {}, "every value must be a text that is not empty"),
        ([DOG | {"class_prompt": ["a dog", ""]}], {}, "every value must be a text that is not empty"),
        ([DOG], {"with_prior_preservation": True}, "concept dog: with_prior_preservation needs its class_prompt"),
        ([DOG], {"cut_mix_probability": 0.6}, "has one concept: cut_mix_probability needs two or more"),
        ([DOG | {"class_prompt": "a sks dog"}], {"unmix_loss_weight": 0.1}, "no token of its own"),
    ],
)
def test_what_is_wrong_with_a_list(tmp_path: Path, content: object, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        of_list(tmp_path, content, **changes)


def test_a_list_that_is_not_there() -> None:
    with pytest.raises(SVDiffError, match="cannot read concepts_list nowhere"):
        concepts_of(TrainConfig("miniature", concepts_list="nowhere"))
