"""Interleaved timing: every round runs all contenders once, in random order, so that a machine's drift hits all.

Ratios are taken within a round and their median is quoted; absolute seconds of a shared machine are not comparable
between runs. The first contender also runs a second time in each round: that A/A ratio says how much of any other ratio
is noise.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

CONTROL = "A/A control"
Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: percentiles over its rounds, and its ratios to the first contender, round by round."""

    name: str
    rounds: int
    p20: float
    p50: float
    p80: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float


def interleave(steps: Mapping[str, Step], rounds: int, warmup: int = 1, seed: int = 0) -> list[Timing]:
    """Time `steps`, the first being what the others are divided by; `CONTROL` is added to the result."""
    first = next(iter(steps))
    contenders = {**steps, CONTROL: steps[first]}
    order, rng = list(contenders), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with tqdm(total=warmup * len(steps) + rounds * len(contenders), unit="step") as progress:
        for name in list(steps) * warmup:
            progress.set_description(f"warm-up: {name}")
            steps[name]()
            progress.update()
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                progress.set_description(name)
                start = time.perf_counter()
                contenders[name]()
                seconds[name].append(time.perf_counter() - start)
                progress.update()
    return [
        Timing(
            name,
            rounds,
            *_percentiles(taken),
            *_percentiles([a / b for a, b in zip(taken, seconds[first], strict=True)]),
        )
        for name, taken in seconds.items()
    ]


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code: machine, threads, versions, commit."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def write_lines(file: Path, timings: list[Timing], **common: Any) -> None:
    """One JSON line per timing, with `common` and the environment beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = environment()
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps({**common, **asdict(timing), **about}) + "\n" for timing in timings))
    os.replace(temporary, file)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
