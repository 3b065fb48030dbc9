"""Families: in training a denoiser is told what its own pipeline tells it; each trains, saves, loads and draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from PIL import Image
from safetensors.torch import load_file
from svdiff import GenerateConfig, TrainConfig, generate, train
from svdiff.pipelines import check_resolution, default_resolution, load_pipeline, set_scheduler
from svdiff.sampling import sample
from svdiff.training.families import family_of
from svdiff.training.sources import Captions
from tiny import RESOLUTION, assert_unchanged, snapshot
from tiny_pipelines import PIPELINES, draw
from torch import Tensor

from svdiff_kernels import SVDiffError

PROMPTS = ["a sks dog", "two cats, one of them fat and asleep"]  # the second is longer than CLIP reads
SIZES = {"original_size": (40, 30), "crops_coords_top_left": (3, 5), "target_size": (16, 24)}
ENCODERS = {
    "sd": ["_te"], "sdxl": ["_te", "_te2"], "sd3": ["_te", "_te2"], "sd3 without t5": ["_te", "_te2"],
    "flux dev": ["_te"], "flux schnell": ["_te"],
}  # fmt: skip
"""Of each pipeline, which text encoders train."""


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        pipeline = PIPELINES[name](tmp_path)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@contextmanager
def asked(denoiser: Any) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """The denoiser's arguments and answers, call by call."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    signature = inspect.signature(type(denoiser).forward)

    def record(module: Any, args: Any, kwargs: Any, answer: Any) -> None:
        told = signature.bind(module, *args, **kwargs).arguments
        told |= told.pop("added_cond_kwargs", None) or {}
        calls.append(({k: v for k, v in told.items() if isinstance(v, Tensor)}, answer[0]))

    hook = denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("length", [None, 11], ids=["", "11 tokens"])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_denoiser_is_told_what_its_pipeline_tells_it(
    name: str, length: int | None, made: Callable[[str], Any]
) -> None:
    pipeline = made(name)
    how: dict[str, Any] = dict(SIZES) if name == "sdxl" else {}
    if "max_sequence_length" in inspect.signature(pipeline.__call__).parameters and length:
        how["max_sequence_length"] = length
    guidance = 1.0 if "flux" not in name else 2.5  # of FLUX it is told to the denoiser
    family = family_of(pipeline, max_sequence_length=length, guidance_scale=guidance)
    with asked(family.denoiser) as calls:
        pipeline(
            PROMPTS, height=16, width=24, num_inference_steps=1, guidance_scale=guidance, output_type="latent",
            generator=torch.Generator().manual_seed(0), **how,
        )  # fmt: skip
        theirs, their_answer = calls[0]
        noisy = theirs["hidden_states" if family.flow else "sample"]
        timesteps = theirs["timestep"].expand(2)
        if "flux" in name:
            unpack = pipeline._unpack_latents
            noisy, timesteps = unpack(noisy, 16, 24, pipeline.vae_scale_factor), timesteps * 1000
            their_answer = unpack(their_answer, 16, 24, pipeline.vae_scale_factor)
        captions = Captions(family, PROMPTS)
        with torch.no_grad():
            sizes = torch.tensor([[part for pair in SIZES.values() for part in pair]] * 2)
            our_answer = family.predict(noisy, timesteps, captions.embed(captions.numbers(PROMPTS)), sizes)
    ours, _ = calls[1]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value.expand_as(ours[key]), msg=lambda text, key=key: f"{key}: {text}")
        assert ours[key].dtype == value.dtype or key == "timestep", key
    torch.testing.assert_close(our_answer, their_answer)
    if family.readers[-1][1] in family.text_encoders and name != "sd":
        assert not torch.allclose(ours["encoder_hidden_states"][0], ours["encoder_hidden_states"][1])


def test_pipelines_tell_their_sizes(made: Callable[[str], Any]) -> None:
    assert default_resolution(made("sd3")) == 8 * 2
    assert default_resolution(made("flux dev")) == 128 * 2
    check_resolution(made("sd3"), 16, 96)
    with pytest.raises(SVDiffError, match="at most 96"):
        check_resolution(made("sd3"), 104)


def test_an_unknown_kind_of_pipeline() -> None:
    class OtherPipeline:
        pass

    with pytest.raises(SVDiffError, match="OtherPipeline, only StableDiffusionPipeline"):
        family_of(OtherPipeline())


@pytest.mark.parametrize("name", PIPELINES)
def test_each_family_trains_saves_and_loads(
    name: str, base_of: Callable[[str], Path], pictures: Path, tmp_path: Path, loaded: list[Any]
) -> None:
    """What is loaded into a fresh pipeline draws what the trained one draws, and not what the base does."""
    config = TrainConfig(
        str(base_of(name)), str(pictures), instance_prompt="a sks dog", output_dir=str(tmp_path / "run"),
        resolution=RESOLUTION, max_train_steps=3, learning_rate=0.1, train_text_encoder=True, report_to="none",
        random_flip=True, validation_prompt=["a dog"], validation_num_inference_steps=1, num_validation_images=1,
    )  # fmt: skip
    result = train(config)
    names = [f"spectral_shifts{part}.safetensors" for part in ("", *ENCODERS[name])]
    assert [path.name for path in result.files] == names
    for path in result.files:
        assert max(shift.abs().max().item() for shift in load_file(path).values()) > 0.05, path.name
    (trained,) = loaded
    fresh = load_pipeline(str(base_of(name)))
    for role, part in fresh.components.items():
        if type(part).__name__ == "T5EncoderModel":
            assert_unchanged(getattr(trained, role), snapshot(part))
    base = draw(fresh)
    svdiff.load(fresh, result.output_dir)
    assert np.abs(draw(fresh) - draw(trained)).max() < 1e-4
    assert np.abs(draw(fresh) - base).max() > 1e-2


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev"])
def test_each_family_generates(name: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = GenerateConfig(
        str(base_of(name)), ["a dog", "a cat"], output_dir=str(tmp_path / "base"), num_inference_steps=2, height=16,
        width=24,
    )  # fmt: skip
    plain = generate(config)
    pipeline = load_pipeline(str(base_of(name)))
    adapter = svdiff.attach(pipeline, targets="attention", text_encoder=["text_encoder"])
    for group in adapter.param_groups():
        for parameter in group["params"]:
            torch.nn.init.normal_(parameter, std=0.3)
    adapter.save_weights(tmp_path / "shifts")
    changes = {"spectral_shifts_ckpt": str(tmp_path / "shifts"), "output_dir": str(tmp_path / "shifted")}
    shifted = generate(replace(config, **changes))
    for one, other in zip(plain.pictures, shifted.pictures, strict=True):
        with Image.open(one) as a, Image.open(other) as b:
            assert a.size == b.size == (24, 16)
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative_prompt": "a cat"}, "negative_prompt: a FluxPipeline is guided without one"),
        ({"scheduler_type": "ddim"}, "scheduler_type ddim: a FluxPipeline takes none but euler"),
        ({"height": 20}, "resolution 20 does not fit this model: it must be a multiple of 8"),
    ],
)
def test_what_flux_does_not_draw(
    changes: dict[str, Any], message: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    config = GenerateConfig(str(base_of("flux dev")), ["a dog"], output_dir=str(tmp_path / "out"), height=16, width=16)
    with pytest.raises(SVDiffError, match=message):
        generate(replace(config, **changes))


def test_a_flow_keeps_its_sampler(made: Callable[[str], Any]) -> None:
    """By the name that other models know as another one."""
    pipeline = made("sd3")
    before = draw(pipeline)
    set_scheduler(pipeline, "euler")
    assert np.array_equal(draw(pipeline), before)


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux dev"])
def test_guidance_is_the_pipelines_own_unless_asked_for(name: str, made: Callable[[str], Any]) -> None:
    pipeline = made(name)

    def drawn(guidance: float | None) -> np.ndarray:
        how: dict[str, Any] = {"batch_size": 1, "num_inference_steps": 2, "resolution": (16, 16)}
        (image,) = sample(pipeline, ["a dog"], [0], guidance_scale=guidance, **how)
        return np.asarray(image).astype(int)

    own = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
    assert np.array_equal(drawn(None), drawn(own))
    assert not np.array_equal(drawn(None), drawn(own + 2.0))


@pytest.mark.parametrize(
    ("name", "targets", "wanted", "not_wanted"),
    [
        ("sd3", "attention", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2"),
        ("flux dev", "attention", "single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_mlp"),
        ("sd3", "all", "pos_embed.proj", None),
        ("flux dev", "all", "x_embedder", None),
        ("flux dev", r"^single_.*proj_mlp$", "single_transformer_blocks.0.proj_mlp", "x_embedder"),
        ("sdxl", "cross_attn_kv", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "conv_in"),
    ],
)
def test_target_subsets(
    name: str, targets: str, wanted: str, not_wanted: str | None, made: Callable[[str], Any], tmp_path: Path
) -> None:
    pipeline = made(name)
    (file,) = svdiff.attach(pipeline, targets=targets, cache=False).save_weights(tmp_path / "shifts")
    keys = load_file(file).keys()
    assert f"{wanted}.delta" in keys
    assert f"{not_wanted}.delta" not in keys
