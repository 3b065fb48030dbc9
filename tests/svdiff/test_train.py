"""Training: it learns, it repeats itself to the bit, and what goes wrong leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from PIL import Image
from safetensors.torch import load_file
from svdiff import TrainConfig, train
from svdiff.outputs import RUN_FILE
from svdiff.training.data import find_pictures
from tiny import RESOLUTION
from torch import Tensor, nn

from svdiff_kernels import SVDiffError

SHIFTS, TEXT_SHIFTS = "spectral_shifts.safetensors", "spectral_shifts_te.safetensors"


def shifts(folder: Path, name: str = SHIFTS) -> dict[str, Tensor]:
    return load_file(folder / name)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_writes_shifts_that_move_the_model(config: TrainConfig, pipeline: Any) -> None:
    result = train(config)
    folder = Path(config.output_dir)
    assert result.output_dir == folder
    assert result.files == [folder / SHIFTS]
    assert result.steps == len(result.losses) == 4
    assert all(0 < loss < 10 for loss in result.losses)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", RUN_FILE, SHIFTS]
    run = json.loads((folder / RUN_FILE).read_text())
    assert (run["command"], run["steps"], run["config"]["max_train_steps"]) == ("train", 4, 4)
    moved = shifts(folder)
    assert sum(t.numel() for t in moved.values()) == result.num_parameters
    norms = [t.abs().max() for key, t in moved.items() if "norm" in key]
    matrices = [t.abs().max() for key, t in moved.items() if "norm" not in key]
    assert 0 < max(norms) <= 4.1e-6  # Adam moves by about the rate: 1e-6 and 1e-3 a step
    assert 1e-3 < max(matrices) <= 4.1e-3
    assert svdiff.load(pipeline, folder).num_parameters() == result.num_parameters
    assert f"{result.num_parameters:,} numbers" in str(result)


def test_the_loss_goes_down(config: TrainConfig, tmp_path: Path) -> None:
    """Against a run that draws the same and learns nothing."""
    config = replace(config, max_train_steps=40, train_batch_size=4, center_crop=True)
    still = train(replace(config, learning_rate=0.0, learning_rate_1d=0.0, output_dir=str(tmp_path / "still")))
    result = train(replace(config, learning_rate=3e-2))
    assert result.losses[0] == still.losses[0]
    assert sum(result.losses[-10:]) < 0.95 * sum(still.losses[-10:])


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_same_seed_gives_the_same_shifts(config: TrainConfig, tmp_path: Path, text_encoder: bool) -> None:
    """To the bit."""
    config = replace(
        config, with_prior_preservation=True, class_prompt=["a dog"], num_class_images=2, random_flip=True,
        train_text_encoder=text_encoder, lr_scheduler="cosine", lr_warmup_steps=1,
    )  # fmt: skip
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        train(replace(config, output_dir=str(tmp_path / name), seed=seed))
    for file in [SHIFTS, *([TEXT_SHIFTS] if text_encoder else [])]:
        one, two, other = (shifts(tmp_path / name, file) for name in ("one", "two", "other"))
        assert same(one, two)
        assert not same(one, other)


def test_validation_does_not_change_the_outcome(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    validated = replace(
        config, output_dir=str(tmp_path / "validated"), validation_prompt=["a sks dog", "a dog"], validation_steps=3,
        num_validation_images=2,
    )  # fmt: skip
    train(validated)
    assert same(shifts(Path(config.output_dir)), shifts(tmp_path / "validated"))
    grids = sorted((tmp_path / "validated" / "validation").iterdir())
    assert [p.name for p in grids] == ["step_000003.png", "step_000004.png"]
    with Image.open(grids[0]) as image:
        assert image.size == (2 * RESOLUTION, 2 * RESOLUTION)


def test_class_pictures_are_drawn_once_and_kept(config: TrainConfig, tmp_path: Path) -> None:
    prompts = ["a dog", "a cat"]
    config = replace(
        config, with_prior_preservation=True, class_prompt=prompts, class_data_dir=str(tmp_path / "class"),
        num_class_images=3, sample_batch_size=2, prior_generation_scheduler_type="dpm++",
    )  # fmt: skip
    train(config)
    drawn = find_pictures(tmp_path / "class")
    assert [p.caption for p in drawn] == ["a dog", "a cat", "a dog"]
    before = {p.path: p.path.read_bytes() for p in drawn}
    (tmp_path / "class" / "own.png").write_bytes(drawn[0].path.read_bytes())
    (tmp_path / "class" / "own.txt").write_text("my own dog")
    train(replace(config, num_class_images=5, overwrite=True))
    again = find_pictures(tmp_path / "class")
    assert [p.caption for p in again] == ["a dog", "a cat", "a dog", "a cat", "my own dog"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_class_pictures_are_part_of_the_loss(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, with_prior_preservation=True, class_prompt=["a dog"], num_class_images=2)
    train(config)
    assert len(find_pictures(tmp_path / "run" / "class_images")) == 2
    train(replace(config, prior_loss_weight=0.0, output_dir=str(tmp_path / "zero")))
    assert not same(shifts(tmp_path / "run"), shifts(tmp_path / "zero"))


def test_captions_of_pictures_are_used(config: TrainConfig, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "captioned"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).with_suffix(".txt").write_text(f"a {path.stem}")
    train(replace(config, instance_data_dir=str(folder), instance_prompt=None))
    train(replace(config, output_dir=str(tmp_path / "prompt")))
    assert not same(shifts(tmp_path / "run"), shifts(tmp_path / "prompt"))


def test_accumulation_is_a_larger_batch(config: TrainConfig, tmp_path: Path) -> None:
    """Two batches of one picture and one of two draw other noise, but both take the asked number of steps."""
    result = train(replace(config, gradient_accumulation_steps=2))
    assert result.steps == 4
    moved = max(t.abs().max().item() for key, t in shifts(tmp_path / "run").items() if "norm" not in key)
    assert 1e-3 < moved <= 4.1e-3  # four steps of Adam, not eight


def test_gradient_checkpointing_trains_the_same(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, train_text_encoder=True))
    train(replace(config, train_text_encoder=True, gradient_checkpointing=True, output_dir=str(tmp_path / "less")))
    for file in (SHIFTS, TEXT_SHIFTS):
        one, two = shifts(tmp_path / "run", file), shifts(tmp_path / "less", file)
        for key, t in one.items():
            torch.testing.assert_close(two[key], t, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2], ids=["", "accumulated"])
def test_a_graphed_step_trains_the_same(
    config: TrainConfig, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a graph that runs what it recorded: batches, gradients and loss go through the same tensors in each step."""
    recorded = []

    def capture(run: Callable[[], Tensor], *, warmups: int) -> Callable[[], Tensor]:
        for _ in range(warmups):
            run()
        recorded.append(run)
        return run

    config = replace(config, gradient_accumulation_steps=steps, train_text_encoder=True)
    plain = train(replace(config, output_dir=str(tmp_path / "plain")))
    monkeypatch.setattr("svdiff.training.graphs.capture", capture)
    monkeypatch.setattr("svdiff.training.config.has_cuda", lambda: True)
    graphed = train(replace(config, output_dir=str(tmp_path / "graphed"), cuda_graphs=True))
    assert len(recorded) == 1
    assert graphed.losses == plain.losses
    assert same(shifts(plain.output_dir), shifts(graphed.output_dir))


@pytest.mark.gpu
def test_a_graphed_step_on_a_gpu(config: TrainConfig, tmp_path: Path) -> None:
    plain = train(replace(config, output_dir=str(tmp_path / "plain")))
    graphed = train(replace(config, output_dir=str(tmp_path / "graphed"), cuda_graphs=True))
    assert graphed.losses == pytest.approx(plain.losses, rel=1e-3)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_unet_trains_the_same(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def compile_eagerly(module: nn.Module, *, mode: str) -> None:
        modes.append(mode)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager", fullgraph=True)

    plain = train(replace(config, output_dir=str(tmp_path / "plain")))
    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    compiled = train(replace(config, output_dir=str(tmp_path / "compiled"), compile="reduce-overhead"))
    assert modes == ["reduce-overhead"]
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_shifts_in_fp32(config: TrainConfig, tmp_path: Path, precision: Any) -> None:
    result = train(replace(config, mixed_precision=precision, train_text_encoder=True))
    assert all(t.dtype == torch.float32 for t in shifts(tmp_path / "run").values())
    assert all(0 < loss < 10 for loss in result.losses)
    train(replace(config, output_dir=str(tmp_path / "fp32")))  # and another precision in the same process


def test_velocity_prediction(config: TrainConfig, pipeline: Any, tmp_path: Path) -> None:
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path / "v")
    train(replace(config, pretrained_model_name_or_path=str(tmp_path / "v")))
    train(replace(config, output_dir=str(tmp_path / "epsilon")))
    assert not same(shifts(tmp_path / "run"), shifts(tmp_path / "epsilon"))
    pipeline.scheduler.register_to_config(prediction_type="sample")
    pipeline.save_pretrained(tmp_path / "x0")
    with pytest.raises(SVDiffError, match="sample"):
        train(replace(config, pretrained_model_name_or_path=str(tmp_path / "x0"), output_dir=str(tmp_path / "no")))


@pytest.mark.parametrize(
    "changes", [{"targets": "cross_attn_kv"}, {"rank": 2}, {"one_dim": "scalar"}, {"form": "residual"}]
)
def test_variants(config: TrainConfig, pipeline: Any, changes: dict[str, Any]) -> None:
    result = train(replace(config, **changes))
    adapter = svdiff.load(pipeline, config.output_dir)
    assert adapter.num_parameters() == result.num_parameters


def test_tensorboard(config: TrainConfig) -> None:
    train(replace(config, report_to="tensorboard"))
    assert any(p.name.startswith("events") for p in Path(config.output_dir).rglob("*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instance_prompt": " "}, "instance_prompt"),
        ({"instance_data_dir": "/nowhere"}, "picture folder"),
        ({"with_prior_preservation": True}, "class_prompt"),
        ({"with_prior_preservation": True, "class_prompt": ["a", ""]}, "class_prompt is empty"),
        ({"validation_prompt": [""]}, "validation_prompt"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"resolution": 20}, "resolution 20"),
        ({"resolution": 2}, "resolution 2"),
        ({"resolution": -1}, "resolution"),
        ({"targets": "no_such"}, "no_such"),
        ({"pretrained_model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
        ({"prior_generation_scheduler_type": "magic", "with_prior_preservation": True, "class_prompt": ["a"]}, "magic"),
        ({"learning_rate": 1e30, "max_grad_norm": 0.0, "max_train_steps": 12}, "the loss became"),
    ],
)
def test_mistakes_leave_nothing(config: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        train(replace(config, **changes))
    assert not [p for p in Path(config.output_dir).parent.iterdir() if p.name != "factor-cache"]


@pytest.mark.parametrize(
    ("gpu", "changes", "message"),
    [
        (False, {}, "cuda_graphs needs an NVIDIA GPU"),
        (True, {"compile": "default"}, "cuda_graphs and compile"),
        (True, {"gradient_checkpointing": True}, "cuda_graphs and gradient_checkpointing"),
    ],
)
def test_when_a_step_cannot_be_graphed(
    config: TrainConfig, gpu: bool, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdiff.training.config.has_cuda", lambda: gpu)
    with pytest.raises(SVDiffError, match=message):
        train(replace(config, cuda_graphs=True, **changes))


def test_a_damaged_picture_is_found_before_the_model_loads(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "good.png")
    (folder / "photo.jpg").write_bytes(b"no photo")
    with pytest.raises(SVDiffError, match=r"photo\.jpg"):
        train(replace(config, instance_data_dir=str(folder), pretrained_model_name_or_path="not looked for"))
