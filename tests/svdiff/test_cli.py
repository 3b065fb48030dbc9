"""The command line as people meet it: in a process of its own, with mistakes."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
from PIL import Image
from processes import environment
from safetensors.torch import load_file, save_file
from svdiff.outputs import RUN_FILE, write_run_file

from svdiff_kernels.leases import lease_of


def svdiff_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "svdiff.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=quiet_environment(), timeout=240)


def quiet_environment() -> dict[str, str]:
    """Ours, without what these tests do against noise: the command has to be quiet by itself; and without a token."""
    others = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_TOKEN")
    ours = {"HF_HUB_OFFLINE": "1", "HF_TOKEN_PATH": "/nowhere"}
    return {name: value for name, value in environment().items() if name not in others} | ours


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, base: Path, pictures: Path) -> Path:
    """A folder with good and bad material."""
    place = tmp_path_factory.mktemp("cli")
    shutil.copytree(base, place / "base")
    shutil.copytree(pictures, place / "pictures")
    (place / "empty").mkdir()
    (place / "unreadable").mkdir()
    (place / "unreadable" / "photo.png").write_bytes(b"no picture")
    for name, results in (("earlier", {"loss": 0.5}), ("begun", {})):
        (place / name).mkdir()
        write_run_file(place / name, "train", {}, **results)
    subjects = [
        {"instance_data_dir": str(place / name), "instance_prompt": f"a {name}"} for name in ("pictures", "empty")
    ]
    for name, entries in (("one.json", subjects[:1]), ("two.json", subjects), ("wrong.json", [{"class_promt": "a"}])):
        (place / name).write_text(json.dumps(entries))
    for name, settings in SETTINGS.items():
        (place / name).write_text(settings)

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
SETTINGS = {
    "unknown.yaml": "seed: 3\nlearning_rat: 1\n",
    "nested.yaml": "seed:\n  value: 3\n",
    "list.yaml": "- seed\n",
    "broken.yaml": "seed: [3\n",
    "wrong.yaml": "mixed_precision: fp64\n",
}
PATHS = {"pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "output_dir", "spectral_shifts_ckpt"}
PATHS |= {"concepts_list", "config"}
CLASSES = {"with_prior_preservation": "True", "class_prompt": "a dog", "num_class_images": "200"}
MIXED: dict[str, str | None] = {"cut_mix_probability": "0.6", "instance_data_dir": None, "instance_prompt": None}

MISTAKES: dict[str, tuple[str, Mapping[str, str | None], str]] = {
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
    "has not ended": ("train", {"output_dir": "begun"}, "--resume_from_checkpoint latest"),
    "no such checkpoint": ("train", {"output_dir": "begun", "resume_from_checkpoint": "checkpoint-3"}, "checkpoint-3"),
    "contradiction": ("train", {"dataset_name": "x"}, "instance_data_dir and dataset_name exclude each other"),
    "contradiction of methods": ("train", {"method": "lora", "rank": "4"}, "rank is of method svdiff"),
    "something missing": ("train", {"with_prior_preservation": "True"}, "needs a class_prompt"),
    "no token": ("train", {"push_to_hub": "True"}, "hf auth login"),
    "unreadable class picture": ("train", CLASSES | {"class_data_dir": "unreadable"}, "photo.png"),
    "one subject to mix": ("train", MIXED | {"concepts_list": "one.json"}, "has one concept"),
    "a subject without pictures": ("train", MIXED | {"concepts_list": "two.json"}, "no pictures in"),
    "a wrong subject": ("train", MIXED | {"concepts_list": "wrong.json"}, "class_promt"),
    "unknown setting": ("train", {"config": "unknown.yaml"}, "there is no setting 'learning_rat'"),
    "nested setting": ("train", {"config": "nested.yaml"}, "seed must be a value, or a list of values"),
    "no settings": ("train", {"config": "list.yaml"}, "must hold settings"),
    "broken settings": ("train", {"config": "broken.yaml"}, "cannot read the settings"),
    "settings that are not there": ("train", {"config": "no.yaml"}, "no.yaml: No such file"),
    "wrong setting": ("train", {"config": "wrong.yaml"}, "mixed_precision"),
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


def flags(place: Path, settings: Mapping[str, str | None]) -> list[str]:
    """Those that are not None."""
    given = {name: value for name, value in settings.items() if value is not None}
    values = {name: str(place / value) if name in PATHS else value for name, value in given.items()}
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
    return [command, *flags(place, {**(TRAIN if command == "train" else DRAW), **changes})]


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
        env=quiet_environment(),
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
    expected |= {"nan_shifts", "begun", "one.json", "two.json", "wrong.json", *SETTINGS}
    assert {p.name for p in place.iterdir()} == expected
    for name in ("earlier", "begun"):
        assert [p.name for p in (place / name).iterdir()] == [RUN_FILE]
    assert [p.name for p in (place / "unreadable").iterdir()] == ["photo.png"]
    assert not list((place / "empty").iterdir())


def test_train_then_generate(place: Path, tmp_path: Path) -> None:
    out = {"output_dir": str(tmp_path / "run"), "max_train_steps": "3"}
    run = svdiff_command("train", *flags(place, TRAIN | out), "--random_flip", "--no_cache_latents")
    assert (run.returncode, run.stderr) == (0, "")
    assert "Training" in run.stdout
    assert "numbers" in run.stdout.splitlines()[-1]
    drawing = DRAW | {"output_dir": str(tmp_path / "drawn"), "spectral_shifts_ckpt": str(tmp_path / "run")}
    del drawing["prompt"]
    run = svdiff_command("generate", *flags(place, drawing), "--prompt", "a sks dog", "a dog")
    assert (run.returncode, run.stderr) == (0, "")
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 3
    for picture in (tmp_path / "drawn").glob("0*.png"):
        with Image.open(picture) as image:
            assert np.asarray(image).shape == (16, 16, 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_run_that_is_told_to_end(place: Path, tmp_path: Path, number: int, code: int) -> None:
    """While it prepares, it leaves nothing; while it trains, a checkpoint and a word on how to go on."""
    run = tmp_path / "run"
    endless = TRAIN | {"output_dir": str(run), "max_train_steps": "100000", "checkpointing_steps": "100000"}
    drawing = CLASSES | {"sample_batch_size": "200", "prior_generation_num_inference_steps": "999"}

    def told_while(doing: str, **more: str) -> tuple[str, str]:
        command = [sys.executable, "-m", "svdiff.cli", "train", *flags(place, endless | more)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet_environment(), bufsize=0
        ) as process:
            assert process.stdout is not None
            said = b""
            while doing not in said.decode(errors="replace"):
                assert process.poll() is None
                said += process.stdout.read(1)
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
        assert process.returncode == code
        return output.decode(), errors.decode()

    assert told_while("Drawing", **drawing)[1] == ""
    assert not [p for p in tmp_path.iterdir() if p.name != "factor-cache"]
    output, errors = told_while("Training")
    assert errors == ""
    assert "--resume_from_checkpoint latest goes on from there" in output
    (checkpoint,) = run.glob("checkpoint-*")
    assert load_file(checkpoint / "spectral_shifts.safetensors")


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


@pytest.mark.parametrize("name", ["random_flip", "hflip"])
def test_a_flag_by_the_name_that_another_script_has(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """On the command line and in a file."""
    from svdiff import cli

    found: list[svdiff.TrainConfig] = []
    monkeypatch.setattr(importlib.import_module("svdiff.train"), "train", found.append)
    base = ["train", "--pretrained_model_name_or_path", "base"]
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: true\nnoaug: no\n")
    assert cli.main([*base, f"--{name}"]) == cli.main([*base, "--config", str(file)]) == 0
    assert cli.main([*base, "--config", str(file), f"--{name}", "no"]) == 0
    assert [config.random_flip for config in found] == [True, True, False]
    file.write_text("help: true\n")
    assert cli.main([*base, "--config", str(file)]) == 2
    assert "there is no setting 'help'" in capsys.readouterr().err


def test_settings_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Those on the command line win, wherever they stand; a word means what it says, whatever YAML makes of it."""
    from svdiff import cli

    found: list[svdiff.TrainConfig] = []
    monkeypatch.setattr(importlib.import_module("svdiff.train"), "train", found.append)
    file = tmp_path / "run.yaml"
    file.write_text("""
        pretrained_model_name_or_path: base  # a comment
        instance_data_dir: "pictures of: a dog"
        instance_prompt: -sks- dog
        validation_prompt: [a dog, "a cat, too"]
        class_prompt:
          - a dog
        concepts_list:
        hub_model_id: null
        cut_mix_prompts: []
        mixed_precision: no
        learning_rate: 1e-3
        lr_step_rules: 1:10
        seed: 010
        random_flip: true
        center_crop: no
        cache_latents: false
    """)
    assert cli.main(["train", "--random_flip", "False", "--config", str(file), "--learning_rate=2e-3"]) == 0
    (config,) = found
    expected = svdiff.TrainConfig(
        "base",
        "pictures of: a dog",
        instance_prompt="-sks- dog",
        validation_prompt=["a dog", "a cat, too"],
        class_prompt=["a dog"],
        mixed_precision="no",
        learning_rate=2e-3,
        lr_step_rules="1:10",
        seed=10,
        random_flip=False,
        center_crop=False,
        cache_latents=False,
    )
    assert config == expected
    assert cli.main(["train", f"--config={file}"]) == 0
    assert found[1] == replace(expected, learning_rate=1e-3, random_flip=True)
    file.write_bytes(b"\xff\xfe\x00")
    assert cli.main(["train", f"--config={file}"]) == 2
    assert "cannot read the settings" in capsys.readouterr().err
