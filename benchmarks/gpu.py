"""All that wants a GPU, in one go: `make gpu`, or `python -m benchmarks.gpu`.

Builds the extension, runs the kernels' tests, a few of them under compute-sanitizer, and the suite; ends with what was
measured beside what `predict` said before. Stages run one after the other, each in a process of its own with a budget
of seconds. One that overruns is told to end, keeps what it has measured so far, and counts as a failure; later ones run
all the same. What is not installed is left out by name.

Exit code: 0, 1 if a stage failed or was cut, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import baselines, predict, runner
from .infer import ours
from .op import BACKWARD, FORWARD, GEMM
from .unet import GRAPH

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PREDICTED = RESULTS / "predicted.jsonl"
_SECONDS = 525.0  # for all stages: under nine minutes
_GRACE = 10.0  # for a stage to write what it has
_TESTS = ROOT / "tests" / "kernels"
# Not about GPUs: how packages are built and installed, and kernels compiled for chips that are not here.
_NOT_HERE = (
    "test_package.py",
    "test_memory.py",
    "triton/test_compile.py",
    "cuda/test_compile.py",
    "cuda/test_build.py",
)
Line = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: for people, and of the log.
        command: what to run.
        budget: seconds.
        needs: packages and programs without which it is left out.
        result: where a level of the suite writes its lines.
    """

    name: str
    command: tuple[str, ...]
    budget: float
    needs: tuple[str, ...] = ()
    result: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: "passed", "failed", "cut", or "left out" and why."""

    name: str
    verdict: str
    seconds: float = 0.0
    why: str = ""


def stages(output: Path) -> list[Stage]:
    """In the order of what one would miss most."""
    untuned = {"SVDIFF_AUTOTUNE": "0", "OMP_NUM_THREADS": "2"}  # a case each shape: tuning them all would take an hour
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    many = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    ignored = (f"--ignore={_TESTS / name}" for name in _NOT_HERE)
    strides = [str(folder) for name in ("triton", "cuda") if (folder := _TESTS / name).is_dir()]
    memcheck = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *pytest, *strides, "-k", "strides")
    small = {**untuned, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 120, ("setuptools",)),
        Stage("info", (sys.executable, "-m", "svdiff_kernels.info"), 30),
        Stage("tests", (*pytest, str(_TESTS), *ignored, *many), 120, ("pytest", "hypothesis"), environment=untuned),
        _level(output, "op", "sd15", 1, 110, "--graph", "true", "--rounds", "5"),
        _level(output, "unet", "sd15", 1, 90, "--graph", "true"),
        _level(output, "unet", "sd15", 4, 80, "--graph", "true"),
        _level(output, "unet", "sdxl", 1, 120, "--graph", "true", "--rounds", "5"),
        _level(output, "infer", "sd15", 8, 80, "--rounds", "5"),
        Stage("memcheck", memcheck, 60, ("pytest", "compute-sanitizer"), environment=small),
        _level(output, "layer", "sd15", 1, 80, "--graph", "true", "--rounds", "3"),
    ]


def _level(output: Path, level: str, model: str, batch: int, budget: float, *more: str) -> Stage:
    result = output / f"gpu_{level}_{model}_{batch}.jsonl"
    size = ("--latents", str(predict.MODELS[model] // 8), "--batch", str(batch), "--dtype", "bfloat16")
    command = (sys.executable, "-m", "svdiff.cli", "bench", level, "--model", model, *size, "--device", "cuda", *more)
    needs: tuple[str, ...] = ("transformers",)
    if level in ("unet", "infer"):
        needs = (*needs, "diffusers")
    if level == "unet":
        command = (*command, "--rivals", *(("lora",) if baselines.has_peft() else ()), "naive", "frozen")
    return Stage(f"{level} {model} {batch}", (*command, "--output", str(result)), budget, needs, result)


def run(stage: Stage, seconds: float, environment: Mapping[str, str], logs: Path) -> Outcome:
    """Run a stage for so many seconds at most."""
    missing = [need for need in stage.needs if importlib.util.find_spec(need) is None and shutil.which(need) is None]
    if missing:
        return Outcome(stage.name, "left out", why=f"{' and '.join(missing)} not installed")
    if seconds <= 0:
        return Outcome(stage.name, "left out", why="no time left")
    if stage.result:
        stage.result.unlink(missing_ok=True)  # of an earlier run: what is there afterwards is of this one
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{stage.name.replace(' ', '_')}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env={**environment, **stage.environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        cut = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            cut = True
            _end(process)
    taken = time.perf_counter() - start
    said = [line for line in log.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    last = said[-1].strip() if said else ""
    if cut:
        return Outcome(stage.name, "cut", taken, f"after its budget of {seconds:.0f} s: {last}")
    if process.returncode:
        print("\n".join(said[-20:]), file=sys.stderr)
    return Outcome(stage.name, "failed" if process.returncode else "passed", taken, last)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment() -> dict[str, str]:
    """For the stages: our sources, and a build for the GPU that is here."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")  # "a": the instructions that only this chip has
    path = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {
        "TORCH_CUDA_ARCH_LIST": architecture,
        "SVDIFF_BUILD": "auto",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }


def summary(outcomes: Sequence[Outcome], files: Mapping[str, Path], gpu: str, predicted: Path = _PREDICTED) -> str:
    """What became of the stages, and measured beside predicted."""
    lines = [f"{'stage':16}{'s':>7}  "]
    lines += [f"{o.name:16}{o.seconds:7.1f}  {o.verdict}{f': {o.why}' if o.why else ''}" for o in outcomes]
    if not baselines.has_peft():
        lines.append("LoRA was left out as a rival: peft not installed")
    chip = next((chip.name for chip in predict.CHIPS if chip.name in gpu), None)
    known = [p for p in predict.read(predicted) if p.chip == chip]
    if chip is None:
        lines.append(f"there are no predictions for {gpu}")
    rows: list[str] = []
    for path in files.values():
        if path.exists():
            measured = [json.loads(text) for text in path.read_text().splitlines()]
            rows += _rows([line for line in measured if not line.get("failure")], known)
            rows += [
                f"{_setting(line)}, {line['name']}: failed: {line['failure']}" for line in measured if line["failure"]
            ]
    head = f"{gpu}, bf16: ms, or a share of a plain product's rate"
    return "\n".join([*lines, "", f"{head:86}{'predicted':>16}{'measured':>10}", *rows])


def _setting(line: Line) -> str:
    return f"{line['level']} {line['model']} batch {line['batch']}"


def _rows(lines: list[Line], known: list[predict.Prediction]) -> list[str]:
    if not lines:
        return []
    first = lines[0]
    mine = [p for p in known if (p.model, p.pixels) == (first["model"], 8 * first["latents"])]
    if first["level"] == "op":
        return _rates(lines, mine)
    if first["level"] == "layer":
        return _sums(lines, mine)
    kind = {"unet": "step"}.get(first["level"], first["level"])
    wholes = {p.name: p for p in mine if (p.what, p.subject, p.batch) == (kind, "whole", first["batch"])}
    rows = []
    for line in lines:
        name = predict.MIXED if line["name"] == ours(8) else line["name"].removesuffix(GRAPH)
        p = wholes.get(name)
        guess = "" if p is None else f"{p.graph_ms if line['name'].endswith(GRAPH) else p.eager_ms:.2f}"
        what = f"{_setting(line)}, {line['name']}"
        rows.append(f"{what:86}{guess:>16}{1e3 * line['p50']:10.2f}")
    return rows


def _rates(lines: list[Line], known: list[predict.Prediction]) -> list[str]:
    """Of `expand` to a plain product, over all shapes that were measured and of the slowest."""
    rows = []
    for part, name in ((FORWARD, predict.FORWARD), (BACKWARD, predict.BACKWARD)):
        subjects: dict[str, dict[str, float]] = {}
        for line in lines:
            if line["subject"].endswith(part):
                subjects.setdefault(line["subject"], {})[line["name"]] = line["p50"]
        shapes = {_shape(subject).removesuffix(part) for subject in subjects}
        guesses = [p for p in known if p.what == "expand" and p.name == name and p.subject in shapes]
        others = (GEMM, runner.CONTROL)
        for contender in dict.fromkeys(name for times in subjects.values() for name in times if name not in others):
            pairs = [
                (_count(subject) * times[GEMM], _count(subject) * times[contender])
                for subject, times in subjects.items()
                if {GEMM, contender} <= times.keys()
            ]
            if not pairs:
                continue
            found = {
                "all together": sum(gemm for gemm, _ in pairs) / sum(taken for _, taken in pairs),
                "the slowest": min(gemm / taken for gemm, taken in pairs),
            }
            for title, share in found.items():
                low, high = (predict.rate(guesses, title, o) for o in (False, True)) if guesses else (None, None)
                guess = f"{low:.2f} to {high:.2f}" if guesses else ""
                row = f"{_setting(lines[0])}, {name}, {contender}, {title}"
                rows.append(f"{row:86}{guess:>16}{share:10.2f}")
    return rows


def _sums(lines: list[Line], known: list[predict.Prediction]) -> list[str]:
    """Of all layers that were measured, each as often as it occurs, as graphs."""
    rows = []
    for name in dict.fromkeys(line["name"] for line in lines):
        mine = [line for line in lines if line["name"] == name]
        taken = sum(_count(line["subject"]) * line["p50"] for line in mine)
        subjects = {_shape(line["subject"]) for line in mine}
        guesses = [
            p.count * p.graph_ms for p in known if p.what == "layer" and p.name == name and p.subject in subjects
        ]
        guess = f"{sum(guesses):.2f}" if guesses else ""
        rows.append(f"{f'{_setting(lines[0])}, all layers, {name}':86}{guess:>16}{1e3 * taken:10.2f}")
    return rows


def _count(subject: str) -> int:
    """The 3 of "3 x linear ..."."""
    return int(subject.split(" x ", 1)[0])


def _shape(subject: str) -> str:
    """What follows it."""
    return subject.split(" x ", 1)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Build, test and measure on this machine's GPU.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON lines; logs go beside them")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for everything; default %(default)s")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu: torch sees no GPU here, so there is nothing to run", file=sys.stderr)
        return 2
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + options.seconds
    planned, inherited = stages(output), environment()
    outcomes = []
    for stage in planned:
        print(f"== {stage.name}: {' '.join(stage.command)}", flush=True)
        left = end - time.perf_counter() - _GRACE
        outcomes.append(run(stage, min(stage.budget, left), inherited, output / "logs"))
        print(f"   {outcomes[-1].verdict} after {outcomes[-1].seconds:.0f} s: {outcomes[-1].why}", flush=True)
    about = runner.environment("cuda")
    lines = [json.dumps({**asdict(outcome), **about}) for outcome in outcomes]
    (output / "gpu_stages.jsonl").write_text("\n".join(lines) + "\n")
    files = {stage.name: stage.result for stage in planned if stage.result}
    text = summary(outcomes, files, torch.cuda.get_device_name())
    (output / "gpu_summary.txt").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if any(outcome.verdict in ("failed", "cut") for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
