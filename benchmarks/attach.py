"""Attaching a model whose decompositions are on disk, in the system's page cache, and what bounds it: reading them.

The model is loaded anew each time, as diffusers loads it, and that is left out.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import svdiff
from svdiff.bench import BenchConfig
from torch import nn
from tqdm.auto import tqdm

from svdiff_kernels import FactorCache

from . import baselines, registry, runner
from .models import make_distinct, random_unet

_OURS = "attach, full layout"
_CHUNK = 2**26  # about a weight: memory that the process has had before takes bytes faster than new one


def run(bench: BenchConfig) -> list[runner.Timing]:
    """Measure; the first timing is attach with a cache in the full layout."""
    from diffusers import UNet2DConditionModel

    config = Path(bench.config) if bench.config else registry.CONFIGS / registry.MODELS[bench.model]
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-") as place:
        folder = Path(place)
        model = random_unet(config, runner.DTYPES[bench.dtype])
        make_distinct(model)
        model.save_pretrained(folder / "unet")
        del model

        def load() -> Any:
            return UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=runner.DTYPES[bench.dtype])

        stores = {layout: FactorCache(folder / layout, layout=layout) for layout in ("full", "compact")}
        for store in stores.values():
            svdiff.attach(load(), rank=bench.rank, cache=store)
        ways = _ways(stores, folder, bench)
        with tqdm(total=bench.rounds * len(ways)) as progress:
            for _ in range(bench.rounds):
                for name in rng.sample(list(ways), len(ways)):
                    progress.set_description(name)
                    model = load()
                    start = time.perf_counter()
                    ways[name](model)
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
                    del model
                    gc.collect()
                    progress.update()
    return runner.summarise({name: seconds[name] for name in ways}, subject=f"{config.stem}, decompositions on disk")


def _ways(stores: dict[str, FactorCache], folder: Path, bench: BenchConfig) -> dict[str, Callable[[nn.Module], object]]:
    def attach(store: FactorCache, **how: Any) -> Callable[[nn.Module], object]:
        return lambda model: svdiff.attach(model, rank=bench.rank, cache=store, **how)

    def lora(model: nn.Module) -> None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        baselines.add_lora(model, names, bench.lora_rank)

    objects = {layout: sorted(store.dir.glob("objects/*/*")) for layout, store in stores.items()}
    weights = sorted((folder / "unet").glob("*.safetensors"))
    return {
        _OURS: attach(stores["full"]),
        "attach, compact layout": attach(stores["compact"]),
        "attach, full layout, lazily": attach(stores["full"], lazy=True),
        "reading the full layout's bytes": lambda _: _read(objects["full"]),
        "reading the compact layout's bytes": lambda _: _read(objects["compact"]),
        "reading full layout and weights": lambda _: _read(objects["full"] + weights),
        f"PEFT LoRA r={bench.lora_rank}": lora,
        runner.CONTROL: attach(stores["full"]),
    }


def _read(files: list[Path]) -> None:
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass
