"""Other methods than shifts, and precision: what is saved draws what was trained, by means that others have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from safetensors.torch import load_file
from svdiff import TrainConfig, train
from svdiff.pipelines import load_pipeline
from svdiff.training.families import family_of
from svdiff.training.methods import METHODS
from tiny import RESOLUTION, assert_unchanged, snapshot
from tiny_pipelines import draw

from svdiff_kernels import SVDiffError


@pytest.fixture
def config(base: Path, pictures: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        str(base), str(pictures), instance_prompt="a sks dog", output_dir=str(tmp_path / "run"), max_train_steps=3,
        resolution=RESOLUTION, learning_rate=0.05, report_to="none", validation_prompt=["a dog"],
        validation_num_inference_steps=1, num_validation_images=1,
    )  # fmt: skip


def differ(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux dev"])
def test_a_lora_loads_into_a_plain_pipeline(
    config: TrainConfig, name: str, base_of: Callable[[str], Path], loaded: list[Any]
) -> None:
    config = replace(
        config, method="lora", pretrained_model_name_or_path=str(base_of(name)), train_text_encoder=name != "flux dev"
    )
    result = train(config)
    (file,) = result.files
    assert file.name == "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    assert sum(weight.numel() for weight in weights.values()) == result.num_parameters
    assert any(key.startswith("text_encoder.") for key in weights) == config.train_text_encoder
    plain = load_pipeline(str(base_of(name)))
    before = draw(plain)
    plain.load_lora_weights(result.output_dir)
    assert differ(draw(plain), draw(loaded[0])) < 1e-4
    assert differ(draw(plain), before) > 1e-2


def test_a_lora_sits_where_it_was_asked_to(config: TrainConfig, base_of: Callable[[str], Path]) -> None:
    """A transformer's last layer bears a name that layers of its blocks have too."""
    pipeline = load_pipeline(str(base_of("flux dev")))
    method = METHODS["lora"](replace(config, method="lora", targets=r"^proj_out$"), family_of(pipeline))
    assert {name.split(".lora_")[0] for name in method.parameters()} == {"denoiser.proj_out"}


def test_all_weights_reload_as_a_pipeline(config: TrainConfig, loaded: list[Any]) -> None:
    result = train(replace(config, method="full", learning_rate=1e-3, train_text_encoder=True))
    fresh = load_pipeline(str(result.output_dir / "pipeline"))
    assert differ(draw(fresh), draw(loaded[0])) < 1e-5
    assert differ(draw(fresh), draw(load_pipeline(config.pretrained_model_name_or_path))) > 1e-2
    parts = fresh.unet, fresh.text_encoder
    assert result.num_parameters == sum(p.numel() for part in parts for p in part.parameters())


def test_all_weights_in_half_precision_leave_the_rest_as_it_was(config: TrainConfig) -> None:
    """The text encoder, which does not train, is saved to the bit; what trains is computed with in bf16."""
    config = replace(config, method="full", learning_rate=1e-3)
    half = train(replace(config, mixed_precision="bf16"))
    fresh, base = load_pipeline(str(half.output_dir / "pipeline")), load_pipeline(config.pretrained_model_name_or_path)
    for part in ("text_encoder", "vae"):
        assert_unchanged(getattr(fresh, part), snapshot(getattr(base, part)))
    whole = train(replace(config, output_dir=f"{config.output_dir}-whole"))
    assert half.losses != whole.losses
    assert half.losses == pytest.approx(whole.losses, rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["svdiff", "lora", "full"])
def test_half_precision(config: TrainConfig, method: Any, precision: Any, loaded: list[Any], tmp_path: Path) -> None:
    """It computes in it, class pictures and validation too, and saves what trains in fp32."""
    config = replace(
        config, method=method, learning_rate={"svdiff": 0.05, "lora": 0.05, "full": 1e-3}[method],
        train_text_encoder=True, with_prior_preservation=True, class_prompt=["a dog"], num_class_images=1,
        prior_generation_num_inference_steps=1,
    )  # fmt: skip
    half = train(replace(config, mixed_precision=precision))
    for file in half.files:
        assert {weight.dtype for weight in load_file(file).values()} == {torch.float32}
    assert (half.output_dir / "validation" / "step_000003.png").is_file()
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    assert half.losses != whole.losses
    assert half.losses == pytest.approx(whole.losses, rel=0.1)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert (loaded[0].unet.dtype == wanted) == (method != "full")


@pytest.mark.parametrize("asked", ["model", "fp32", "bf16", "fp16"])
def test_class_pictures_are_drawn_in_the_precision_that_is_asked_for(
    config: TrainConfig, asked: Any, base_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the decoding of latents, in which some models overflow."""
    from diffusers import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    seen: dict[str, set[torch.dtype]] = {"unet": set(), "vae": set()}

    def watch(kind: type, method: str, name: str) -> None:
        original = getattr(kind, method)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            answer = original(self, *args, **kwargs)
            seen[name].add(answer[0].dtype if isinstance(answer, tuple) else answer.sample.dtype)
            return answer

        monkeypatch.setattr(kind, method, watched)

    watch(UNet2DConditionModel, "forward", "unet")
    watch(AutoencoderKL, "decode", "vae")
    train(
        replace(
            config, pretrained_model_name_or_path=str(base_of("sdxl")), with_prior_preservation=True,
            class_prompt=["a dog"], num_class_images=1, prior_generation_num_inference_steps=1, validation_prompt=None,
            prior_generation_precision=asked, max_train_steps=1,
        )
    )  # fmt: skip
    types = {"model": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert seen["unet"] == {types[asked], torch.float32}  # the second of training
    assert seen["vae"] == {torch.float32}


def test_class_pictures_are_drawn_with_the_scheduler_that_is_asked_for(
    config: TrainConfig, loaded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DPMSolverMultistepScheduler

    steps = []
    step = DPMSolverMultistepScheduler.step
    monkeypatch.setattr(
        DPMSolverMultistepScheduler, "step", lambda self, *a, **k: steps.append(self) or step(self, *a, **k)
    )
    train(
        replace(
            config, with_prior_preservation=True, class_prompt=["a dog"], num_class_images=1,
            prior_generation_num_inference_steps=3, prior_generation_scheduler_type="dpm++",
        )
    )  # fmt: skip
    assert len(steps) == 3
    assert type(loaded[0].scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flux dev", {"snr_gamma": 5.0}, "snr_gamma: a FluxPipeline matches flows"),
        ("sd3", {"noise_offset": 0.1}, "noise_offset: a StableDiffusion3Pipeline matches flows"),
        ("sd3", {"unmix_loss_weight": 1.0, "cut_mix_probability": 0.5}, "has no cross-attention to look at"),
        ("sd3", {"targets": "cross_attn"}, "matches no layer of SD3Transformer2DModel"),
        (
            "sd3",
            {"with_prior_preservation": True, "class_prompt": ["a"], "prior_generation_scheduler_type": "ddim"},
            "scheduler_type ddim: a StableDiffusion3Pipeline takes none but euler",
        ),
    ],
)
def test_what_a_family_refuses(
    config: TrainConfig,
    name: str,
    changes: dict[str, Any],
    message: str,
    base_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    config = replace(config, pretrained_model_name_or_path=str(base_of(name)), **changes)
    if config.cut_mix_probability:
        names = [{"phrase": f"a {name} dog", "class_phrase": "a dog"} for name in ("sks", "zwx")]
        concepts = [
            {"instance_data_dir": config.instance_data_dir, "instance_prompt": "a dog"} | name for name in names
        ]
        file = tmp_path / "concepts.json"
        file.write_text(json.dumps(concepts))
        config = replace(config, instance_data_dir=None, instance_prompt=None, concepts_list=str(file))
    with pytest.raises(SVDiffError, match=message):
        train(config)
    assert not Path(config.output_dir).exists()


def test_shifts_in_a_transformer_keep_their_place_in_a_subset(
    config: TrainConfig, base_of: Callable[[str], Path], loaded: list[Any]
) -> None:
    base = str(base_of("flux schnell"))
    result = train(replace(config, pretrained_model_name_or_path=base, targets="attention", rank=3))
    fresh = load_pipeline(base)
    assert svdiff.load(fresh, result.output_dir).num_parameters() == result.num_parameters
    assert differ(draw(fresh), draw(loaded[0])) < 1e-4


TARGETS = "cross_attn_kv"
EARLIER: dict[str, dict[str, Any]] = {
    "svdiff": {"targets": TARGETS, "train_text_encoder": True, "rank": 3},
    "lora": {"method": "lora", "targets": TARGETS, "train_text_encoder": True},
    "full": {"method": "full", "train_text_encoder": True, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.parametrize("method", EARLIER)
def test_a_run_begins_with_what_an_earlier_one_has_learnt(
    config: TrainConfig, name: str, method: str, base_of: Callable[[str], Path], loaded: list[Any], tmp_path: Path
) -> None:
    """With a rate of zero it ends with that, to the bit; and a base that is not moved asks other questions."""
    targets = {} if name == "sd" or method == "full" else {"targets": "attention"}
    config = replace(config, pretrained_model_name_or_path=str(base_of(name)), **EARLIER[method] | targets)
    earlier = train(config)
    still = replace(config, learning_rate=0.0, learning_rate_1d=0.0, adam_weight_decay=0.0, use_ema=True)
    begun = train(replace(still, init_from=str(earlier.output_dir), output_dir=str(tmp_path / "begun")))
    plain = train(replace(still, output_dir=str(tmp_path / "plain")))
    assert begun.losses != plain.losses
    for file in earlier.files:
        mine, wanted = (load_file(folder / file.relative_to(earlier.output_dir)) for folder in
                        (begun.output_dir, earlier.output_dir))  # fmt: skip
        assert mine.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(mine[key], tensor), key
    assert differ(draw(loaded[0]), draw(loaded[1])) == 0
    assert differ(draw(loaded[1]), draw(loaded[2])) > 1e-2


def test_a_run_with_a_beginning_is_gone_on_with(config: TrainConfig, tmp_path: Path) -> None:
    """From its checkpoint, not from its beginning again."""
    earlier = train(replace(config, seed=1))
    config = replace(config, init_from=str(earlier.output_dir), checkpointing_steps=2, max_train_steps=4)
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    shutil.rmtree(whole.output_dir / "checkpoint-4")
    resumed = train(replace(config, output_dir=str(whole.output_dir), resume_from_checkpoint="latest"))
    assert resumed.losses == whole.losses


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("svdiff", {"targets": "up"}, "belongs to no adapted layer of this model.*other targets"),
        ("svdiff", {"rank": 2}, "has shape .*rank"),
        ("svdiff", {"train_text_encoder": False}, "shifts of the text_encoder: train that too"),
        (
            "svdiff",
            {"pretrained_model_name_or_path": "sdxl"},
            "belongs to no adapted layer|was trained on other weights",
        ),
        ("svdiff", {"method": "lora", "rank": None}, "cannot read pytorch_lora_weights.safetensors"),
        (
            "svdiff",
            {"method": "full", "rank": None},
            "there is no folder .*pipeline, which a run of method full leaves",
        ),
        ("lora", {"targets": "up"}, "is not (there|trained here): it is of other targets"),
        ("lora", {"lora_rank": 2}, "has shape .* of another lora_rank"),
        ("lora", {"train_text_encoder": False}, "is not trained here: .* other text encoders"),
        ("lora", {"method": "svdiff"}, "there is no delta file .*spectral_shifts"),
        ("full", {"pretrained_model_name_or_path": "sdxl"}, "its denoiser is of another base"),
    ],
)
def test_beginnings_of_another_kind_are_refused(
    config: TrainConfig, method: str, changes: dict[str, Any], message: str, base_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    config = replace(config, **EARLIER[method], max_train_steps=1, validation_prompt=None)
    earlier = train(config)
    if "pretrained_model_name_or_path" in changes:
        changes = {"pretrained_model_name_or_path": str(base_of(changes["pretrained_model_name_or_path"]))}
    with pytest.raises(SVDiffError, match=f"init_from.*({message})"):
        train(replace(config, init_from=str(earlier.output_dir), output_dir=str(tmp_path / "no"), **changes))
    assert not (tmp_path / "no").exists()
