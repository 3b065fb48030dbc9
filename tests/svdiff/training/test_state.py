"""Checkpoints: whole or not there, as many as asked for, and nothing lost between saving and loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from svdiff.training import state
from svdiff.training.state import STATE_FILE, State

from svdiff_kernels import SVDiffError


def a_state(step: int, value: float = 0.5) -> State:
    return State(step, {"seed": 3}, {"a": torch.full((3,), value)}, {"losses": [0.1, 1 / 3], "none": None})


def learnt(folder: Path) -> None:
    (folder / "shifts").write_text("learnt")


def save(directory: Path, *steps: int, **how: Any) -> None:
    for step in steps:
        state.save(directory, a_state(step), learnt, **how)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fail(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = state.save(tmp_path, a_state(7), learnt)
    assert names(tmp_path) == ["checkpoint-7"] and names(path) == ["shifts", STATE_FILE]
    found = state.load(path)
    assert (found.step, found.config, found.values) == (7, {"seed": 3}, a_state(7).values)
    assert found.tensors.keys() == {"a"} and torch.equal(found.tensors["a"], torch.full((3,), 0.5))
    found.tensors["a"].zero_()  # ours, not the file's
    assert state.load(path).tensors["a"].sum() == 1.5


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    save(tmp_path, 2, 9, 10, 100)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7.bak").mkdir()
    assert [path.name for path in state.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 9, 10, 100)]


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, [10]), (2, [9, 10]), (3, [2, 9, 10]), (9, [2, 9, 10]), (None, [2, 9, 10])]
)
def test_the_newest_stay(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    save(tmp_path, 2, 9, 10, limit=limit)
    assert [path.name for path in state.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in kept]
    assert len(names(tmp_path)) == len(kept)


def test_of_a_course_that_was_given_up_nothing_stays(tmp_path: Path) -> None:
    """Or the latest would be of that, and the limit would delete the new one."""
    save(tmp_path, 2, 4, 6)
    save(tmp_path, 3, limit=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    save(tmp_path, 2, 4)
    (tmp_path / "checkpoint-4" / "old").touch()
    state.save(tmp_path, a_state(4, 2.0), learnt)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert names(tmp_path / "checkpoint-4") == ["shifts", STATE_FILE]
    assert state.load(tmp_path / "checkpoint-4").tensors["a"].sum() == 6


@pytest.mark.parametrize("where", ["learnt", "state", "sync", "rename"])
def test_what_cannot_be_written_changes_nothing(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2, 4)
    if where == "state":
        monkeypatch.setattr(state, "save_file", fail)
    elif where == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    elif where == "rename":
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda path, to: fail() if path.name.endswith("partial") else rename(path, to)
        )
    with pytest.raises(SVDiffError, match=r"cannot write .*checkpoint-4: No space left on device"):
        state.save(tmp_path, a_state(4, 2.0), fail if where == "learnt" else learnt, limit=1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert state.load(tmp_path / "checkpoint-4").tensors["a"].sum() == 1.5


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        learnt(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.save(tmp_path, a_state(4), interrupted)
    assert names(tmp_path) == []


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    sync, rename = os.fsync, Path.rename

    def record(number: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(number)

    def check(path: Path, to: Path) -> Path:
        assert synced == {"shifts", STATE_FILE, ".checkpoint-2.partial"}
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", check)
    save(tmp_path, 2)
    assert tmp_path.name in synced


def test_what_a_killed_run_leaves_is_swept(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6)
    (tmp_path / ".checkpoint-8.partial").mkdir()
    (tmp_path / ".checkpoint-8.partial" / "half").touch()
    (tmp_path / "checkpoint-4").rename(tmp_path / ".checkpoint-4.replaced")  # its successor was not there yet
    (tmp_path / ".checkpoint-6.replaced").mkdir()  # its successor is
    state.sweep(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert state.load(tmp_path / "checkpoint-4").step == 4
    assert state.load(tmp_path / "checkpoint-6").step == 6


def test_finding_one(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    assert state.find(run, "latest") is None
    with pytest.raises(SVDiffError, match=r"checkpoint-4: no such checkpoint; in .*run there is no checkpoint"):
        state.find(run, "checkpoint-4")
    save(run, 2, 10)
    save(other, 5)
    assert state.find(run, "latest") == run / "checkpoint-10"
    assert state.find(run, "checkpoint-2") == run / "checkpoint-2"
    assert state.find(run, str(other / "checkpoint-5")) == other / "checkpoint-5"
    with pytest.raises(SVDiffError, match="there is checkpoint-2, checkpoint-10"):
        state.find(run, str(other))


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    save(tmp_path, 2)
    file = tmp_path / "checkpoint-2" / STATE_FILE
    whole = file.read_bytes()
    for content in (b"", whole[:40], whole[:-3]):
        file.write_bytes(content)
        with pytest.raises(SVDiffError, match=f"{STATE_FILE} is damaged"):
            state.load(file.parent)
    save_file({"a": torch.zeros(1)}, file, {"version": "0"})
    with pytest.raises(SVDiffError, match="another version"):
        state.load(file.parent)
    save_file({"a": torch.zeros(1)}, file, {"version": "1", "step": "2", "config": "{", "values": "{}"})
    with pytest.raises(SVDiffError, match="damaged"):
        state.load(file.parent)


def test_tensors_in_one_memory_are_saved(tmp_path: Path) -> None:
    """As an 8-bit optimiser's tables are."""
    table = torch.arange(5.0)
    tensors = {"a": table, "b": table, "c": table[1:3], "d": torch.ones(2, 3).T}
    state.save(tmp_path, State(1, {}, tensors, {}), learnt)
    found = state.load(tmp_path / "checkpoint-1").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_any_state_dict_comes_back_as_it_was() -> None:
    content = {
        "state": {0: {"step": torch.tensor(3.0), "moment": torch.randn(2, 3)}, 1: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "beta3": None, "fused": False, "params": [0, 1]}],
        "2": "two",
        2: [],
    }
    tensors, rest = state.flatten("optimizer", content)
    assert set(tensors) == {"optimizer.state.0.step", "optimizer.state.0.moment"}
    again = state.unflatten(tensors, json.loads(json.dumps(rest)))
    assert again.pop("state")[0]["moment"] is content["state"][0]["moment"]  # type: ignore[index]
    del content["state"]
    assert again == content and isinstance(again["param_groups"][0]["betas"], tuple)
