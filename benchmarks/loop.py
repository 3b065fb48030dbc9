"""`svdiff train` itself, on a pipeline of real size with random weights: what the loop adds to a step, and the start.

In processes of their own, as a user starts them, with decompositions and class pictures at hand. Counted are: of each
the time from its start to the first step, and to the end of that; whole steps after the first; and of these the part
that is forward, backward and optimiser. What is left is data, logs and Python.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import svdiff
from PIL import Image
from svdiff.bench import BenchConfig
from svdiff.training.loop import Loop

from svdiff_kernels import FactorCache, SVDiffError

from . import child, runner
from .models import make_distinct, random_pipeline

_STEP, _INSIDE = "a step", "forward, backward, optimiser"
_START, _FIRST = "start to the first step", "start to its end"
_STARTS = 4  # of which the first may have to read the models from the disk


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure a run of `rounds` steps after the first, and starts before it; the first timing is a whole step."""
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as place:
        folder = Path(place).resolve()
        pipeline = random_pipeline(bench)
        make_distinct(pipeline.unet)
        pipeline.save_pretrained(folder / "base")
        svdiff.attach(pipeline, one_dim=bench.one_dim, rank=bench.rank, cache=FactorCache(folder / "cache"))
        side = 8 * bench.latents
        for kind in ("instance", "class"):
            (folder / kind).mkdir()
            for i in range(4):
                Image.effect_noise((side, side), 64).save(folder / kind / f"{i}.png")
        del pipeline
        starts = [replace(bench, rounds=1)] * (_STARTS - 1)
        runs = [_train(one, folder) for one in (*starts, bench)]
    subject = f"svdiff train, {bench.model}, batch {bench.batch}"
    steps = runner.summarise({_STEP: runs[-1]["steps"], _INSIDE: runs[-1]["inside"]}, subject=subject)
    waits = {name: [found[key] for found in runs] for name, key in ((_START, "start"), (_FIRST, "first"))}
    return steps + runner.summarise(waits, subject=f"{subject}, {_STARTS} times")


def _train(bench: BenchConfig, folder: Path) -> dict[str, Any]:
    found = child.call("loop", bench, str(folder), str(time.time()))
    if failure := found.get("failure"):
        raise SVDiffError(f"svdiff train failed: {failure}")
    return found


def main() -> None:
    """Train in this process, with a watch in the loop."""
    bench, (folder, started) = child.settings()
    train = importlib.import_module("svdiff.train")
    begins: list[float] = []  # of everything inside
    ends: list[float] = []  # of steps
    inside: list[float] = []

    def timed(function: Callable[..., Any], is_last: bool) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begins.append(time.time())
            result = function(*args)
            inside.append(time.time() - begins[-1])
            if is_last:
                ends.append(time.time())
            return result

        return call

    watched: Any = Loop
    watched._forward_and_backward = timed(Loop._forward_and_backward, False)
    watched._take_step = timed(Loop._take_step, True)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        train.train(
            svdiff.TrainConfig(
                f"{folder}/base",
                f"{folder}/instance",
                instance_prompt="a sks toy",
                output_dir=f"{output}/run",
                with_prior_preservation=bench.batch > 1,
                class_data_dir=f"{folder}/class",
                class_prompt=["a toy"],
                num_class_images=4,
                train_batch_size=max(1, bench.batch // 2),
                one_dim=bench.one_dim,
                rank=bench.rank,
                svd_cache_dir=f"{folder}/cache",
                resolution=8 * bench.latents,
                max_train_steps=bench.rounds + 1,
            )
        )
    steps = [end - before for before, end in pairwise(ends)]
    per_step = [inside[2 * i] + inside[2 * i + 1] for i in range(1, len(ends))]
    start, first = begins[0] - float(started), ends[0] - float(started)
    child.report(start=start, first=first, steps=steps, inside=per_step)


if __name__ == "__main__":
    main()
