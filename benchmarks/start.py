"""From a base model in memory to the end of the first training step, in a fresh process each time.

Ours with the decompositions on disk and without, LoRA, and the way of existing code: an SVD of every weight at every
start. Run it with few --rounds: for Stable Diffusion 1.5 the two that decompose take minutes each.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import svdiff
import torch
from svdiff.bench import BenchConfig
from torch import Tensor
from tqdm.auto import tqdm

from svdiff_kernels import FactorCache, Factors, SVDiffError

from . import child, runner
from .contenders import Contenders, training_step
from .models import make_distinct

WAYS = {
    "warm": f"{runner.OURS}, decompositions on disk",
    "cold": f"{runner.OURS}, first time",
    "svd": "torch.linalg.svd at every start",
    "lora": "lora",
}


class Decomposing(FactorCache):
    """No cache at all: LAPACK's SVD in fp32 each time."""

    def iterate(
        self, weights: Mapping[str, Tensor], rank: int | None = None, *, contents: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, Factors]]:
        for name, weight in weights.items():
            yield name, Factors(*torch.linalg.svd(weight.detach().float().flatten(1), full_matrices=False))


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure every way `rounds` times; the first timing is ours with a warm cache."""
    seconds: dict[str, list[float]] = {label: [] for label in WAYS.values()}
    with (
        tempfile.TemporaryDirectory(dir=".", prefix="bench-") as kept,
        tqdm(total=1 + len(WAYS) * bench.rounds) as progress,
    ):
        for way in ("cold", *(way for _ in range(bench.rounds) for way in WAYS)):
            progress.set_description(WAYS[way])
            filling = progress.n == 0
            with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as fresh:
                cache = kept if filling or way == "warm" else fresh
                found = child.call("start", bench, way, str(Path(cache).resolve()))
            progress.update()
            if failure := found.get("failure"):
                raise SVDiffError(f"{WAYS[way]} failed: {failure}")
            if not filling:
                seconds[WAYS[way]].append(found["seconds"])
    return runner.summarise(seconds, subject=Path(bench.config).stem if bench.config else bench.model)


def main() -> None:
    """Measure one start in this process."""
    bench, (way, folder) = child.settings()
    contenders = Contenders(bench)
    inputs, model = contenders.inputs(), contenders.dense
    make_distinct(model)
    start = time.perf_counter()
    if way == "lora":
        model, parameters = contenders.rival("lora")
    else:
        cache = Decomposing(folder) if way == "svd" else FactorCache(folder)
        adapter = svdiff.attach(model, one_dim=bench.one_dim, rank=bench.rank, cache=cache)
        parameters = [p for group in adapter.param_groups() for p in group["params"]]
    training_step(model, parameters, inputs)()
    child.report(seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
