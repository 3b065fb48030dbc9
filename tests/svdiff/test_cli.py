"""The command line as people meet it: in a process of its own, with mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from svdiff.outputs import RUN_FILE

from svdiff_kernels.leases import lease_of


def svdiff_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "svdiff.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)


def environment() -> dict[str, str]:
    """Ours, without what these tests do against noise: the command has to be quiet by itself."""
    noise = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
    return {k: v for k, v in os.environ.items() if k not in noise} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, base: Path, pictures: Path) -> Path:
    """A folder with good and bad material."""
    place = tmp_path_factory.mktemp("cli")
    shutil.copytree(base, place / "base")
    shutil.copytree(pictures, place / "pictures")
    (place / "empty").mkdir()
    (place / "unreadable").mkdir()
    (place / "unreadable" / "photo.png").write_bytes(b"no picture")
    (place / "earlier").mkdir()
    (place / "earlier" / RUN_FILE).write_text("{}")

    for name, value in (("other", 1.0), ("nan", float("nan")), ("inf", float("inf"))):
        shutil.copytree(base, place / name)
        (weights,) = (place / name / "unet").glob("*.safetensors")
        tensors = load_file(weights)
        tensors["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = value
        save_file(tensors, weights, {"format": "pt"})
    shutil.copytree(base, place / "gone")
    next((place / "gone" / "unet").glob("*.safetensors")).unlink()

    from tiny import tiny_unet

    (shifts,) = svdiff.attach(tiny_unet(), cache=False).save_weights(place / "shifts")
    shutil.copytree(place / "shifts", place / "nan_shifts")
    tensors = load_file(shifts)
    tensors["conv_in.delta"][1] = float("nan")
    save_file(tensors, place / "nan_shifts" / shifts.name)
    return place


TRAIN = {
    "pretrained_model_name_or_path": "base",
    "instance_data_dir": "pictures",
    "instance_prompt": "a sks dog",
    "output_dir": "out",
    "max_train_steps": "12",
    "report_to": "none",
}
DRAW = {
    "pretrained_model_name_or_path": "base",
    "prompt": "a sks dog",
    "output_dir": "out",
    "num_inference_steps": "2",
}
PATHS = {"pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "output_dir", "spectral_shifts_ckpt"}

MISTAKES: dict[str, tuple[str, dict[str, str], str]] = {
    "no pictures": ("train", {"instance_data_dir": "empty"}, "no pictures in"),
    "no folder": ("train", {"instance_data_dir": "nowhere"}, "no picture folder"),
    "unreadable picture": ("train", {"instance_data_dir": "unreadable"}, "photo.png"),
    "wrong resolution": ("train", {"resolution": "30"}, "resolution 30"),
    "empty prompt": ("train", {"instance_prompt": ""}, "instance_prompt is empty"),
    "missing weights": ("train", {"pretrained_model_name_or_path": "gone"}, "cannot load the model"),
    "no model": ("generate", {"pretrained_model_name_or_path": "empty"}, "model_index.json"),
    "NaN in a weight": ("train", {"pretrained_model_name_or_path": "nan"}, "mid_block.resnets.0.conv1.weight"),
    "inf in a weight": ("generate", {"pretrained_model_name_or_path": "inf"}, "mid_block.resnets.0.conv1.weight"),
    "not writable": ("train", {"output_dir": "base/model_index.json/out"}, "cannot write"),
    "holds a run": ("train", {"output_dir": "earlier"}, "already holds a run"),
    "loss not finite": ("train", {"learning_rate": "1e30", "max_grad_norm": "0"}, "the loss became"),
    "unknown flag": ("train", {"learning_rat": "1"}, "--learning_rat"),
    "no number": ("train", {"learning_rate": "fast"}, "learning_rate"),
    "empty prompt to draw": ("generate", {"prompt": " "}, "prompt"),
    "another base": (
        "generate",
        {"spectral_shifts_ckpt": "shifts", "pretrained_model_name_or_path": "other"},
        "mid_block.resnets.0.conv1.delta",
    ),
    "NaN in a delta": ("generate", {"spectral_shifts_ckpt": "nan_shifts"}, "conv_in.delta"),
    "no delta": ("generate", {"spectral_shifts_ckpt": "nowhere"}, "no delta file"),
    "drawing into a run": ("generate", {"output_dir": "earlier"}, "already holds a run"),
}


def flags(place: Path, settings: dict[str, str]) -> list[str]:
    values = {name: str(place / value) if name in PATHS else value for name, value in settings.items()}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


# Imports are most of a command's seconds: this process imports once, and forks for each command.
_FORKER = """
import json, os, sys
from svdiff import cli
cli._quieten_libraries()
import accelerate, svdiff.train, svdiff.generate, svdiff.pipelines
svdiff.pipelines.load_pipeline(sys.argv[2])  # imports what loading needs
for name, argv in json.load(sys.stdin).items():
    if (child := os.fork()) == 0:
        for stream, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"{sys.argv[1]}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        code = 1  # of a traceback
        try:
            code = cli.main(argv)
        except SystemExit as exit:
            code = exit.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    with open(f"{sys.argv[1]}/{name}.code", "w") as file:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=file)
"""


def arguments_of(place: Path, name: str) -> list[str]:
    command, changes, _ = MISTAKES[name]
    return [command, *flags(place, (TRAIN if command == "train" else DRAW) | changes)]


@pytest.fixture(scope="module")
def outcomes(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each mistake's output and exit code."""
    folder = tmp_path_factory.mktemp("outcomes")
    commands = json.dumps({name: arguments_of(place, name) for name in MISTAKES})
    subprocess.run(
        [sys.executable, "-c", _FORKER, folder, place / "base"],
        input=commands,
        text=True,
        check=True,
        env=environment(),
    )
    return folder


def check_complaint(name: str, code: int, stdout: str, stderr: str) -> None:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("svdiff: error: ")
    assert MISTAKES[name][2] in lines[0]
    assert "Traceback" not in stdout
    assert code == 2


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, outcomes: Path) -> None:
    said = [(outcomes / f"{name}.{kind}").read_text() for kind in ("code", "stdout", "stderr")]
    check_complaint(name, int(said[0]), *said[1:])


@pytest.mark.parametrize("name", ["no pictures", "missing weights", "unknown flag"])
def test_a_mistake_is_one_line_imports_included(place: Path, name: str) -> None:
    run = svdiff_command(*arguments_of(place, name))
    check_complaint(name, run.returncode, run.stdout, run.stderr)


@pytest.mark.usefixtures("outcomes")
def test_mistakes_write_nothing(place: Path) -> None:
    expected = {"base", "pictures", "empty", "unreadable", "earlier", "other", "nan", "inf", "gone", "shifts"}
    assert {p.name for p in place.iterdir()} == expected | {"nan_shifts"}
    assert [p.name for p in (place / "earlier").iterdir()] == [RUN_FILE]
    assert not list((place / "empty").iterdir())


def test_train_then_generate(place: Path, tmp_path: Path) -> None:
    out = {"output_dir": str(tmp_path / "run"), "max_train_steps": "3"}
    run = svdiff_command("train", *flags(place, TRAIN | out), "--random_flip", "--no_cache_latents")
    assert (run.returncode, run.stderr) == (0, "")
    assert "Training" in run.stdout
    assert "shifts" in run.stdout.splitlines()[-1]
    drawing = DRAW | {"output_dir": str(tmp_path / "drawn"), "spectral_shifts_ckpt": str(tmp_path / "run")}
    del drawing["prompt"]
    run = svdiff_command("generate", *flags(place, drawing), "--prompt", "a sks dog", "a dog")
    assert (run.returncode, run.stderr) == (0, "")
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 3
    for picture in (tmp_path / "drawn").glob("0*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image).shape == (16, 16, 3)


def test_a_run_that_is_told_to_end_leaves_nothing(place: Path, tmp_path: Path) -> None:
    endless = TRAIN | {"output_dir": str(tmp_path / "run"), "max_train_steps": "100000"}
    command = [sys.executable, "-m", "svdiff.cli", "train", *flags(place, endless)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        while not list(tmp_path.glob(".run.partial-*")):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr == b""
    assert not [p for p in tmp_path.iterdir() if p.name != "factor-cache"]


def test_help_is_quick_and_lists_commands() -> None:
    start = time.perf_counter()
    run = svdiff_command("--help")
    assert time.perf_counter() - start < 2  # torch alone takes longer
    assert run.returncode == 0
    for command in ("train", "generate", "demo", "cache", "info"):
        assert f"\n    {command} " in run.stdout


def test_flags_come_with_their_help() -> None:
    run = svdiff_command("train", "--help")
    assert run.returncode == 0
    for flag in ("--learning_rate_1d", "--prior_generation_scheduler_type", "--with_prior_preservation", "--targets"):
        assert flag in run.stdout


@pytest.mark.parametrize("arguments", [["frobnicate"], []])
def test_no_such_command(arguments: list[str]) -> None:
    run = svdiff_command(*arguments)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("svdiff: error: ")


def test_cache_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unet: Any
) -> None:
    from svdiff.cli import main

    monkeypatch.setenv("SVDIFF_CACHE", str(tmp_path))

    def said(*arguments: str) -> tuple[int, str, str]:
        code = main(["cache", *arguments])
        return code, *capsys.readouterr()

    svdiff.attach(unet, targets="^conv_(in|out)$")
    capsys.readouterr()
    assert said("path") == (0, f"{tmp_path}\n", "")
    assert said("ls")[1].splitlines()[-1].startswith("2 decompositions")
    assert "sound" in said("verify")[1]
    assert said("prune") == (2, "", "svdiff: error: prune needs max_bytes: how much may stay\n")
    victim = next(tmp_path.rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-3])
    code, _, complaint = said("verify")
    assert code == 2
    assert victim.name in complaint
    lease_of.cache_clear()  # as if this process, which has them mapped, were gone
    assert said("prune", "--max_bytes", "0")[0] == 0
    assert said("--action", "ls")[1].startswith("0 decompositions")


def test_info_command(capsys: pytest.CaptureFixture[str]) -> None:
    from svdiff.cli import main

    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    from svdiff import cli, info

    def interrupted(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "info", interrupted)
    assert cli.main(["info"]) == 130
