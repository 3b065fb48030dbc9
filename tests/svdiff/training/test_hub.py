"""What others see of a run: curves and pictures in trackers, a model card, a repository on the hub."""

from __future__ import annotations

import fnmatch
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import svdiff
import torch
from accelerate.utils import LoggerType
from huggingface_hub import ModelCard
from PIL import Image
from svdiff import TrainConfig, train
from svdiff.pipelines import load_pipeline
from svdiff.training.hub import write_model_card
from tiny import RESOLUTION

from svdiff_kernels import SVDiffError


@dataclass
class Hub:
    """Repositories in folders, by the calls that `push` makes."""

    folder: Path
    private: dict[str, bool] = field(default_factory=dict)

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        repository = name if "/" in name else f"somebody/{name}"
        assert exist_ok or repository not in self.private
        self.private[repository] = private
        return SimpleNamespace(repo_id=repository)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list[str]
    ) -> None:
        for path in sorted(Path(folder_path).rglob("*")):
            name = path.relative_to(folder_path).as_posix()
            if path.is_file() and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (self.folder / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.folder / repo_id / name)

    def files(self, repository: str) -> set[str]:
        folder = self.folder / repository
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub, and a token for it."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    return hub


@pytest.fixture
def config(base: Path, pictures: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        str(base), str(pictures), instance_prompt="a sks dog", output_dir=str(tmp_path / "my-dog"), max_train_steps=12,
        report_to="none", validation_prompt=["a dog", "a cat"], validation_steps=6, num_validation_images=2,
        validation_num_inference_steps=1,
    )  # fmt: skip


def test_a_run_is_pushed_with_its_card(config: TrainConfig, hub: Hub) -> None:
    """Without checkpoints, class pictures and logs; and what was pushed can be used as the card says."""
    result = train(
        replace(
            config, push_to_hub=True, checkpointing_steps=5, with_prior_preservation=True, class_prompt=["a dog"],
            num_class_images=1, prior_generation_num_inference_steps=1, report_to="tensorboard", hub_private=True,
            train_text_encoder=True,
        )
    )  # fmt: skip
    assert result.repository == "somebody/my-dog"
    assert "pushed to somebody/my-dog" in str(result)
    assert hub.private == {"somebody/my-dog": True}
    assert hub.files("somebody/my-dog") == {
        "README.md", "run.json", "spectral_shifts.safetensors", "spectral_shifts_te.safetensors",
        "validation/step_000006.png", "validation/step_000012.png",
    }  # fmt: skip
    assert (result.output_dir / "checkpoint-10").is_dir() and (result.output_dir / "class_images").is_dir()
    pushed = hub.folder / "somebody" / "my-dog"
    adapter = svdiff.load(load_pipeline(config.pretrained_model_name_or_path), pushed)
    assert adapter.num_parameters() == result.num_parameters
    card = ModelCard.load(pushed / "README.md")
    assert card.data.instance_prompt == "a sks dog"
    assert "![a dog, a cat](validation/step_000012.png)" in card.text
    assert f"12 steps, {result.num_parameters:,} numbers trained" in card.text
    assert "with prior preservation" in card.text


def test_the_base_on_a_card(config: TrainConfig, tmp_path: Path) -> None:
    """A hub id leads there; of a folder only its name is told."""
    how: dict[str, Any] = {"prompts": ["a sks dog", 'a "sks" dog: asleep'], "steps": 3, "num_parameters": 5}
    private = tmp_path / "home" / "someone" / "models"
    private.mkdir(parents=True)
    for base, named in (("maker/model", "maker/model"), (str(private), None), ("miniature", None)):
        write_model_card(tmp_path, replace(config, pretrained_model_name_or_path=base), **how)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model == named
        assert Path(base).name in card.text and "someone" not in card.content
        assert 'a "sks" dog: asleep' in card.text


def test_new_words_are_loaded_too(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, method="lora", modifier_token=["<new>"])
    write_model_card(tmp_path, config, prompts=["a <new> dog"], steps=1, num_parameters=1)
    text = ModelCard.load(tmp_path / "README.md").text
    assert text.index("import svdiff") < text.index("load_lora_weights") < text.index("svdiff.load_tokens(pipeline")
    assert "A LoRA and new words of" in text


@pytest.mark.parametrize(
    ("method", "tag", "use"),
    [
        ("svdiff", "svdiff", "svdiff.load(pipeline, snapshot_download("),
        ("lora", "lora", 'pipeline.load_lora_weights("my-dog")'),
        ("full", "dreambooth", 'from_pretrained("my-dog", subfolder="pipeline")'),
        ("custom_diffusion", "custom-diffusion", "custom_diffusion.load(pipeline, snapshot_download("),
        ("textual_inversion", "textual_inversion", 'from_pretrained("BASE")\npipeline("a sks dog")'),
    ],
)
def test_each_method_says_how_it_is_used(config: TrainConfig, tmp_path: Path, method: Any, tag: str, use: str) -> None:
    write_model_card(tmp_path, replace(config, method=method), prompts=["a sks dog"], steps=1, num_parameters=1)
    card = ModelCard.load(tmp_path / "README.md")
    assert tag in card.data.tags
    assert use.replace("BASE", Path(config.pretrained_model_name_or_path).name) in card.text


def test_a_hub_that_refuses_leaves_the_run(config: TrainConfig, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "upload_folder", lambda **_: (_ for _ in ()).throw(OSError("no\nnetwork")))
    with pytest.raises(SVDiffError, match=r"cannot push to the hub \(no network\); everything is in .*my-dog"):
        train(replace(config, push_to_hub=True, validation_prompt=None, max_train_steps=1))
    assert (Path(config.output_dir) / "spectral_shifts.safetensors").is_file()


def test_no_token_is_found_out_first(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SVDiffError, match="push_to_hub needs a token"):
        train(replace(config, push_to_hub=True, pretrained_model_name_or_path="not looked for"))


def test_curves_and_pictures_in_tensorboard(config: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(replace(config, report_to="tensorboard", learning_rate=2e-3, lr_scheduler="linear"))
    (file,) = (path for path in (result.output_dir / "logs").rglob("events*") if path.parent.name == "svdiff")
    found = EventAccumulator(str(file)).Reload()
    losses = {event.step: event.value for event in found.Scalars("loss")}
    assert losses == {step: pytest.approx(result.losses[step - 1]) for step in (1, 10, 12)}
    assert found.Scalars("lr")[0].value == pytest.approx(2e-3)
    images = found.Images("validation")
    assert [image.step for image in images] == [6, 12]
    assert (images[0].height, images[0].width) == (2 * RESOLUTION, 2 * RESOLUTION)


class _Wandb:
    """What accelerate asks of wandb."""

    Image = staticmethod(lambda array: Image.fromarray(array))

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.settings: dict[str, Any] = {}
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.settings.update(values))
        self.finished = False

    def init(self, *, project: str) -> _Wandb:
        assert project == "svdiff"
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Wandb]:
    fake = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("svdiff.training.config.installed", lambda module: True)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    yield fake


def test_curves_and_pictures_in_wandb(config: TrainConfig, wandb: _Wandb) -> None:
    result = train(replace(config, report_to="wandb"))
    assert wandb.finished and wandb.settings["max_train_steps"] == 12
    steps = [step for step, _ in wandb.logged]
    assert steps == sorted(steps)  # wandb drops what comes late
    losses = {step: values["loss"] for step, values in wandb.logged if "loss" in values}
    assert losses == {step: result.losses[step - 1] for step in (1, 10, 12)}
    grids = {step: values["validation"] for step, values in wandb.logged if "validation" in values}
    assert grids.keys() == {6, 12}
    with Image.open(result.output_dir / "validation" / "step_000006.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(grids[6][0]))


def test_a_tracker_that_refuses(config: TrainConfig, wandb: _Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no key\nfor wandb")))
    with pytest.raises(SVDiffError, match="report_to wandb: no key for wandb"):
        train(replace(config, report_to="wandb"))
    assert not Path(config.output_dir).exists()


def test_a_tracker_that_is_missing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdiff.training.config.installed", lambda module: module != "wandb")
    for wanted in ("wandb", "all"):
        with pytest.raises(SVDiffError, match="this needs wandb, which is not installed: pip install wandb"):
            train(replace(config, report_to=wanted, pretrained_model_name_or_path="not looked for"))


def test_validation_shows_rows_of_prompts(config: TrainConfig, loaded: list[Any]) -> None:
    """A row a prompt, with the same noise in each grid: the last is what the trained pipeline draws."""
    result = train(replace(config, learning_rate=0.1, seed=3))
    (pipeline,) = loaded
    with Image.open(result.output_dir / "validation" / "step_000012.png") as image:
        grid = np.asarray(image).astype(int)
    for row, prompt in enumerate(config.validation_prompt or []):
        for column in range(2):
            generator = torch.Generator().manual_seed(3 + column)
            drawn = pipeline(prompt, num_inference_steps=1, height=16, width=16, generator=generator).images[0]
            cell = grid[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            assert np.abs(cell - np.asarray(drawn)).max() <= 1
