"""svdiff edit: what inversion finds draws the picture again, what noise and words change, and what is refused."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from PIL import Image
from svdiff import EditConfig, edit
from svdiff.edit import edited
from svdiff.inversion import invert
from svdiff.latents import encode, slerp
from svdiff.miniature import load_pipeline as load_miniature
from svdiff.miniature import world
from svdiff.pipelines import load_pipeline, set_scheduler

from svdiff_kernels import SVDiffError


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 24, 3), dtype=np.uint8)).resize((24, 40)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def config(base: Path, picture: Path, tmp_path: Path) -> EditConfig:
    return EditConfig(
        str(base), str(picture), "a dog", ["a cat"], str(tmp_path / "out"), max_train_steps=2, num_inference_steps=3
    )


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


def test_what_inversion_finds_draws_the_picture_again() -> None:
    pipeline = load_miniature()
    pipeline.set_progress_bar_config(disable=True)
    scenes = [world.Scene((world.Item("square", "red", "left", "large"),), "white")]
    captions = [world.caption(scene) for scene in scenes]
    latents, _ = encode(pipeline.vae, pipeline.image_processor.preprocess([world.render(s) for s in scenes]))
    scheduler = pipeline.scheduler
    noise = invert(pipeline, latents, captions, num_inference_steps=20)
    assert pipeline.scheduler is scheduler
    set_scheduler(pipeline, "ddim")
    how: Any = {"num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "latent"}
    again = pipeline(captions, latents=noise, **how).images
    other = pipeline(
        captions, latents=torch.randn(noise.shape, generator=torch.Generator().manual_seed(0)), **how
    ).images
    assert (again - latents).norm() < 0.1 * latents.norm()
    assert (again - latents).norm() < 0.5 * (other - latents).norm()


def test_an_edit_leaves_pictures_shifts_and_a_grid(config: EditConfig) -> None:
    result = edit(replace(config, target_prompt=["a cat", "a red cat"], num_images_per_prompt=2, eta=0.5))
    assert [path.name for path in result.pictures] == [
        "000_a-cat_seed0.png", "000_a-cat_seed1.png", "001_a-red-cat_seed2.png", "001_a-red-cat_seed3.png",
    ]  # fmt: skip
    original = pixels(result.output_dir / "original.png")
    side = original.shape[0]
    assert pixels(result.grid).shape == (2 * side, 3 * side, 3)
    assert np.array_equal(pixels(result.grid)[:side, :side], original)
    assert np.abs(pixels(result.pictures[0]) - pixels(result.pictures[1])).max() > 1  # eta adds noise of its own
    run = json.loads((result.output_dir / "run.json").read_text())
    assert run["pictures"][3] == {"file": result.pictures[3].name, "prompt": "a red cat", "seed": 3}
    assert (result.output_dir / "shifts" / "spectral_shifts.safetensors").is_file()
    again = replace(config, spectral_shifts_ckpt=str(result.output_dir / "shifts"), eta=0.5)
    repeated = edit(replace(again, output_dir=config.output_dir + "-again", max_train_steps=1))
    assert np.abs(pixels(repeated.pictures[0]) - pixels(result.pictures[0])).max() <= 1
    assert not (repeated.output_dir / "shifts").exists()


@pytest.mark.parametrize("start_from", ["inversion", "image", "noise"])
def test_batches_draw_what_each_picture_would_be_alone(
    config: EditConfig, start_from: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, inverted = importlib.import_module("svdiff.edit"), []
    monkeypatch.setattr(
        module, "invert", lambda p, x, prompts, **how: inverted.extend(prompts) or invert(p, x, prompts, **how)
    )
    changes: dict[str, Any] = {"slerp_alpha": 0.5} if start_from == "inversion" else {}
    config = replace(config, start_from=start_from, **changes)
    many = edit(replace(config, target_prompt=["a cat", "a hat"], num_images_per_prompt=3, batch_size=2))
    assert inverted == (["a cat", "a hat"] if start_from == "inversion" else [])
    shifts = str(many.output_dir / "shifts")
    for i in (0, 4):
        own = replace(config, spectral_shifts_ckpt=shifts, target_prompt=[["a cat", "a hat"][i // 3]], seed=i)
        alone = edit(replace(own, output_dir=str(tmp_path / f"alone {i}")))
        assert np.abs(pixels(many.pictures[i]) - pixels(alone.pictures[0])).max() <= 1
    assert np.abs(pixels(many.pictures[0]) - pixels(many.pictures[1])).max() > 1


def test_where_it_starts_from_decides(config: EditConfig, base: Path) -> None:
    pipeline = load_pipeline(str(base))
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8))

    def draw(seed: int = 0, **how: Any) -> np.ndarray:
        return pixels(edited(pipeline, [image], ["a cat"], [seed], num_inference_steps=4, **how)[0])

    scheduler = pipeline.scheduler
    assert np.array_equal(draw(0), draw(1))  # inversion alone leaves nothing to chance
    for how in ({"slerp_alpha": 0.5}, {"eta": 1.0}, {"start_from": "noise"}, {"start_from": "image"}):
        assert np.array_equal(draw(0, **how), draw(0, **how))
        assert not np.array_equal(draw(0, **how), draw(1, **how)), how
    assert not np.array_equal(draw(start_from="image", strength=0.5), draw(start_from="image", strength=1.0))
    assert np.array_equal(draw(slerp_alpha=1.0, start_from="inversion"), draw(start_from="noise"))
    assert pipeline.scheduler is scheduler


def test_slerp_keeps_the_length_of_noise() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 4, 8, 8, generator=rng)
    assert torch.equal(slerp(0, a, b), a)
    torch.testing.assert_close(slerp(1, a, b), b)
    half = slerp(0.5, a, b)
    assert (half.flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1) - 1).abs().max() < 0.1
    unit = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    quarter = 0.5**0.5
    torch.testing.assert_close(slerp(0.5, *unit), torch.tensor([[quarter, quarter], [1.0, 0.0]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "a prompt is empty"),
        ({"target_prompt": []}, "a prompt is empty"),
        ({"target_prompt": ["a", ""]}, "a prompt is empty"),
        ({"start_from": "scratch"}, "start_from 'scratch' is not one of inversion, image, noise"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"eta": 1.5}, "eta must be between 0 and 1"),
        ({"start_from": "noise", "slerp_alpha": 0.5}, "slerp_alpha belongs to start_from inversion"),
        ({"strength": 0.5}, "strength belongs to start_from image"),
        ({"start_from": "image", "eta": 0.5}, "eta belongs to"),
        ({"image": "/nowhere.png"}, "cannot read the picture /nowhere.png"),
        ({"spectral_shifts_ckpt": "/nowhere"}, "no delta file"),
        ({"resolution": 17}, "resolution 17"),
    ],
)
def test_mistakes_leave_nothing(config: EditConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SVDiffError, match=message) as caught:
        edit(replace(config, **changes))
    assert "\n" not in str(caught.value)
    assert not [path for path in Path(config.output_dir).parent.iterdir() if path.name != "photo.png"]


def test_eta_of_one_from_pure_noise(base: Path, picture: Path) -> None:
    pipeline = load_pipeline(str(base))
    pipeline.scheduler = load_miniature().scheduler  # which has zero terminal SNR
    image = Image.open(picture).convert("RGB").resize((16, 16))
    for start in ("inversion", "noise"):
        (drawn,) = edited(pipeline, [image], ["a cat"], [0], num_inference_steps=50, eta=1.0, start_from=start)
        assert np.asarray(drawn).std() > 0, "all black: NaN"


def test_a_flow_has_no_ddim(base_of: Any, config: EditConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("svdiff.edit"), "train", lambda _: pytest.fail("nothing is learnt"))
    with pytest.raises(SVDiffError, match="StableDiffusion3Pipeline cannot be inverted"):
        edit(replace(config, pretrained_model_name_or_path=str(base_of("sd3 without t5"))))
    pipeline = load_pipeline(str(base_of("sd3 without t5")))
    image = Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8))
    with pytest.raises(SVDiffError, match="StableDiffusion3Pipeline cannot be inverted"):
        edited(pipeline, [image], ["a cat"], [0], num_inference_steps=2)
    for start in ("noise", "image"):
        (drawn,) = edited(pipeline, [image], ["a cat"], [0], num_inference_steps=2, start_from=start)
        assert drawn.size == (16, 16)


def test_shifts_of_the_picture_bring_it_closer(config: EditConfig, base: Path, picture: Path, tmp_path: Path) -> None:
    """With its own prompt a learnt picture comes out nearer to itself."""
    learnt = replace(config, max_train_steps=60, learning_rate=2e-2, train_batch_size=4, target_prompt=["a dog"])
    result = edit(replace(learnt, start_from="noise", guidance_scale=1.0, num_inference_steps=10))
    plain = replace(learnt, spectral_shifts_ckpt=str(result.output_dir / "shifts"), spectral_shifts_scale=0.0)
    bare = edit(
        replace(
            plain, start_from="noise", guidance_scale=1.0, num_inference_steps=10, output_dir=str(tmp_path / "bare")
        )
    )
    pipeline = load_pipeline(str(base))

    def distance(one: Path, other: Path) -> float:
        latents = [
            encode(pipeline.vae, pipeline.image_processor.preprocess([Image.open(path)]))[0] for path in (one, other)
        ]
        return float((latents[0] - latents[1]).norm())

    original = result.output_dir / "original.png"
    assert distance(result.pictures[0], original) < distance(bare.pictures[0], original)
    assert svdiff.load(pipeline, result.output_dir / "shifts").num_parameters() > 0
