"""Every level of the suite runs on a real model's shapes and writes one line per contender."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from svdiff.bench import BenchConfig, bench

from benchmarks import op, overhead, registry, runner, svd, sweep


def lines_of(tmp_path: Path, **settings: Any) -> list[dict[str, Any]]:
    output = tmp_path / "lines.jsonl"
    table = bench(BenchConfig(model="clip", rounds=1, output=str(output), **settings))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(line["name"] in table and line["subject"] in table for line in lines)
    assert {line["level"] for line in lines} == {settings["level"]}
    return lines


def test_layers_are_measured_in_every_way(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, level="layer")
    assert len({line["subject"] for line in lines}) == len(registry.layers("clip"))
    names = {line["name"] for line in lines}
    assert {runner.OURS, runner.NAIVE, runner.FROZEN, runner.CONTROL, "lora r=4", "lora r=64"} <= names
    assert {"author's parametrize", "recomposed by broadcast", "svdiff residual r=64"} <= names
    floor = {line["subject"]: line["flop"] for line in lines if line["name"] == runner.FROZEN}
    assert all(line["flop"] >= floor[line["subject"]] for line in lines)


def test_the_op_is_measured_against_a_dense_layer(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, level="op")
    assert {line["subject"] for line in lines} == {
        f"{count} x expand {r} to {M}, T={T}{part}"
        for (M, r, T), count in op.shapes("clip", 256).items()
        for part in (op.BOTH, op.FORWARD, op.BACKWARD)
    }
    assert all(line["tflop_per_s"] > 0 for line in lines if line["name"] in (op.DENSE, op.GEMM))


def test_decompositions_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(svd, "shapes", lambda model: [(24, 40), (40, 24), (24, 24), (7, 9)])
    lines = lines_of(tmp_path, level="svd")
    assert {line["subject"] for line in lines} == {"clip, 4 weights"}
    assert {line["name"] for line in lines} == {"decompose", runner.CONTROL, svd.LAPACK}
    assert all(line["p50"] > 0 for line in lines)


def test_few_rows_and_many_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SIDES", (32, 64))
    monkeypatch.setattr(sweep, "ROWS", (4, 8))
    lines = lines_of(tmp_path, level="sweep")
    assert {line["subject"] for line in lines} == {f"linear {n}x{n} T={t}" for n in (32, 64) for t in (4, 8)}


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SIDES", (32,))
    monkeypatch.setattr(sweep, "ROWS", (4, 8))
    contenders, made = sweep.layer.contenders, []

    def interrupted(shape: registry.Layer, *rest: Any, **more: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(shape)
        return contenders(shape, *rest, **more)

    monkeypatch.setattr(sweep.layer, "contenders", interrupted)
    output = tmp_path / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt):
        bench(BenchConfig("sweep", rounds=1, output=str(output)))
    assert {json.loads(line)["subject"] for line in output.read_text().splitlines()} == {"linear 32x32 T=4"}


def test_single_layers_need_neither_diffusers_nor_peft(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["diffusers"] = sys.modules["peft"] = None
from svdiff.bench import BenchConfig, bench
from benchmarks import gpu, registry
few = dict(list(registry.layers("sd15", 256).items())[-3:-1])
registry.layers = lambda *_: few
print(bench(BenchConfig("layer", rounds=1, device="cpu")), bench(BenchConfig("op", rounds=1, device="cpu")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "lora" not in done.stdout and runner.NAIVE in done.stdout and op.GEMM in done.stdout


def test_the_cost_of_a_call_is_measured(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, level="overhead")
    assert {line["name"] for line in lines} == {runner.OURS, overhead.PLAIN, runner.FROZEN, runner.CONTROL}
    assert len({line["subject"] for line in lines}) == 2


def test_a_step_of_svdiff_train_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_CACHE", str(tmp_path / "cache"))
    lines = lines_of(tmp_path, level="train", batch=2)
    assert {"full fine-tuning", "lora r=16", runner.OURS, runner.FROZEN} <= {line["name"] for line in lines}
