"""The most memory that a training step of a UNet holds, each contender in a process of its own.

On a CPU it is resident memory at its highest during the steps, weights and interpreter included; setting up is left
out. On systems other than Linux there is no way to leave it out, and the level refuses. On a GPU it is what tensors
take there.
"""

from __future__ import annotations

import gc
import resource
from pathlib import Path

from svdiff.bench import BenchConfig
from svdiff.parking import trim_heap
from tqdm.auto import tqdm

from svdiff_kernels import SVDiffError

from . import child, resident, runner
from . import device as devices
from .contenders import Contenders, training_step

_OURS = "ours"


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure one contender after the other; a contender that fails keeps its line and says why."""
    if bench.device == "cpu" and not resident.is_known():
        raise SVDiffError("bench memory reads /proc, which this system does not have")
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    failures: dict[str, str] = {}
    with tqdm(total=1 + len(bench.rivals), unit="model") as progress:
        for name in (_OURS, *bench.rivals):
            progress.set_description(name)
            found = child.call("memory", bench, name)
            progress.update()
            if failure := found.get("failure"):
                if name == _OURS:
                    raise SVDiffError(f"our own step failed: {failure}")
                failures[name] = failure
                continue
            seconds[found["label"]], peaks[found["label"]] = found["seconds"], found["peak_bytes"]
    subject = f"{Path(bench.config).stem if bench.config else bench.model}, one process each"
    timings = runner.summarise(seconds, subject=subject, peaks=peaks)
    return timings + [runner.Timing.of_failure(subject, name, why) for name, why in failures.items()]


def main() -> None:
    """Measure one contender in this process."""
    bench, (name,) = child.settings()
    on_gpu = bench.device == "cuda"
    if bench.memory_gb and on_gpu:
        devices.limit_memory(bench.memory_gb)
    elif bench.memory_gb:
        most = int(bench.memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    contenders = Contenders(bench)
    model, parameters = contenders.ours() if name == _OURS else contenders.rival(name)
    label = runner.OURS if name == _OURS else contenders.label(name)
    step = training_step(model, parameters, contenders.inputs())
    del contenders, model, parameters  # what the others would need
    gc.collect()
    trim_heap()
    if on_gpu:
        devices.forget_peak()
    else:
        resident.forget_peak()
    seconds = [devices.seconds(bench.device, step) for _ in range(bench.rounds)]
    child.report(label=label, seconds=seconds, peak_bytes=devices.peak_bytes() if on_gpu else resident.peak_bytes())


if __name__ == "__main__":
    main()
