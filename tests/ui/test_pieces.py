"""What the page is made of, without a browser: commands as children, runs in a folder, what a server refuses."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from PIL import Image
from svdiff import EditConfig, GenerateConfig, TrainConfig, cli
from svdiff.ui import UIConfig, ui
from svdiff.ui.child import Child, Children, arguments
from svdiff.ui.runs import Runs

from svdiff_kernels import SVDiffError


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (8, 8)).save(tmp_path / "a photo.png")
    return str(tmp_path / "a photo.png")


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig("miniature"),
        TrainConfig("miniature", instance_prompt="-a dog", class_prompt=["a dog", "a 'cat'"], cache_latents=False),
        TrainConfig("miniature", with_prior_preservation=True, learning_rate_1d=1e-6, validation_prompt=["--seed"]),
        GenerateConfig("miniature", ["a dog", "a cat"], mix=["dog:-0.5"], guidance_scale=1.0, negative_prompt=""),
        EditConfig("miniature", "picture.png", "a dog", ["--overwrite"], start_from="image", strength=0.25),
    ],
    ids=["nothing", "texts", "numbers", "generate", "edit"],
)
def test_a_command_line_says_what_a_config_does(config: TrainConfig | GenerateConfig | EditConfig) -> None:
    name = type(config).__name__.removesuffix("Config").lower()
    words = arguments(name, config)
    assert words[0] == name
    assert cli._parse(name, cli.COMMANDS[name], type(config), words[1:]) == config


def test_a_prompt_is_no_flag() -> None:
    with pytest.raises(SVDiffError, match="prompt: '--overwrite' would be read as a flag"):
        arguments("generate", GenerateConfig("miniature", ["a dog", "--overwrite"]))


def test_a_childs_mistake_is_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[bool] = []
    children = Children()
    child = children.start(["train", "--pretrained_model_name_or_path", "miniature"], lambda: ended.append(True))
    assert child.running
    with pytest.raises(SVDiffError, match="something is being trained or edited already"):
        children.start(["info"], lambda: None)
    child.wait(60)
    assert child.complaint == "no pictures: give instance_data_dir, concepts_list or dataset_name"
    assert (child.running, child.succeeded, ended) == (False, False, [True])
    assert "svdiff: error: no pictures" in capfd.readouterr().err


def test_a_child_that_is_ended_says_nothing() -> None:
    child = Child(["info"], lambda: None)
    child.end()
    assert (child.running, child.complaint) == (False, "")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "-flag", "a b", "a:1", "a,b", "a=b", "ü", "x" * 65, "a\n"]
)
def test_names_are_no_paths(runs: Runs, name: str) -> None:
    with pytest.raises(SVDiffError, match="is no name of a run"):
        runs.path(name)


def test_runs_are_not_overwritten(runs: Runs, tmp_path: Path) -> None:
    assert runs.free("", "run") == "run-1"
    for name in ("run-1", "dog"):
        runs.path(name).mkdir()
    assert runs.free("", "run") == "run-2"
    assert runs.free("cat", "run") == "cat"
    with pytest.raises(SVDiffError, match="there is a run called 'dog' already"):
        runs.free("dog", "run")


def test_adapters_are_results_or_the_newest_checkpoints(runs: Runs, tmp_path: Path) -> None:
    for place in (
        "done",
        "done/checkpoint-2",
        "stopped/checkpoint-9",
        "stopped/checkpoint-10",
        ".hidden",
        "edit/shifts",
    ):
        (tmp_path / "runs" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / place / "spectral_shifts.safetensors").touch()
    assert runs.adapters() == {"done": runs.path("done"), "stopped": runs.path("stopped") / "checkpoint-10"}


def test_pictures_stay_with_their_run(runs: Runs, picture: str) -> None:
    folder = runs.keep_pictures("dog", [picture, picture], ["a 'dog'", "a dög"])
    assert sorted(path.name for path in folder.iterdir()) == ["000-a-photo.png", "001-a-photo.png", "metadata.jsonl"]
    folder = runs.keep_pictures("dog", [picture])  # that came to nothing
    assert [path.name for path in folder.iterdir()] == ["000-a-photo.png"]
    runs.path("dog").mkdir()
    runs.forget_pictures("dog")
    assert folder.exists()
    runs.path("dog").rmdir()
    runs.forget_pictures("dog")
    assert not folder.exists()


@pytest.mark.parametrize(("pictures", "message"), [([], "there are no pictures"), (["x.svg"], "x.svg is no picture")])
def test_what_cannot_be_learnt_from(runs: Runs, pictures: list[str], message: str) -> None:
    with pytest.raises(SVDiffError, match=message):
        runs.keep_pictures("dog", pictures)
    assert not list(runs.path("dog").with_name(".pictures").iterdir()) if pictures else True


def test_a_run_is_resumed_with_its_own_settings(runs: Runs, picture: str) -> None:
    with pytest.raises(SVDiffError, match="there is no run called 'dog'"):
        runs.to_resume("dog")
    from svdiff.outputs import write_run_file

    runs.path("dog").mkdir()
    folder = runs.keep_pictures("dog", [picture])
    write_run_file(runs.path("dog"), "train", {**vars(TrainConfig("miniature", seed=7)), "of_a_later_version": 1})
    config = runs.to_resume("dog")
    assert (config.seed, config.resume_from_checkpoint) == (7, "latest")
    assert (config.output_dir, config.instance_data_dir) == (str(runs.path("dog")), str(folder))
    write_run_file(runs.path("dog"), "edit", {"image": "x.png"})
    with pytest.raises(SVDiffError, match="dog is no training run"):
        runs.to_resume("dog")


def test_what_a_server_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SVDiffError, match=rf"port {port} .* choose another with --port"):
            ui(UIConfig(output_dir=str(tmp_path / "runs"), port=port))
    with pytest.raises(SVDiffError, match="port 99999 is none"):
        ui(UIConfig(output_dir=str(tmp_path / "runs"), port=99999))
    (tmp_path / "file").touch()
    with pytest.raises(SVDiffError, match="cannot write"):
        ui(UIConfig(output_dir=str(tmp_path / "file" / "runs")))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SVDiffError, match=r'pip install "svdiff-kernels\[ui\]"'):
        ui(UIConfig(output_dir=str(tmp_path / "runs")))
