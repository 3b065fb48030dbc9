"""The choice among implementations by measurement."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from svdiff_kernels import SVDiffError, backends
from svdiff_kernels import fastest as module
from svdiff_kernels.fastest import fastest

F16 = torch.float16


def slow(*_: Any) -> str:
    return "slow"


def quick(*_: Any) -> str:
    return "quick"


CANDIDATES = {"a": slow, "b": quick}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was timed, in order; time itself is made up."""
    seen: list[str] = []

    def seconds(run: Callable[[], object]) -> float:
        seen.append(str(run()))
        return {"slow": 2.0, "quick": 1.0}[seen[-1]]

    monkeypatch.setattr(module, "_seconds", seconds)
    monkeypatch.delenv("SVDIFF_AUTOTUNE", raising=False)
    return seen


def arguments(rows: int = 100, columns: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, columns, dtype=dtype), torch.zeros(9, columns)


def test_the_quickest_is_measured_once_and_kept(measured: list[str]) -> None:
    assert fastest("op", CANDIDATES, arguments()) is quick
    assert fastest("op", CANDIDATES, arguments()) is quick
    assert fastest("op", CANDIDATES, arguments(rows=128)) is quick  # in the same power of two
    assert measured == ["slow", "quick"]
    assert list(json.loads(module._path().read_text()).values()) == ["b"]


@pytest.mark.parametrize(
    ("op", "other"),
    [
        ("op", arguments(rows=129)),
        ("op", arguments(columns=8)),
        ("op", arguments(dtype=torch.float16)),
        ("another", arguments()),
        ("op", (*arguments(), True)),
        ("op", (arguments()[0].T.contiguous().T, arguments()[1])),
    ],
    ids=["rows", "columns", "dtype", "op", "flag", "layout"],
)
def test_other_arguments_are_measured_anew(op: str, other: tuple[Any, ...], measured: list[str]) -> None:
    fastest("op", CANDIDATES, arguments())
    fastest(op, CANDIDATES, other)
    assert len(measured) == 4


def test_a_choice_that_is_gone_is_measured_anew(measured: list[str]) -> None:
    fastest("op", CANDIDATES, arguments())
    assert fastest("op", {"a": slow, "c": quick}, arguments()) is quick
    assert len(measured) == 4


def test_nothing_is_measured_for_one_nor_if_told_so(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastest("op", {"a": slow}, arguments()) is slow
    monkeypatch.setenv("SVDIFF_AUTOTUNE", "0")
    assert fastest("op", CANDIDATES, arguments()) is slow
    assert measured == []


def test_nothing_is_measured_while_a_graph_is_captured(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("op", CANDIDATES, arguments()) is slow
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fastest("op", CANDIDATES, arguments()) is quick  # what was taken unseen is not remembered


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_file_is_replaced(content: str, measured: list[str]) -> None:
    module._path().parent.mkdir(parents=True)
    module._path().write_text(content)
    assert fastest("op", CANDIDATES, arguments()) is quick
    assert list(json.loads(module._path().read_text()).values()) == ["b"]


def test_a_server_decides_once_for_arguments_alike(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    homes, here = {"triton": "a", "cuda": "b"}, {"a": SimpleNamespace(op=slow), "b": SimpleNamespace(op=quick)}
    monkeypatch.setattr(backends.importlib, "import_module", lambda home, package: here[home])
    monkeypatch.setattr(backends, "_CAN", {"triton": lambda *_: True, "cuda": lambda op, given: given[0].dtype != F16})
    monkeypatch.setattr(backends.reference, "op", lambda *_: "reference", raising=False)
    serve = backends._server("op", homes)
    assert [serve(*arguments()) for _ in range(3)] == ["quick"] * 3
    assert measured == ["slow", "quick"]
    assert serve(*arguments(dtype=F16)) == "slow"
    monkeypatch.setattr(backends, "_CAN", {"triton": lambda *_: False, "cuda": lambda *_: False})
    assert serve(*arguments()) == "quick"
    assert serve(*arguments(rows=3)) == "reference"
    monkeypatch.setattr(backends, "_choice", "cuda")
    with pytest.raises(SVDiffError, match="SVDIFF_BACKEND=cuda cannot serve op of float32 on cpu"):
        serve(*arguments(rows=4))


def test_a_directory_that_cannot_be_written_is_no_error(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_CACHE", "/proc/nowhere")
    assert fastest("op", CANDIDATES, arguments()) is quick
