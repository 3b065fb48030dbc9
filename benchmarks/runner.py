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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import device as devices
from . import machine
from .cost import Cost
from .device import Step

OURS, NAIVE = "svdiff", "svdiff-pytorch's arithmetic"
BROADCAST, PARAMETRIZE = "recomposed by broadcast", "author's parametrize"
FROZEN, DENSE, CONTROL = "frozen (forward and dx)", "dense batch of the base", "A/A control"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GRAPH_CALLS = 10


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: percentiles over its rounds, and its ratios to the first contender, round by round.

    Attributes:
        subject: what is computed; contenders of one subject are compared with one another.
        name: of the contender.
        rounds: how often it ran.
        flop, bytes: what one run costs by count, if that was given.
        peak_bytes: most memory that the process held during a run, if that was measured.
        failure: why there is nothing to report.
    """

    subject: str
    name: str
    rounds: int
    p20: float
    p50: float
    p80: float
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    flop: float | None = None
    bytes: float | None = None
    peak_bytes: int | None = None
    failure: str | None = None

    @classmethod
    def of_failure(cls, subject: str, name: str, failure: str) -> Timing:
        """A contender that did not get through."""
        return cls(subject, name, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, failure=failure)


finished: list[Timing] = []
"""What `interleave` has measured in this process, for when the rest is cut short."""


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    subject: str,
    costs: Mapping[str, Cost] | None = None,
    warmup: int = 1,
    seed: int = 0,
    device: str = "cpu",
    graph: bool = False,
) -> list[Timing]:
    """Time `steps`, the first being what the others are divided by; `CONTROL` is added to the result.

    On a GPU a timing is of as many calls as its resolution needs. With `graph` they are replayed from CUDA graphs of
    several calls, so that what is timed is kernels and not their launches. A rival that cannot run keeps its line.
    """
    first = next(iter(steps))
    calls = _GRAPH_CALLS if graph else 1
    contenders = {name: devices.graphed(step, calls) if graph else step for name, step in steps.items()}
    failures: dict[str, str] = {}
    counts: dict[str, int] = {}
    with tqdm(total=warmup * len(steps) + rounds * (1 + len(steps)), unit="step") as progress:
        for name, step in contenders.items():
            progress.set_description(f"warm-up: {name}")
            try:
                for _ in range(warmup):
                    step()
                    progress.update()
                counts[name] = devices.calls_per_timing(device, step)
            except RuntimeError as error:  # out of memory, or cannot be captured
                if name == first:
                    raise
                failures[name] = str(error).strip().splitlines()[0]
        contenders = {name: contenders[name] for name in counts} | {CONTROL: contenders[first]}
        counts[CONTROL] = counts[first]
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        order, rng = list(contenders), random.Random(seed)
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                progress.set_description(name)
                seconds[name].append(devices.seconds(device, contenders[name], counts[name]) / calls)
                progress.update()
    timings = summarise(seconds, subject=subject, costs=costs)
    timings += [Timing.of_failure(subject, name, why) for name, why in failures.items()]
    finished.extend(timings)
    return timings


def slowed(step: Step, share: float) -> Step:
    """The same step, taking this share more time."""
    if not share:
        return step

    def slow() -> None:
        start = time.perf_counter()
        step()
        end = time.perf_counter() + share * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass

    return slow


def summarise(
    seconds: Mapping[str, list[float]],
    *,
    subject: str,
    costs: Mapping[str, Cost] | None = None,
    peaks: Mapping[str, int] | None = None,
) -> list[Timing]:
    """Percentiles of each contender's seconds and of its ratios, round by round, to the first contender's."""
    first = next(iter(seconds))
    timings = []
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds[first], strict=True)]
        cost = (costs or {}).get(first if name == CONTROL else name)
        timing = Timing(subject, name, len(taken), *_percentiles(taken), *_percentiles(ratios))
        if cost:
            timing = replace(timing, flop=cost.flop, bytes=cost.bytes)
        timings.append(replace(timing, peak_bytes=(peaks or {}).get(name)))
    return timings


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on besides the code: machine, threads, versions, commit."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **devices.describe(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def write_lines(file: Path, timings: list[Timing], *, dtype: str, device: str = "cpu", **common: Any) -> None:
    """One JSON line per timing: `common`, the timing, what share of the roofline it reached, and the environment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    peak = machine.peak(DTYPES[dtype], device)
    settings = {**common, "dtype": dtype, "device": device}
    limits = {"peak_tflop_per_s": peak.flops / 1e12, "peak_gb_per_s": peak.bandwidth / 1e9}
    about = limits | environment(device)
    lines = [json.dumps({**settings, **asdict(t), **achieved(t, peak), **about}) for t in timings]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, file)


def achieved(timing: Timing, peak: machine.Peak) -> dict[str, float]:
    """Operations and bytes a second, and the share of the measured roofline; nothing if the cost is not known."""
    if timing.flop is None or timing.bytes is None or timing.failure:
        return {}
    bound = peak.bound(Cost(timing.flop, timing.bytes))
    return {
        "tflop_per_s": timing.flop / timing.p50 / 1e12,
        "gb_per_s": timing.bytes / timing.p50 / 1e9,
        "of_roofline": bound / timing.p50,
    }


def table(timings: list[Timing], dtype: torch.dtype, device: str = "cpu") -> str:
    """For people: one block per subject, one row per contender; only columns that have something to say."""
    peak = machine.peak(dtype, device)
    counted = any(timing.flop for timing in timings)
    weighed = any(timing.peak_bytes for timing in timings)
    width = max((len(name) for t in timings for name in (t.subject, t.name)), default=0) + 2
    lines: list[str] = []
    for i, timing in enumerate(timings):
        if i == 0 or timing.subject != timings[i - 1].subject:
            head = f"{timing.subject:{width}}{'ms':>10}{'times ours':>12}{'p20-p80':>14}"
            head += f"{'TFLOP/s':>10}{'of roofline':>13}" if counted else ""
            lines += ["", head + (f"{'peak GB':>10}" if weighed else "")]
        if timing.failure:
            lines.append(f"{timing.name:{width}}failed: {timing.failure}")
            continue
        spread = f"{timing.ratio_p20:.2f}-{timing.ratio_p80:.2f}"
        row = f"{timing.name:{width}}{1e3 * timing.p50:10.2f}{timing.ratio_p50:12.2f}{spread:>14}"
        if reached := achieved(timing, peak):
            row += f"{reached['tflop_per_s']:10.3f}{reached['of_roofline']:13.0%}"
        lines.append(row + (f"{timing.peak_bytes / 1e9:10.2f}" if timing.peak_bytes else ""))
    return "\n".join(lines[1:])


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
