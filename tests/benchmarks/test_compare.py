"""Two result files are compared by ratios: absolute seconds of a shared machine say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare


def write(path: Path, seconds: float, *, machine: float = 1.0, subject: str = "step", peak: int | None = None) -> Path:
    """A result file where our step took so long on a machine so slow; the rivals take 1.0, 4.0 and 0.8 seconds."""
    taken = {"svdiff": seconds, "lora": 1.0, "naive": 4.0, "frozen": 0.8, "A/A control": seconds}
    lines: list[dict[str, Any]] = [
        {"level": "unet", "subject": subject, "name": name, "p50": machine * s, "ratio_p50": s / seconds}
        for name, s in taken.items()
    ]
    lines[0]["peak_bytes"] = peak
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_a_slower_machine_is_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", 1.0), write(tmp_path / "b", 1.0, machine=3.0)
    assert compare.main([str(a), str(b)]) == 0
    assert "0 of 1 regressed" in capsys.readouterr().out


@pytest.mark.parametrize(("share", "code"), [(0.15, 1), (0.05, 0), (-0.15, 0)])
def test_a_slowdown_beyond_the_threshold_is_one(tmp_path: Path, share: float, code: int) -> None:
    a, b = write(tmp_path / "a", 1.0), write(tmp_path / "b", 1.0 + share, machine=0.5)
    assert compare.main([str(a), str(b)]) == code


def test_what_takes_no_time_cannot_regress_by_much(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 1.0, machine=1e-5), write(tmp_path / "b", 1.5, machine=1e-5)
    assert compare.main([str(a), str(b)]) == 0
    assert compare.main([str(a), str(b), "--absolute", "1e-6"]) == 1


def test_more_memory_is_a_regression_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", 1.0, peak=100), write(tmp_path / "b", 1.0, peak=120)
    assert compare.main([str(a), str(b)]) == 1
    assert "memory +20.0%" in capsys.readouterr().out


def test_one_regression_among_many_subjects_is_enough(tmp_path: Path) -> None:
    files = []
    for name, seconds in (("a", 1.0), ("b", 1.3)):
        parts = [write(tmp_path / "p", 1.0, subject="fine"), write(tmp_path / "q", seconds, subject="slow")]
        files.append(tmp_path / name)
        files[-1].write_text("".join(part.read_text() for part in parts))
    assert compare.main([str(file) for file in files]) == 1


@pytest.mark.parametrize("content", ["no json", '{"level": "unet"}', "[1]"])
def test_what_is_no_result_file_is_named(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write(tmp_path / "good", 1.0), tmp_path / "bad"
    bad.write_text(content)
    assert compare.main([str(good), str(bad)]) == 2
    assert "line 1, is no result" in capsys.readouterr().err


def test_files_without_a_common_subject_cannot_be_compared(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 1.0), write(tmp_path / "b", 1.0, subject="other")
    assert compare.main([str(a), str(b)]) == 2
    assert compare.main([str(a), str(tmp_path / "absent")]) == 2


def test_different_devices_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = write(tmp_path / "cpu", 1.0)
    lines = [json.loads(line) for line in cpu.read_text().splitlines()]
    gpus = []
    for name in ("H100", "H200"):
        gpus.append(tmp_path / name)
        gpus[-1].write_text("\n".join(json.dumps({**line, "device": "cuda", "gpu": name}) for line in lines))
    for a, b in ((cpu, gpus[0]), (gpus[0], gpus[1])):
        assert compare.main([str(a), str(b)]) == 2
        assert "no subject of one device in common" in capsys.readouterr().err
    assert compare.main([str(gpus[0]), str(gpus[0])]) == 0
