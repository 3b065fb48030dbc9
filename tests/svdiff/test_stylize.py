"""svdiff stylize: what stochastic inversion puts on a picture, what strength leaves of it, and what is written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from PIL import Image, ImageOps
from svdiff import StylizeConfig, TrainConfig, stylize, train
from svdiff.miniature import load_pipeline as load_miniature
from svdiff.miniature import world
from svdiff.miniature.styles import STYLES
from svdiff.pipelines import SCHEDULERS, load_pipeline, set_scheduler
from svdiff.stochastic_inversion import inverting_stochastically, predicted_noise
from svdiff.stylize import check, stylized
from svdiff.tokens import save_tokens
from tiny import RESOLUTION, tiny_clip

from svdiff_kernels import SVDiffError

Draw = Callable[..., np.ndarray]


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


def noise_picture(width: int = RESOLUTION, height: int = RESOLUTION, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A folder as `svdiff train` leaves it: shifts, and a word beside them."""
    pipeline = load_pipeline(str(base))
    adapter = svdiff.attach(pipeline)
    rng = torch.Generator().manual_seed(0)
    for parameter in (p for group in adapter.param_groups() for p in group["params"]):
        parameter.data += 0.3 * torch.rand(parameter.shape, generator=rng)
    adapter.save_weights(tmp_path / "run")
    save_tokens(tmp_path / "run", {"<ink>": {"text_encoder": torch.randn(1, 12, generator=rng)}})
    return tmp_path / "run"


@pytest.fixture
def contents(tmp_path: Path) -> Path:
    """A folder of two pictures, the second on its side, as cameras leave them."""
    folder = tmp_path / "contents"
    folder.mkdir()
    noise_picture(25, 19).save(folder / "a.png")
    (folder / "a.txt").write_text("a dog")
    (folder / "b.txt").write_text("a cat")
    turned = noise_picture(31, 17, seed=1)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "b.jpg", exif=exif)
    return folder


@pytest.fixture
def config(base: Path, run: Path, contents: Path, tmp_path: Path) -> StylizeConfig:
    return StylizeConfig(
        str(base), [str(contents)], str(tmp_path / "out"), spectral_shifts_ckpt=str(run), num_inference_steps=4,
        prompt="{caption} <ink>",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler_type", ["ddim", "dpm++", "euler", "heun", "unipc"])
def test_a_denoiser_that_is_right_finds_the_noise_again(base: Path, scheduler_type: str, kind: str) -> None:
    """Whatever it was asked for, and in whatever units a scheduler counts noise."""
    pipeline = load_pipeline(str(base))
    pipeline.scheduler.register_to_config(prediction_type=kind)
    set_scheduler(pipeline, scheduler_type)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(10)
    if scheduler_type != "ddim":
        scheduler.set_begin_index(4)
    t = scheduler.timesteps[4]
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    kept = float(scheduler.alphas_cumprod[int(t)])
    noisy = kept**0.5 * latents + (1 - kept) ** 0.5 * noise
    answers = {"epsilon": noise, "v_prediction": kept**0.5 * noise - (1 - kept) ** 0.5 * latents, "sample": latents}

    def ask(given: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(given, noisy, atol=1e-3, rtol=1e-3)  # in units of variance 1, as it was trained
        assert torch.equal(timesteps, t.repeat(2))
        return answers[kind]

    found = predicted_noise(scheduler, scheduler.add_noise, ask, latents, noise, t.repeat(2))
    torch.testing.assert_close(found, noise, atol=5e-3, rtol=5e-3)  # of euler's noise levels between two timesteps


def test_a_flow_that_is_right_finds_the_noise_again(base_of: Callable[[str], Path]) -> None:
    scheduler = load_pipeline(str(base_of("sd3 without t5"))).scheduler
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    latents, noise, t = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8), scheduler.timesteps[4].repeat(2)
    found = predicted_noise(
        scheduler, lambda x, e, t: scheduler.scale_noise(x, t, e), lambda *_: noise - latents, latents, noise, t
    )
    torch.testing.assert_close(found, noise)


def test_image_to_image_starts_from_the_predicted_noise(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser is asked once more, with the prompt; its answer is put on the picture by the scheduler."""
    pipeline = load_pipeline(str(base))
    pipeline.set_progress_bar_config(disable=True)
    calls: list[tuple[torch.Tensor, ...]] = []
    forward = pipeline.unet.forward

    def recording(sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **how: Any) -> Any:
        answer = forward(sample, timestep, encoder_hidden_states, **how)
        calls.append((sample.clone(), torch.as_tensor(timestep).flatten()[:1], encoder_hidden_states, answer[0]))
        return answer

    monkeypatch.setattr(pipeline.unet, "forward", recording)
    image, scheduler = noise_picture(), pipeline.scheduler
    stylized(
        pipeline, [image], ["a cat"], [7], strength=0.5, num_inference_steps=4, guidance_scale=1.0,
        stochastic_inversion=True,
    )  # fmt: skip
    assert "add_noise" not in vars(scheduler)
    rng = torch.Generator().manual_seed(7)
    encoded = pipeline.vae.encode(pipeline.image_processor.preprocess([image])).latent_dist
    latents = encoded.sample(rng) * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=rng)
    (asked, time, prompt, predicted), (begun, first, same, _), _ = calls
    assert torch.equal(time, first) and torch.equal(time, scheduler.timesteps[2:3])
    torch.testing.assert_close(asked, scheduler.add_noise(latents, noise, time))
    torch.testing.assert_close(begun, scheduler.add_noise(latents, predicted, time))
    torch.testing.assert_close(prompt, same)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux dev", "flux schnell"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_every_family(base_of: Callable[[str], Path], name: str, stochastic: bool) -> None:
    pipeline = load_pipeline(str(base_of(name)))
    how: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3.0}
    how["stochastic_inversion"] = stochastic
    images = [noise_picture(seed=seed) for seed in range(3)]
    prompts = ["a cat", "a dog", "a hat"]
    together = stylized(pipeline, images, prompts, [0, 1, 2], **how)
    assert {image.size for image in together} == {(RESOLUTION, RESOLUTION)}
    for i in (0, 2):
        (alone,) = stylized(pipeline, images[i : i + 1], prompts[i : i + 1], [i], **how)
        assert np.abs(pixels(together[i]) - pixels(alone)).max() <= 1
    other = stylized(pipeline, images, prompts, [0, 1, 2], **(how | {"stochastic_inversion": not stochastic}))
    assert np.abs(pixels(together[0]) - pixels(other[0])).max() > 1


@pytest.mark.parametrize("scheduler_type", sorted(SCHEDULERS))
def test_every_scheduler_is_given_back(base: Path, scheduler_type: str) -> None:
    pipeline = load_pipeline(str(base))
    try:
        set_scheduler(pipeline, scheduler_type)
    except SVDiffError as error:
        pytest.skip(str(error))
    how: dict[str, Any] = {"strength": 0.6, "num_inference_steps": 6, "guidance_scale": 1.0}
    (drawn,) = stylized(pipeline, [noise_picture()], ["a cat"], [0], stochastic_inversion=True, **how)
    assert pixels(drawn).std() > 0
    assert "add_noise" not in vars(pipeline.scheduler)


def test_an_error_within_gives_the_scheduler_back(base: Path) -> None:
    pipeline = load_pipeline(str(base))
    with pytest.raises(ZeroDivisionError), inverting_stochastically(pipeline, ["a cat"], (16, 16)):
        assert "add_noise" in vars(pipeline.scheduler)
        raise ZeroDivisionError
    assert "add_noise" not in vars(pipeline.scheduler)


def test_strength_on_the_miniature() -> None:
    """From the picture as it is to what the prompt says; and what stochastic inversion starts from is nearer to it."""
    pipeline = load_miniature()
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, 1) for _ in range(4)]
    images = [world.render(scene, rng) for scene in scenes]
    prompts = [world.caption(world.sample_scene(rng, 1)) for _ in scenes]

    def moved(**how: Any) -> float:
        drawn = stylized(pipeline, images, prompts, range(4), num_inference_steps=12, guidance_scale=2.5, **how)
        return float(np.mean([np.abs(pixels(a) - pixels(b)).mean() for a, b in zip(images, drawn, strict=True)]))

    assert moved(strength=0.0) == moved(strength=0.05) == 0
    distances = [moved(strength=strength) for strength in (0.25, 0.6, 0.95)]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert moved(strength=0.6, stochastic_inversion=True) < distances[1]


def test_a_folder_in_the_style_of_a_run(config: StylizeConfig, contents: Path) -> None:
    result = stylize(replace(config, num_images_per_picture=2, batch_size=3))
    assert [path.name for path in result.pictures] == [
        "000_a_seed0.png", "000_a_seed1.png", "001_b_seed2.png", "001_b_seed3.png",
    ]  # fmt: skip
    told = json.loads((result.output_dir / "run.json").read_text())["pictures"]
    assert told[0]["prompt"] == "a dog <ink>" and told[3]["prompt"] == "a cat <ink>"
    assert told[3] == {
        "file": result.pictures[3].name,
        "prompt": told[3]["prompt"],
        "seed": 3,
        "image": f"{contents}/b.jpg",
    }
    sheet = pixels(result.grid)
    assert sheet.shape == (2 * RESOLUTION, 3 * RESOLUTION, 3)
    upright = ImageOps.exif_transpose(Image.open(contents / "b.jpg")).convert("RGB")
    assert upright.size == (17, 31)
    scaled = upright.resize((RESOLUTION, round(31 * RESOLUTION / 17)), Image.Resampling.LANCZOS)
    top = (scaled.height - RESOLUTION) // 2
    assert np.array_equal(sheet[RESOLUTION:, :RESOLUTION], pixels(scaled.crop((0, top, RESOLUTION, top + RESOLUTION))))
    for i, path in enumerate(result.pictures):
        row, column = i // 2 * RESOLUTION, (i % 2 + 1) * RESOLUTION
        assert np.array_equal(pixels(path), sheet[row : row + RESOLUTION, column : column + RESOLUTION])
    alone = stylize(replace(config, image=[str(contents / "b.jpg")], seed=3, output_dir=config.output_dir + "-alone"))
    assert np.abs(pixels(alone.pictures[0]) - pixels(result.pictures[3])).max() <= 1


def test_what_was_learnt_decides(config: StylizeConfig, run: Path) -> None:
    def draw(name: str, **changes: Any) -> np.ndarray:
        made = stylize(replace(config, output_dir=f"{config.output_dir}-{name}", **changes))
        return pixels(made.pictures[0])

    both = draw("both")
    word = draw("word", spectral_shifts_ckpt=None, learned_embeds=str(run))
    assert np.abs(both - word).max() > 1  # the shifts
    assert np.abs(word - draw("base", spectral_shifts_ckpt=None, prompt="a dog ink")).max() > 1
    assert np.abs(word - draw("none", spectral_shifts_scale=0.0)).max() <= 1
    assert np.abs(both - draw("less", strength=0.5)).max() > 1
    assert np.abs(both - draw("inverted", stochastic_inversion=True)).max() > 1
    assert np.abs(both - draw("not", negative_prompt="a cat")).max() > 1
    assert np.array_equal(draw("zero", strength=0.0), pixels(stylize(replace(config, strength=0.0)).grid)[:16, :16])
    assert np.array_equal(draw("template", prompt="a dog <ink>", image=[config.image[0] + "/a.png"]), both)


def test_prompts_of_a_run(config: StylizeConfig, contents: Path, run: Path) -> None:
    (contents / "b.txt").unlink()
    config = replace(config, prompt=None)
    assert [picture.caption for picture in check(config)] == ["a dog, in the style of <ink>", "in the style of <ink>"]
    one = check(replace(config, image=[str(contents / "a.png")], prompt="{caption}!"))
    assert [picture.caption for picture in one] == ["a dog!"]
    (contents / "c.txt").write_bytes(b"\xff")  # of no picture that is asked for
    Image.new("RGB", (9, 9)).save(contents / "c.png")
    assert [p.caption for p in check(replace(config, image=[str(contents / "b.jpg")]))] == ["in the style of <ink>"]
    with pytest.raises(SVDiffError, match="too long: <ink> would be cut off"):  # of sixteen letters
        stylize(replace(config, image=[str(contents / "a.png")]))
    with pytest.raises(SVDiffError, match=r"b.jpg has no caption"):
        check(replace(config, image=[str(contents / "b.jpg")], prompt="{caption} <ink>"))
    save_tokens(run, {"<other>": {"text_encoder": torch.ones(1, 12)}, "<ink>": {"text_encoder": torch.ones(1, 12)}})
    with pytest.raises(SVDiffError, match="prompt is missing"):
        check(replace(config, image=[str(contents / "a.png")]))


def test_a_style_of_the_miniature_end_to_end(tmp_path: Path) -> None:
    """SVD-InST: what is learnt of filtered scenes is put on plain ones, and what stands where stays."""
    style, rng = STYLES["bars"], random.Random(0)
    learnt, plain = [world.sample_scene(rng, 1) for _ in range(16)], [world.sample_scene(rng, 1) for _ in range(12)]
    for folder in ("learnt", "plain", "clip"):
        (tmp_path / folder).mkdir()
    tiny_clip().save_pretrained(tmp_path / "clip")
    for i, scene in enumerate(learnt):
        style.apply(world.render(scene, rng)).save(tmp_path / "learnt" / f"{i:02d}.png")
        (tmp_path / "learnt" / f"{i:02d}.txt").write_text(f"{_objects(scene)}, in the style of <style>")
    for i, scene in enumerate(plain):
        world.render(scene, rng).save(tmp_path / "plain" / f"{i:02d}.png")
        (tmp_path / "plain" / f"{i:02d}.txt").write_text(_objects(scene))
    train(
        TrainConfig(
            "miniature", str(tmp_path / "learnt"), output_dir=str(tmp_path / "run"), max_train_steps=60,
            learning_rate=1e-2, learning_rate_1d=1e-2, learning_rate_tokens=1e-3, train_batch_size=6, report_to="none",
            modifier_token=["<style>"], initializer_token=["style"], image_encoder=str(tmp_path / "clip"),
        )
    )  # fmt: skip
    config = StylizeConfig(
        "miniature", [str(tmp_path / "plain")], str(tmp_path / "out"), spectral_shifts_ckpt=str(tmp_path / "run"),
        guidance_scale=2.5, scheduler_type="dpm++", num_inference_steps=15, batch_size=12,
    )  # fmt: skip
    drawn = [Image.open(path) for path in stylize(config).pictures]
    pairs = list(zip(drawn, plain, strict=True))
    assert sum(style.shows(image) for image in drawn) >= 0.7 * len(drawn)
    assert sum(style.places(image, scene) for image, scene in pairs) >= 0.7 * len(drawn)
    base = replace(config, spectral_shifts_scale=0.0, output_dir=f"{config.output_dir}-base")
    assert not any(style.shows(Image.open(path)) for path in stylize(base).pictures)


def _objects(scene: world.Scene) -> str:
    """What a caption says of objects, and nothing of what is behind them."""
    return world.caption(scene).partition(",")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": []}, "image is missing"),
        ({"image": ["/nowhere.png"]}, "there is no picture /nowhere.png"),
        ({"prompt": " "}, "the prompt is empty"),
        (
            {"spectral_shifts_ckpt": None, "prompt": None},
            "prompt is missing: one is made of one learned token, and there are 0",
        ),
        ({"spectral_shifts_ckpt": "/nowhere"}, "no delta file"),
        ({"learned_embeds": "/nowhere"}, "there is no file"),
        ({"strength": 1.5}, "strength must be between 0 and 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_images_per_picture": 0}, "num_images_per_picture must be at least 1"),
        ({"resolution": 17}, "resolution 17"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"scheduler_type": "none"}, "scheduler_type 'none'"),
    ],
)
def test_mistakes_leave_nothing(config: StylizeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SVDiffError, match=message) as caught:
        stylize(replace(config, **changes))
    assert "\n" not in str(caught.value)
    assert not Path(config.output_dir).exists()


def test_a_file_that_is_no_picture(config: StylizeConfig, contents: Path) -> None:
    (contents / "c.png").write_bytes(b"nothing")
    with pytest.raises(SVDiffError, match=r"cannot read the picture .*c\.png"):
        stylize(config)
