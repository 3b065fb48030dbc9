"""Pictures by a whole pipeline, in which every prompt has a fine-tune of its own; and what having many of them costs.

The pipeline is of real size, with random weights. Timed are a call with a batch of prompts, from text to pictures in a
few steps under classifier-free guidance; fusing one adapter into the weights; and choosing others. Then, in processes
of their own, what a thousand adapters take that are loaded but do not act.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Mapping
from typing import Any

import svdiff
import torch
from svdiff.bench import BenchConfig
from svdiff.parking import trim_heap
from tqdm.auto import tqdm

from svdiff_kernels import SVDiffError

from . import child, resident, runner
from .models import RandomFactors, random_pipeline, twin

_BASE = "the base"
_STEPS = 8  # what comes before them and after them is then a tenth of the call
_MANY = 1000
_SWITCHES = 200
_KINDS = {"float32": torch.float32, "float16": torch.float16}  # of adapters on the host
Deltas = dict[str, dict[str, torch.Tensor]]


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure; the first timing is a call in which every prompt has an adapter of its own."""
    if not resident.is_known():
        raise SVDiffError("bench pipeline reads /proc, which this system does not have")
    base = random_pipeline(bench)
    pipeline = type(base)(**{**base.components, "unet": twin(base.unet), "text_encoder": twin(base.text_encoder)})
    adapter = svdiff.attach(pipeline, text_encoder=True, cache=RandomFactors(), one_dim=bench.one_dim)
    names = [f"a{i}" for i in range(bench.batch)]
    models = {"denoiser": pipeline.unet, "text_encoder": pipeline.text_encoder}
    for i, name in enumerate(names):
        adapter.load_deltas(_deltas(models, i), name, activate=False)
    prompts = [f"a red star on the left, picture {name}" for name in names]

    def draw(drawing: Any) -> None:
        drawing(prompts, num_inference_steps=_STEPS, height=8 * bench.latents, width=8 * bench.latents)

    def each_its_own() -> None:
        with adapter.mixed([{name: 1.0} for name in names]):
            draw(pipeline)

    def all_the_same() -> None:
        with adapter.mixed({names[0]: 1.0}):
            draw(pipeline)

    for drawing in (base, pipeline):
        drawing.set_progress_bar_config(disable=True)
    steps = {f"{len(names)} adapters": each_its_own, "one adapter": all_the_same, _BASE: lambda: draw(base)}
    calls = runner.interleave(steps, bench.rounds, subject=f"{bench.model}, {len(names)} prompts, {_STEPS} steps")
    adapter.set_adapters(names[0])
    fusing = _fusing(adapter, bench.rounds)
    median = {timing.name: timing.p50 for timing in calls}
    rows = 2 * len(names) * bench.latents**2 * _STEPS  # guidance draws twice
    saved = (median["one adapter"] - median[_BASE]) / rows  # by a fused model, for a latent pixel
    pays = "never pays here"
    if saved > 0:
        pays = f"pays from {sum(fusing['fuse']) / bench.rounds / saved:,.0f} latent pixels"
    return [
        *calls,
        *runner.summarise(fusing, subject=f"fusing, which {pays}"),
        *runner.summarise(_switching(adapter, names), subject="choosing other adapters"),
        *_many(bench),
    ]


def _deltas(models: Mapping[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> Deltas:
    """Random shifts for every spectral layer of models, by their role."""
    torch.manual_seed(seed)
    return {
        role: {
            name: (0.01 * torch.randn_like(delta)).to(dtype)
            for name, delta in model.get_submodule("spectral_bank").delta_dict("default").items()
        }
        for role, model in models.items()
    }


def _fusing(adapter: svdiff.Adapter, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {"fuse": [], "unfuse": []}
    for _ in tqdm(range(rounds), desc="fusing"):
        for name, taken in seconds.items():
            start = time.perf_counter()
            getattr(adapter, name)()
            taken.append(time.perf_counter() - start)
    return seconds


def _switching(adapter: svdiff.Adapter, names: list[str]) -> dict[str, list[float]]:
    """Seconds of choosing one adapter for all, and one for each prompt, among those loaded."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {"one for all": [], "one for each prompt": []}
    for _ in range(_SWITCHES):
        mixes = [{name: 1.0} for name in rng.sample(names, len(names))]
        start = time.perf_counter()
        adapter.set_adapters(rng.choice(names))
        seconds["one for all"].append(time.perf_counter() - start)
        start = time.perf_counter()
        adapter.set_adapters_per_sample(mixes)
        seconds["one for each prompt"].append(time.perf_counter() - start)
    return seconds


def _many(bench: BenchConfig) -> list[runner.Timing]:
    """Seconds of choosing one of a thousand adapters, and the memory they take, by the precision they are held in."""
    seconds, held = {}, {}
    for kind in tqdm(_KINDS, desc="a thousand adapters"):
        found = child.call("pipeline", bench, kind)
        if failure := found.get("failure"):
            raise SVDiffError(f"a thousand adapters failed: {failure}")
        name = f"held in {kind}"
        seconds[name], held[name] = found["seconds"], found["bytes"]
    return runner.summarise(seconds, subject=f"choosing one of {_MANY:,} adapters", peaks=held)


def main() -> None:
    """Hold a thousand adapters in this process."""
    bench, (kind,) = child.settings()
    model = random_pipeline(bench).unet
    adapter = svdiff.attach(model, cache=RandomFactors())
    deltas = [_deltas({"denoiser": model}, i, _KINDS[kind]) for i in range(4)]
    adapter.load_deltas(deltas[0], "first", activate=False)  # slots come with the first
    gc.collect()
    trim_heap()
    before = resident.bytes_now()
    for i in range(_MANY):
        adapter.load_deltas(deltas[i % len(deltas)], f"a{i}", activate=False)
    trim_heap()
    held = resident.bytes_now() - before
    rng, seconds = random.Random(0), []
    for _ in range(_SWITCHES):
        name = f"a{rng.randrange(_MANY)}"
        start = time.perf_counter()
        adapter.set_adapters(name)
        seconds.append(time.perf_counter() - start)
    child.report(seconds=seconds, bytes=held)


if __name__ == "__main__":
    main()
