"""`make gpu` where there is no GPU: what it would run, how it copes with stages, and how it sums up."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, infer, op, predict, runner
from benchmarks.gpu import Outcome, Stage
from benchmarks.unet import GRAPH


def python(code: str, budget: float = 60, **more: Any) -> Stage:
    return Stage("a stage", (sys.executable, "-c", code), budget, **more)


def test_without_a_gpu_it_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "no GPU" in said.err


@pytest.mark.parametrize(("code", "verdict"), [("print('fine')", "passed"), ("raise SystemExit('oh no')", "failed")])
def test_a_stage_passes_or_fails_with_its_last_words(code: str, verdict: str, tmp_path: Path) -> None:
    outcome = gpu.run(python(code), 60, os.environ, tmp_path)
    assert outcome.verdict == verdict and outcome.why in ("fine", "oh no")
    assert outcome.why in (tmp_path / "a_stage.log").read_text()


def test_a_stage_that_overruns_is_cut_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; print('started', flush=True); subprocess.run(['sleep', '60'])"
    start = time.perf_counter()
    outcome = gpu.run(python(code), 3.0, os.environ, tmp_path)
    assert outcome.verdict == "cut" and outcome.why == "after its budget of 3 s: started"
    assert time.perf_counter() - start < 30


def test_what_is_not_installed_is_left_out_by_name(tmp_path: Path) -> None:
    outcome = gpu.run(python("print()", needs=("torch", "no_such_package")), 60, os.environ, tmp_path)
    assert (outcome.verdict, outcome.why) == ("left out", "no_such_package not installed")
    assert gpu.run(python("print()"), 0.0, os.environ, tmp_path).why == "no time left"


def test_lines_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("{}")
    gpu.run(python("raise SystemExit(1)", result=old), 60, os.environ, tmp_path)
    assert not old.exists()


def test_stages_are_commands_that_exist(tmp_path: Path) -> None:
    from svdiff.bench import BenchConfig
    from svdiff.cli import COMMANDS, _parse

    stages = gpu.stages(tmp_path)
    levels = [stage for stage in stages if stage.result]
    assert [stage.name for stage in levels] == [
        "op sd15 1",
        "unet sd15 1",
        "unet sd15 4",
        "unet sdxl 1",
        "infer sd15 8",
        "layer sd15 1",
    ]
    for stage in levels:
        config = _parse("bench", COMMANDS["bench"], BenchConfig, list(stage.command[4:]))
        assert (config.device, config.dtype, config.output) == ("cuda", "bfloat16", str(stage.result))
        assert 8 * config.latents == predict.MODELS[config.model]
    for stage in stages:
        paths = [part.removeprefix("--ignore=") for part in stage.command if "tests/" in part]
        assert all(Path(path).exists() for path in paths)


def test_a_failing_stage_stops_no_other_and_is_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def run(stage: Stage, *_: Any) -> Outcome:
        done.append(stage.name)
        return Outcome(stage.name, "failed" if stage.name == "tests" else "passed", 1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert done == [stage.name for stage in gpu.stages(tmp_path)]
    assert "NVIDIA H200" in capsys.readouterr().out
    stages = [json.loads(line) for line in (tmp_path / "gpu_stages.jsonl").read_text().splitlines()]
    assert [stage["name"] for stage in stages] == done and stages[0]["gpu"] == "NVIDIA H200"


def test_the_build_is_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert gpu.environment()["TORCH_CUDA_ARCH_LIST"] == "8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.environment()["TORCH_CUDA_ARCH_LIST"] == "9.0a"


def line(level: str, batch: int, subject: str, name: str, seconds: float, **more: Any) -> dict[str, Any]:
    about = {"level": level, "model": "sd15", "latents": 64, "batch": batch, "failure": None}
    return {**about, "subject": subject, "name": name, "p50": seconds, **more}


def test_measured_stands_beside_predicted(tmp_path: Path) -> None:
    files = {}
    for name, lines in {
        "unet": [
            line("unet", 1, "u", runner.OURS, 0.020),
            line("unet", 1, "u", runner.OURS + GRAPH, 0.011),
            line("unet", 1, "u", runner.NAIVE, 0.0, failure="out of memory"),
        ],
        "infer": [line("infer", 8, "u", infer.ours(8), 0.033), line("infer", 8, "u", runner.DENSE, 0.031)],
        "layer": [
            line("layer", 1, f"{n} x {shape}", runner.OURS, 0.001)
            for n, shape in ((30, "linear 320x320 T=4096"), (5, "linear 10240x1280 T=256"))
        ],
        "op": [
            line("op", 1, f"30 x expand 320 to 320, T=4096{part}", who, seconds)
            for part, ours in ((op.FORWARD, 0.002), (op.BACKWARD, 0.004))
            for who, seconds in (("triton", ours), (op.GEMM, 0.001))
        ],
    }.items():
        files[name] = tmp_path / name
        files[name].write_text("\n".join(map(json.dumps, lines)))
    text = gpu.summary([Outcome("build", "cut", 9.0, "why")], files, "NVIDIA H200")
    rows = {row[:86].strip(): row[86:].split() for row in text.splitlines()}
    step = {
        p.name: p
        for p in predict.read(gpu._PREDICTED)
        if (p.chip, p.model, p.batch, p.what, p.subject) == ("H200", "sd15", 1, "step", "whole")
    }
    assert rows["unet sd15 batch 1, svdiff"] == [f"{step[runner.OURS].eager_ms:.2f}", "20.00"]
    assert rows[f"unet sd15 batch 1, svdiff{GRAPH}"] == [f"{step[runner.OURS].graph_ms:.2f}", "11.00"]
    assert f"unet sd15 batch 1, {runner.NAIVE}: failed: out of memory" in text
    assert rows["infer sd15 batch 8, svdiff, 8 deltas"][1] == "33.00"
    both = sum(
        p.count * p.graph_ms
        for p in predict.read(gpu._PREDICTED)
        if (p.chip, p.model, p.what, p.name) == ("H200", "sd15", "layer", runner.OURS)
        and p.subject in ("linear 320x320 T=4096", "linear 10240x1280 T=256")
    )
    assert rows["layer sd15 batch 1, all layers, svdiff"] == [f"{both:.2f}", "35.00"]
    assert rows["op sd15 batch 1, expand forward, triton, all together"][-1] == "0.50"
    assert rows["op sd15 batch 1, expand backward, triton, the slowest"][-1] == "0.25"
    assert "build               9.0  cut: why" in text
    unknown = gpu.summary([], files, "NVIDIA Imaginary")
    assert "there are no predictions for NVIDIA Imaginary" in unknown and "20.00" in unknown
