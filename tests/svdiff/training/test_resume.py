"""Going on after a stop, to the bit as if there had been none; and what is left when a run fails."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import alone, ended, fork, run_alone
from safetensors import safe_open
from safetensors.torch import load_file
from svdiff import TrainConfig, cli, sampling, termination, train
from svdiff.outputs import RUN_FILE
from svdiff.pipelines import load_pipeline
from svdiff.training import state, validation
from svdiff.training.dreambooth import DreamBooth
from svdiff.training.loop import Loop
from tiny import tiny_pipeline, tiny_unet

from svdiff_kernels import SVDiffError

TRAIN = sys.modules["svdiff.train"]  # under that name the package has the function
SHIFTS = "spectral_shifts.safetensors"


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, checkpointing_steps=4)


@contextmanager
def told_at(step: int, number: int = signal.SIGINT) -> Iterator[None]:
    """Within, a signal comes while the batch of a step is drawn (the first, if batches are accumulated)."""
    draw = DreamBooth.draw

    def draw_and_tell(self: DreamBooth, batch: int) -> Any:
        if batch == step - 1:
            signal.raise_signal(number)
        return draw(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DreamBooth, "draw", draw_and_tell)
        yield


def interrupt(config: TrainConfig, *, batch: int) -> None:
    """Train up to a batch, in whose step Ctrl-C comes."""
    with told_at(batch), pytest.raises(KeyboardInterrupt):
        train(config)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def learnt(folder: Path) -> dict[str, tuple[dict[str, str] | None, dict[str, Any]]]:
    """Metadata and tensors of every file of a run, its training states excepted; as bytes, for comparing."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        if path.name != state.STATE_FILE:
            with safe_open(path, "pt") as file:  # whose metadata come in any order
                tensors = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
                found[str(path.relative_to(folder))] = (file.metadata(), tensors)
    assert found
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "accumulated": {
        "gradient_accumulation_steps": 2, "train_batch_size": 2, "random_flip": True, "train_text_encoder": True,
        "text_encoder_lr": 3e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 2,
    },
    "fp16": {
        "mixed_precision": "fp16", "use_ema": True, "ema_decay": 0.9, "lr_scheduler": "piecewise_constant",
        "lr_step_rules": "1:1,0.3:3,0.1",
    },
    "bf16": {
        "mixed_precision": "bf16", "cache_latents": False, "one_dim": "none", "lr_scheduler": "polynomial",
        "lr_power": 2.0,
    },
    "classes": {"with_prior_preservation": True, "class_prompt": ["a dog"], "num_class_images": 3, "noise_offset": 0.1},
    "sizes": {
        "size_augmentation": True, "train_batch_size": 3, "random_flip": True, "cache_latents": False,
        "with_prior_preservation": True, "class_prompt": ["a dog"], "num_class_images": 2,
    },
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0, "learning_rate_1d": 1.0},
    "8 bit": {"use_8bit_adam": True},
    "lora": {"method": "lora", "train_text_encoder": True, "use_ema": True},
    "full": {"method": "full", "use_ema": True, "learning_rate": 1e-4, "lr_scheduler": "linear"},
    "full in bf16": {"method": "full", "mixed_precision": "bf16", "train_text_encoder": True, "learning_rate": 1e-4},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_as_if_it_had_never_stopped(config: TrainConfig, tmp_path: Path, variant: str) -> None:
    """Everything that is learnt, and all that the last checkpoint knows, to the bit."""
    config = replace(config, **VARIANTS[variant])
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    interrupt(config, batch=2 * config.gradient_accumulation_steps)
    assert [path.name for path in state.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    resumed = train(replace(config, resume_from_checkpoint="latest"))
    assert resumed.losses == whole.losses
    found, expected = (state.load(tmp_path / name / "checkpoint-4") for name in ("run", "whole"))
    assert found.values == expected.values
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert learnt(tmp_path / "run") == learnt(tmp_path / "whole")


def test_a_checkpoint_holds_what_has_been_learnt(config: TrainConfig, tmp_path: Path) -> None:
    """Ready for use: of a run with an exponential mean, that."""
    for ema in (False, True):
        folder = tmp_path / f"ema {ema}"
        train(replace(config, output_dir=str(folder), use_ema=ema, ema_decay=0.5))
        end, checkpoint = load_file(folder / SHIFTS), load_file(folder / "checkpoint-4" / SHIFTS)
        assert all(torch.equal(checkpoint[key], tensor) for key, tensor in end.items())
    last, mean = (load_file(tmp_path / f"ema {ema}" / SHIFTS) for ema in (False, True))
    assert not any(torch.equal(mean[key], tensor) for key, tensor in last.items() if tensor.any())


def test_stopping_says_how_to_go_on(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with told_at(3, signal.SIGTERM), pytest.raises(SystemExit, match="143"):
        train(config)
    assert "stopped after step 3: --resume_from_checkpoint latest goes on" in capsys.readouterr().out
    with pytest.raises(SVDiffError, match="has not ended: pass --resume_from_checkpoint latest"):
        train(config)
    train(replace(config, resume_from_checkpoint="latest"))
    assert "going on from checkpoint-3\n" in capsys.readouterr().out


def test_being_told_in_the_last_step_loses_nothing(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    interrupt(config, batch=4)
    assert train(replace(config, resume_from_checkpoint="latest")).losses == whole.losses
    assert learnt(tmp_path / "run")[SHIFTS] == learnt(tmp_path / "whole")[SHIFTS]


def test_being_told_while_results_are_written_loses_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TRAIN, "write_model_card", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, checkpointing_steps=100))
    assert names(tmp_path / "run") == [RUN_FILE, SHIFTS]
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["steps"] == 4


def test_being_told_while_pictures_are_drawn(config: TrainConfig, tmp_path: Path) -> None:
    """The rest is not drawn: who sends a signal does not wait for ever."""
    config = replace(config, validation_prompt=["a dog"], validation_steps=2, num_validation_images=3)
    drawn = []

    def draw(*_: Any, **__: Any) -> Iterator[Image.Image]:
        for _ in range(3):
            drawn.append(len(drawn))
            signal.raise_signal(signal.SIGINT)
            yield Image.new("RGB", (8, 8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "sample", draw)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert drawn == [0]
    assert names(tmp_path / "run") == ["checkpoint-2", RUN_FILE]
    train(replace(config, resume_from_checkpoint="latest"))
    assert names(tmp_path / "run" / "validation") == ["step_000004.png"]


def test_off_the_main_thread(config: TrainConfig) -> None:
    """As a server of a user interface calls it: signals are the main thread's, and stay so."""
    done = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: done.append(train(config)))
    thread.start()
    thread.join()
    assert done[0].steps == 4
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_new_rates_are_used(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a resumed run too, though its optimiser's state has the old ones."""
    interrupt(config, batch=2)
    before = state.load(tmp_path / "run" / "checkpoint-2").tensors
    changes: dict[str, Any] = {"learning_rate": 0.0, "learning_rate_1d": 0.0, "adam_beta1": 1 - 1e-9}
    train(replace(config, resume_from_checkpoint="latest", **changes))
    assert "with other settings: learning_rate 0.001 -> 0.0" in capsys.readouterr().out
    after = state.load(tmp_path / "run" / "checkpoint-4")
    for name in after.values["parameters"]:
        assert torch.equal(after.tensors[f"parameter.{name}"], before[f"parameter.{name}"])
    moments = {name for name in before if name.endswith("exp_avg")}
    for name in moments:  # which hardly move
        torch.testing.assert_close(after.tensors[name], before[name])
    assert moments


def test_an_exponential_mean_that_begins_later(config: TrainConfig, tmp_path: Path) -> None:
    interrupt(config, batch=2)
    train(replace(config, resume_from_checkpoint="latest", use_ema=True, learning_rate=0.0, learning_rate_1d=0.0))
    before = state.load(tmp_path / "run" / "checkpoint-2").tensors
    after = state.load(tmp_path / "run" / "checkpoint-4")
    for name in after.values["parameters"]:
        torch.testing.assert_close(after.tensors[f"ema.{name}"], before[f"parameter.{name}"])


@pytest.mark.parametrize(("before", "after"), [("no", "fp16"), ("fp16", "no")])
def test_another_precision(config: TrainConfig, before: Any, after: Any) -> None:
    interrupt(replace(config, mixed_precision=before), batch=2)
    assert train(replace(config, mixed_precision=after, resume_from_checkpoint="latest")).steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "prodigy"}, "checkpoint-2 is of a run with optimizer adamw"),
        ({"method": "lora"}, "checkpoint-2 is of a run with method svdiff"),
        ({"use_8bit_adam": True}, "checkpoint-2 is of a run with use_8bit_adam False"),
        ({"rank": 2}, r"checkpoint-2 is of a run that trained something else \(rank None -> 2\)"),
        ({"train_text_encoder": True}, r"something else \(train_text_encoder False -> True\)"),
        ({"max_train_steps": 1}, "checkpoint-2 is beyond the 1 steps asked for"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "no such checkpoint; in .*run there is checkpoint-2"),
        ({"pretrained_model_name_or_path": "nowhere/nothing"}, "nowhere/nothing"),
    ],
)
def test_what_cannot_be_gone_on_with(
    config: TrainConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """And the run is as it was."""
    interrupt(config, batch=2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(SVDiffError, match=message):
        train(replace(config, **{"resume_from_checkpoint": "latest", **changes}))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert train(replace(config, resume_from_checkpoint="latest")).steps == 4


def test_another_model(config: TrainConfig, tmp_path: Path) -> None:
    pipeline = tiny_pipeline_with_other_widths(tmp_path)
    interrupt(config, batch=2)
    with pytest.raises(SVDiffError, match=r"trained something else .*pretrained_model_name_or_path"):
        train(replace(config, pretrained_model_name_or_path=pipeline, resume_from_checkpoint="latest"))


def tiny_pipeline_with_other_widths(folder: Path) -> str:
    pipeline = tiny_pipeline(folder)
    pipeline.register_modules(unet=tiny_unet(block_out_channels=(8, 24)))
    pipeline.save_pretrained(folder / "other")
    return str(folder / "other")


def test_a_finished_run_takes_more_steps(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(replace(config, max_train_steps=6, output_dir=str(tmp_path / "whole")))
    train(config)
    more = train(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))
    assert more.losses == whole.losses
    assert learnt(tmp_path / "run")[SHIFTS] == learnt(tmp_path / "whole")[SHIFTS]
    again = train(replace(config, max_train_steps=6, resume_from_checkpoint="latest"))
    assert again.losses == whole.losses


def test_an_earlier_checkpoint_of_a_run(config: TrainConfig, tmp_path: Path) -> None:
    """Later ones are of a course that was given up."""
    config = replace(config, checkpointing_steps=1, checkpoints_total_limit=3)
    whole = train(config)
    assert [n for n in names(tmp_path / "run") if "-" in n] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    other = replace(config, resume_from_checkpoint="checkpoint-2", learning_rate=0.02)
    with told_at(3), pytest.raises(KeyboardInterrupt):
        train(other)
    assert [n for n in names(tmp_path / "run") if "-" in n] == ["checkpoint-2", "checkpoint-3"]
    losses = train(replace(other, resume_from_checkpoint="latest")).losses
    assert losses[:3] == whole.losses[:3] and losses[3] != whole.losses[3]


def test_a_checkpoint_of_another_run(config: TrainConfig, tmp_path: Path) -> None:
    whole = train(replace(config, checkpointing_steps=2))
    elsewhere = replace(config, output_dir=str(tmp_path / "elsewhere"))
    result = train(replace(elsewhere, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")))
    assert result.losses == whole.losses
    assert learnt(tmp_path / "run")[SHIFTS] == learnt(tmp_path / "elsewhere")[SHIFTS]


def test_where_nothing_is_yet_a_run_begins(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(replace(config, resume_from_checkpoint="latest")).steps == 4
    assert "starting anew" in capsys.readouterr().out


def diverge(config: TrainConfig, match: str) -> str:
    with pytest.raises(SVDiffError, match=match) as caught:
        train(config)
    return str(caught.value)


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run goes on with a lower rate."""
    config = replace(config, max_train_steps=12, checkpointing_steps=2, max_grad_norm=0.0)
    loss = Loop._loss
    spoilt = [False]

    def spoil(self: Loop, *batch: Any) -> Any:
        # 5 steps in, at the rate that is too high
        high = self._optimizer.param_groups[0]["lr"] > 1e-3
        spoilt[0] = spoilt[0] or (high and len(self._losses) + len(self._pending) == 4)
        return loss(self, *batch) * (float("nan") if high and spoilt[0] else 1.0)

    monkeypatch.setattr(Loop, "_loss", spoil)
    message = diverge(replace(config, learning_rate=1e-2), "the loss became nan at step 5")
    assert "lower learning_rate" in message and "go on from checkpoint-4 with --resume_from_checkpoint" in message
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4", RUN_FILE]
    result = train(replace(config, learning_rate=1e-3, resume_from_checkpoint="latest"))
    assert result.steps == 12 and all(np.isfinite(result.losses))


@pytest.mark.parametrize(("checkpointing", "left"), [(3, ["checkpoint-3", RUN_FILE]), (100, None)])
def test_a_step_that_spoils_what_trains_is_never_saved(
    config: TrainConfig, tmp_path: Path, checkpointing: int, left: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the loss of the step was a number still."""
    step = Loop._take_step

    def spoil(self: Loop) -> None:
        step(self)
        if len(self._losses) + len(self._pending) == 5:
            with torch.no_grad():
                next(iter(self._parameters.values())).view(-1)[3] = float("inf")

    monkeypatch.setattr(Loop, "_take_step", spoil)
    config = replace(config, max_train_steps=6, checkpointing_steps=checkpointing)
    with pytest.raises(SVDiffError, match=r"became (NaN or infinite|nan)"):
        train(config)
    assert (names(tmp_path / "run") if left else left) == left
    assert (tmp_path / "run").exists() == bool(left)
    if left:
        assert state.load(tmp_path / "run" / "checkpoint-3").step == 3


def test_what_ends_up_spoilt_is_not_written(config: TrainConfig, tmp_path: Path, monkeypatch: Any) -> None:
    """By the very last step, after which no loss is looked at."""
    step = Loop._take_step

    def spoil(self: Loop) -> None:
        step(self)
        if len(self._losses) + len(self._pending) == 3:
            with torch.no_grad():
                next(iter(self._parameters.values())).view(-1)[3] = float("nan")

    monkeypatch.setattr(Loop, "_take_step", spoil)
    with pytest.raises(SVDiffError, match="became NaN or infinite at step 4"):
        train(replace(config, checkpointing_steps=100))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = state.save_file, []

    def save_or_fail(tensors: Any, path: Path, metadata: Any) -> None:
        if len(saved) == 2:
            path.write_bytes(b"as much as there was room for")
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(tensors, path, metadata)

    config = replace(config, checkpointing_steps=1)
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    monkeypatch.setattr(state, "save_file", save_or_fail)
    with pytest.raises(SVDiffError, match=r"cannot write .*checkpoint-3: No space left on device"):
        train(config)
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2", RUN_FILE]
    monkeypatch.undo()
    assert train(replace(config, resume_from_checkpoint="latest")).losses == whole.losses


@pytest.mark.parametrize(("module", "what"), [(TRAIN, "write_model_card"), (validation, "save_picture")])
def test_a_full_disk_elsewhere_is_one_line(
    config: TrainConfig, tmp_path: Path, module: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, what, fail)
    with pytest.raises(SVDiffError, match=r"cannot write .*run.*: No space left on device"):
        train(replace(config, checkpointing_steps=2, validation_prompt=["a dog"]))
    assert [path.name for path in state.checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]


def test_what_cannot_be_pushed_is_kept(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(directory: Path, config: TrainConfig) -> str:
        raise SVDiffError("cannot push to the hub")

    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(TRAIN, "push", fail)
    with pytest.raises(SVDiffError, match="cannot push"):
        train(replace(config, push_to_hub=True, checkpointing_steps=100))
    assert names(tmp_path / "run") == ["README.md", RUN_FILE, SHIFTS]


def test_drawn_class_pictures_outlast_a_failure(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what takes longest; but an earlier run is dearer."""
    config = replace(
        config, with_prior_preservation=True, class_prompt=["a dog"], num_class_images=5, sample_batch_size=2
    )
    save, saved = sampling.save_picture, []

    def save_or_fail(image: Image.Image, path: Path) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path)

    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svdiff.training.prior.save_picture", save_or_fail)
        with pytest.raises(KeyboardInterrupt):
            train(config)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.png")}
        assert len(before) == 3
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, output_dir=str(tmp_path / "whole"), overwrite=True))
    assert (tmp_path / "whole" / SHIFTS).exists()
    assert train(replace(config, resume_from_checkpoint="latest")).losses == whole.losses
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert names(tmp_path) == ["factor-cache", "run", "whole"] or names(tmp_path) == ["run", "whole"]


def command_line(tmp_path: Path) -> list[str]:
    """Of a small run, in a process of its own, which has imported what it needs."""
    os.environ["SVDIFF_CACHE"] = str(tmp_path / "cache")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "pictures").mkdir()
    base = tmp_path / "base"
    tiny_pipeline(tmp_path / "tokenizer").save_pretrained(base)
    load_pipeline(str(base))
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    settings = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": tmp_path / "pictures",
        "instance_prompt": "a sks dog",
        "class_prompt": "a dog",
        "with_prior_preservation": True,
        "num_class_images": 5,
        "sample_batch_size": 2,
        "prior_generation_num_inference_steps": 2,
        "use_ema": True,
        "lr_scheduler": "cosine",
        "max_train_steps": 6,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "report_to": "none",
    }
    return ["train", *(f"--{name}={value}" for name, value in settings.items())]


@alone
def test_a_disk_that_is_full_at_a_checkpoint(tmp_path: Path) -> None:
    """By the command line: one line, the last good checkpoint, and a run that goes on when there is room."""
    command = [*command_line(tmp_path), f"--output_dir={tmp_path / 'run'}"]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails, as on a full disk

    def said(*more: str, room: int = resource.RLIM_INFINITY) -> tuple[int, str]:
        def work() -> None:
            with (tmp_path / "said").open("w") as file, redirect_stderr(file):
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
                warnings.simplefilter("ignore")  # of the libraries
                code = cli.main([*command, *more])
            sys.exit(code)

        return ended(fork(work)), (tmp_path / "said").read_text()

    with told_at(3):
        assert said()[0] == 130
    before = names(tmp_path / "run")
    assert before == ["checkpoint-2", "checkpoint-3", "class_images", RUN_FILE]
    code, complaint = said("--resume_from_checkpoint=latest", room=10_000)
    assert code == 2 and len(complaint.splitlines()) == 1, complaint
    assert complaint.startswith("svdiff: error: cannot write") and "checkpoint-4" in complaint, complaint
    assert names(tmp_path / "run") == before
    assert said("--resume_from_checkpoint=latest") == (0, "")
    command[-1] = f"--output_dir={tmp_path / 'whole'}"
    assert said() == (0, "")
    assert learnt(tmp_path / "run") == learnt(tmp_path / "whole")


@pytest.mark.slow
@alone
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    """Of a run that is killed or told to end again and again, wherever it is, and gone on with until it is done."""
    command = command_line(tmp_path)

    def run(folder: Path, *more: str) -> int:
        def work() -> None:
            warnings.simplefilter("ignore")  # of the libraries
            sys.exit(cli.main([*command, f"--output_dir={folder}", *more]))

        return fork(work)

    def drawn() -> int:
        return len(list((folder / "class_images").glob("class_*.png")))

    def newest() -> int:
        return max((int(path.name.split("-")[1]) for path in state.checkpoints(folder)), default=0)

    def finished(folder: Path) -> tuple[Any, ...]:
        pictures = {path.name: path.read_bytes() for path in folder.rglob("*.png")}
        return pictures, json.loads((folder / RUN_FILE).read_text())["loss"], learnt(folder)

    termination.exit_on_signals()  # children are told to end from their first moment on
    whole, folder, chance = tmp_path / "whole", tmp_path / "run", random.Random(0)
    assert ended(run(whole)) == 0
    begun = time.perf_counter()
    assert ended(run(folder)) == 0
    window = time.perf_counter() - begun
    expected = finished(whole)
    assert len(expected[0]) == 5 and len(expected[2]) == 3
    assert finished(folder) == expected

    places: Counter[str] = Counter()
    signals: Counter[int] = Counter()
    while signals.total() < 50:
        how = ["--overwrite"]
        while True:
            before = set(folder.glob(".checkpoint-*"))  # what an earlier one has left, and this may not come to sweep
            process = run(folder, *how)
            number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            aim = chance.choice(["anywhere", "while drawing", "while saving"])
            wanted = chance.randrange(5) if aim == "while drawing" else newest() + chance.randrange(3)
            until = time.perf_counter() + chance.uniform(0, window)
            while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if aim == "anywhere" and time.perf_counter() > until:
                    break
                if aim == "while drawing" and not newest() and drawn() > wanted:
                    break
                if aim == "while saving" and newest() >= wanted and list(folder.glob(".checkpoint-*.partial")):
                    break
                time.sleep(0.0005)
            with suppress(ProcessLookupError):
                os.kill(process, number)
            status = ended(process)
            assert status in (0, -number if number == signal.SIGKILL else 128 + number), (status, aim)
            if status == 0:
                break
            signals[number] += 1
            if set(folder.glob(".checkpoint-*")) - before:
                assert number == signal.SIGKILL
                places["while saving"] += 1
            elif 0 < drawn() < 5:
                places["while drawing"] += 1
            else:
                places["after a checkpoint" if newest() else "before"] += 1
            for path in state.checkpoints(folder):
                assert state.load(path).step == int(path.name.split("-")[1])
            how = ["--resume_from_checkpoint", "latest"]
        assert finished(folder) == expected
        assert names(folder) == names(whole)
        assert not list(tmp_path.glob(".*"))
    # Or they did not hit what they were meant to.
    assert len(places) == 4 and min(places.values()) >= 2, places
    assert min(signals.values()) >= 10, signals


if __name__ == "__main__":
    run_alone()
