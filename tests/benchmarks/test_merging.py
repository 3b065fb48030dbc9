"""What a merge takes, at real sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import merging


def test_sizes_are_those_of_stable_diffusion() -> None:
    shapes = [tuple(shape) for shape in merging._shapes()]
    assert len(shapes) == 32 and {columns for _, columns in shapes} == {768}
    assert [sum(rows == width for rows, _ in shapes) for width in (320, 640, 1280)] == [10, 10, 12]


def test_a_line_is_printed_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merging, "_CAPTIONS", 12)
    monkeypatch.setattr(merging, "_LENGTH", 10)
    monkeypatch.setattr("sys.argv", ["merging", "--rounds", "1", "--output", str(tmp_path / "line.jsonl")])
    assert merging.main() == 0
    line = json.loads(capsys.readouterr().out)
    assert line == json.loads((tmp_path / "line.jsonl").read_text())
    assert line["layers"] == 32 and line["captions"] == 12 and "commit" in line
    assert line["seconds"].keys() == {"summary", "weights exactly", "weights by least squares", "shifts"}
    assert all(0 <= seconds < 60 for seconds in line["seconds"].values())
