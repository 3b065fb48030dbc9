"""svdiff bench: measurements against what users would pick instead; they live in the repository's benchmarks/."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from svdiff_kernels import SVDiffError


@dataclass
class BenchConfig:
    """Settings of `bench`."""

    level: Literal["op", "layer", "unet", "svd"] = field(
        metadata={
            "help": "unet: a training step of a whole UNet; layer, op: of each of its layers, of our op in them; "
            "svd: decomposing its weights"
        }
    )
    model: Literal["sd15", "sd21", "sdxl", "flux", "clip"] = field(
        default="sd15", metadata={"help": "whose shapes; flux (one block of each kind) and clip are no UNets"}
    )
    latents: int = field(default=32, metadata={"help": "side of the latent image; 8 pixels of the picture each"})
    batch: int = field(default=1, metadata={"help": "pictures per step"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "of the model"})
    one_dim: Literal["vector", "scalar", "none"] = field(
        default="none", metadata={"help": "how we train norms too; none: the same layers as the rivals"}
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA on all the same layers"})
    rounds: int = field(default=7, metadata={"help": "steps counted of each contender"})
    config: str | None = field(default=None, metadata={"help": "unet: another UNet's JSON configuration"})
    output: str | None = field(default=None, metadata={"help": "also write JSON lines to this file"})


def bench(config: BenchConfig) -> str:
    """Measure, and return a table of medians and ratios.

    Raises:
        SVDiffError: a setting is off, or the benchmarks are not here, as with an installed wheel.
    """
    for name in ("latents", "batch", "lora_rank", "rounds"):
        if getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.level == "unet" and config.model in ("flux", "clip") and not config.config:
        raise SVDiffError(f"{config.model} is not a UNet: use bench layer")
    checkout = next(
        (d for d in (Path(__file__).parents[2], Path.cwd()) if (d / "benchmarks" / "runner.py").is_file()), None
    )
    if checkout is None:
        raise SVDiffError("the benchmarks are not part of the wheel: run this from a checkout of the repository")
    sys.path.insert(0, str(checkout))
    runner = importlib.import_module("benchmarks.runner")
    timings = importlib.import_module(f"benchmarks.{config.level}").run(config)
    return runner.table(timings, runner.DTYPES[config.dtype])
