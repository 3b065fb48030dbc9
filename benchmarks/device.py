"""Where a measurement runs: all that differs between a CPU and a GPU, which is timing, graphs, memory and names."""

from __future__ import annotations

import gc
import math
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from svdiff_kernels import SVDiffError, backends

Step = Callable[[], object]

_LEAST = 0.01  # seconds of a timing on a GPU, beside which a launch and the resolution of an event are nothing
_MOST_CALLS = 1000
_WARM_UP = 3  # calls before a capture: autotuning and lazy initialisation cannot be captured


def select(wanted: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda".

    Raises:
        SVDiffError: "cuda" without a GPU.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise SVDiffError("device is cuda, but torch sees no GPU here")
    return ("cuda" if available else "cpu") if wanted == "auto" else wanted


def seconds(device: str, step: Step, calls: int = 1) -> float:
    """Of one of so many calls in a row; on a GPU between two events in the stream, so that the host may run ahead."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def calls_per_timing(device: str, step: Step) -> int:
    """How often a warm step must run for a timing to be worth something."""
    if device == "cpu":
        return 1
    return min(_MOST_CALLS, max(1, math.ceil(_LEAST / max(seconds(device, step), 1e-9))))


def graphed(step: Step, calls: int = 1) -> Step:
    """The same, so many times in one CUDA graph, which the first call captures."""
    captured: list[Any] = []

    def replay() -> None:
        if not captured:
            captured.append(_capture(step, calls))
        captured[0].replay()

    return replay


def _capture(step: Step, calls: int) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph, which empties the allocator's cache each time: a level captures hundreds.
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for _ in range(calls):
                step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def forget_peak() -> None:
    """From now on `peak_bytes` counts what is held, and what comes."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Most memory of the GPU that tensors took since `forget_peak`."""
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def limit_memory(gigabytes: float) -> None:
    """More than this fails, as on a smaller GPU."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * gigabytes / torch.cuda.mem_get_info()[1]))


def describe(device: str) -> dict[str, Any]:
    """What figures of this device depend on besides the code; None for all but the backend on a CPU."""
    on_gpu = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "triton": _version("triton") if on_gpu else None,
        "backend": backends.serving(device),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.split()[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
