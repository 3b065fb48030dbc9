"""Pictures: each depends on its prompt and seed; shifts and their weight act."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
from PIL import Image
from svdiff import GenerateConfig, generate
from svdiff.checkpoint import read
from svdiff.pipelines import SCHEDULERS, load_pipeline, set_scheduler
from svdiff.sampling import grid, slug
from tiny import RESOLUTION
from torch import nn

from svdiff_kernels import SVDiffError


@pytest.fixture
def config(base: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(str(base), ["a dog"], output_dir=str(tmp_path / "out"), num_inference_steps=3)


@pytest.fixture
def trained(pipeline: Any, tmp_path: Path) -> Path:
    adapter = svdiff.attach(pipeline, text_encoder=True)
    for group in adapter.param_groups():
        for parameter in group["params"]:
            nn.init.normal_(parameter, std=0.3)
    adapter.save_weights(tmp_path / "shifts")
    return tmp_path / "shifts"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_pictures_names_and_grid(config: GenerateConfig) -> None:
    prompts = ["a dog", "A cat, in: the/hat"]
    result = generate(replace(config, prompt=prompts, num_images_per_prompt=3, batch_size=4, seed=5))
    assert [p.name for p in result.pictures] == [
        "000_a-dog_seed5.png", "000_a-dog_seed6.png", "000_a-dog_seed7.png",
        "001_A-cat-in-the-hat_seed8.png", "001_A-cat-in-the-hat_seed9.png", "001_A-cat-in-the-hat_seed10.png",
    ]  # fmt: skip
    assert pixels(result.grid).shape == (2 * RESOLUTION, 3 * RESOLUTION, 3)
    run = json.loads((result.output_dir / "run.json").read_text())
    assert run["pictures"][4] == {"file": result.pictures[4].name, "prompt": "A cat, in: the/hat", "seed": 9}


def test_a_picture_does_not_depend_on_its_batch(config: GenerateConfig, tmp_path: Path) -> None:
    together = generate(replace(config, num_images_per_prompt=3, batch_size=3))
    alone = generate(replace(config, num_images_per_prompt=3, batch_size=1, output_dir=str(tmp_path / "alone")))
    for one, other in zip(together.pictures, alone.pictures, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert np.abs(pixels(together.pictures[0]) - pixels(together.pictures[1])).max() > 10


def test_shifts_act_by_their_weight(config: GenerateConfig, trained: Path, tmp_path: Path) -> None:
    def draw(name: str, **changes: Any) -> np.ndarray:
        return pixels(generate(replace(config, output_dir=str(tmp_path / name), **changes)).pictures[0])

    base = draw("base")
    shifted = draw("shifted", spectral_shifts_ckpt=[str(trained)])
    assert np.abs(shifted - base).max() > 5
    assert np.abs(draw("none", spectral_shifts_ckpt=[str(trained)], spectral_shifts_scale=0.0) - base).max() <= 1
    half = draw("half", spectral_shifts_ckpt=[str(trained)], spectral_shifts_scale=0.5)
    assert np.abs(half - base).max() > 1
    assert np.abs(half - shifted).max() > 1
    bf16 = draw("bf16", spectral_shifts_ckpt=[str(trained)], dtype="bf16")
    assert np.abs(bf16 - shifted).mean() < np.abs(base - shifted).mean()


@pytest.fixture
def two(trained: Path, base: Path, tmp_path: Path) -> list[str]:
    """Shifts called ``shifts`` and ``ink``."""
    adapter = svdiff.attach(load_pipeline(str(base)))
    for group in adapter.param_groups():
        for parameter in group["params"]:
            nn.init.normal_(parameter, std=0.3)
    adapter.save_weights(tmp_path / "other")
    return [str(trained), f"ink={tmp_path / 'other'}"]


def test_every_prompt_has_its_mix(config: GenerateConfig, two: list[str], tmp_path: Path) -> None:
    mixes = ["shifts", "", "ink:0.5, shifts:-0.5"]
    many = replace(config, prompt=["a dog"] * 3, num_images_per_prompt=2, batch_size=4, spectral_shifts_ckpt=two)
    together = generate(replace(many, mix=mixes)).pictures
    found = []
    for i, mix in enumerate(mixes):
        alone = replace(config, num_images_per_prompt=2, seed=2 * i, spectral_shifts_ckpt=two, mix=[mix])
        found += generate(replace(alone, output_dir=str(tmp_path / f"alone {i}"))).pictures
    for one, other in zip(together, found, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    again = replace(many, output_dir=str(tmp_path / "one mix"), mix=mixes[2:])
    same = generate(again).pictures
    assert np.abs(pixels(same[4]) - pixels(together[4])).max() <= 1
    assert np.abs(pixels(same[0]) - pixels(together[0])).max() > 5


def test_one_mix_for_much_work_is_fused(
    config: GenerateConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = []
    fuse = svdiff.Adapter.fuse
    monkeypatch.setattr(svdiff.Adapter, "fuse", lambda adapter: fused.append(1) or fuse(adapter))
    config = replace(config, spectral_shifts_ckpt=[str(trained)])
    factored = generate(config).pictures[0]
    assert not fused
    module = importlib.import_module("svdiff.generate")
    fast = [False]
    monkeypatch.setattr(module, "outruns_plain_layers", lambda dtype, device: fast[0])
    work = 2 * 3 * (RESOLUTION // 2) ** 2  # with the prompt and without, in three steps
    monkeypatch.setattr(module, "FUSED_FROM", work)
    generate(replace(config, form="factored", output_dir=str(tmp_path / "asked")))
    assert not fused
    whole = generate(replace(config, output_dir=str(tmp_path / "fused"))).pictures[0]
    assert len(fused) == 1
    assert np.abs(pixels(whole) - pixels(factored)).max() <= 1
    monkeypatch.setattr(module, "FUSED_FROM", work + 1)
    generate(replace(config, output_dir=str(tmp_path / "too little")))
    monkeypatch.setattr(module, "FUSED_FROM", work)
    generate(replace(config, guidance_scale=1.0, output_dir=str(tmp_path / "without guidance")))
    assert len(fused) == 1
    fast[0] = True
    generate(replace(config, output_dir=str(tmp_path / "plain layers are slow here")))
    assert len(fused) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spectral_shifts_ckpt": ["{0}", "{1}"]}, "mix is missing: how much of shifts, ink"),
        ({"mix": ["dog"]}, "mix needs spectral_shifts_ckpt"),
        ({"spectral_shifts_ckpt": ["{0}"], "mix": ["dog"]}, "no adapter 'dog', only shifts"),
        ({"spectral_shifts_ckpt": ["{0}"], "mix": ["shifts:much"]}, "'much' is no weight"),
        ({"spectral_shifts_ckpt": ["{0}"], "mix": ["shifts:inf"]}, "'inf' is no weight"),
        ({"spectral_shifts_ckpt": ["{0}"], "mix": ["shifts,shifts:2"]}, "names 'shifts' twice"),
        ({"spectral_shifts_ckpt": ["{0}"], "mix": ["shifts", ""]}, "mix: 2 for 1 prompts"),
        ({"spectral_shifts_ckpt": ["{0}"], "mix": ["shifts"], "spectral_shifts_scale": 0.5}, "exclude each other"),
        ({"spectral_shifts_ckpt": ["{0}", "{0}"]}, "two adapters are called 'shifts'"),
        ({"spectral_shifts_ckpt": ["a:b={0}"]}, "given as name=path"),
        ({"spectral_shifts_ckpt": ["={0}"]}, "given as name=path"),
    ],
)
def test_a_mix_that_makes_no_sense(
    config: GenerateConfig, two: list[str], changes: dict[str, Any], message: str
) -> None:
    paths = [text.format(*two) for text in changes.pop("spectral_shifts_ckpt", [])]
    with pytest.raises(SVDiffError, match=message):
        generate(replace(config, spectral_shifts_ckpt=paths, **changes))
    assert not Path(config.output_dir).exists()


def test_size_and_negative_prompt(config: GenerateConfig) -> None:
    result = generate(replace(config, height=24, width=32, negative_prompt="a cat", guidance_scale=3.0))
    assert pixels(result.pictures[0]).shape == (24, 32, 3)


@pytest.mark.parametrize("scheduler_type", sorted(SCHEDULERS))
def test_schedulers(pipeline: Any, scheduler_type: str) -> None:
    set_scheduler(pipeline, scheduler_type)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a dog", num_inference_steps=3).images
    assert np.asarray(image).std() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "  "]}, "prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"scheduler_type": "magic"}, "magic"),
        ({"height": 17}, "resolution 17"),
        ({"device": "abacus"}, "abacus"),
        ({"dtype": "fp12"}, "fp12"),
        ({"spectral_shifts_ckpt": ["/nowhere"]}, "nowhere"),
        ({"pretrained_model_name_or_path": " "}, "empty"),
    ],
)
def test_mistakes_leave_nothing(config: GenerateConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        generate(replace(config, **changes))
    assert not [p for p in Path(config.output_dir).parent.iterdir() if p.name != "factor-cache"]


def test_slug_and_grid() -> None:
    assert slug("a photo of sks dog!") == "a-photo-of-sks-dog"
    assert slug("???") == "picture"
    assert len(slug("x" * 100)) == 40
    assert grid([Image.new("RGB", (3, 2))] * 5, 2).size == (6, 6)


def test_the_miniature_goes_by_its_name(tmp_path: Path) -> None:
    pipeline = load_pipeline("miniature")
    (file,) = svdiff.attach(pipeline, targets="mid", cache=False).save_weights(tmp_path)
    assert read(file).metadata["base_model"] == "miniature"
