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

    level: Literal["unet"] = field(metadata={"help": "unet: a training step of an SD 1.5-size UNet"})
    latents: int = field(default=32, metadata={"help": "side of the latent image; 8 pixels of the picture each"})
    batch: int = field(default=1, metadata={"help": "pictures per step"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "of the model"})
    one_dim: Literal["vector", "scalar", "none"] = field(
        default="none", metadata={"help": "how we train norms too; none: the same layers as the rivals"}
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA on all the same layers"})
    rounds: int = field(default=7, metadata={"help": "steps counted of each contender"})
    config: str | None = field(default=None, metadata={"help": "another UNet's JSON configuration"})
    output: str | None = field(default=None, metadata={"help": "also write JSON lines to this file"})


def bench(config: BenchConfig) -> str:
    """Measure, and return a table of medians and ratios.

    Raises:
        SVDiffError: a setting is off, or the benchmarks are not here, as with an installed wheel.
    """
    for name in ("latents", "batch", "lora_rank", "rounds"):
        if getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 1, not {getattr(config, name)}")
    checkout = next(
        (d for d in (Path(__file__).parents[2], Path.cwd()) if (d / "benchmarks" / "runner.py").is_file()), None
    )
    if checkout is None:
        raise SVDiffError("the benchmarks are not part of the wheel: run this from a checkout of the repository")
    sys.path.insert(0, str(checkout))
    timings = importlib.import_module(f"benchmarks.{config.level}").run(config)
    rows = [f"{'':32}{'seconds':>10}{'times ours':>12}{'p20-p80':>16}"]
    for t in timings:
        rows.append(f"{t.name:32}{t.p50:10.2f}{t.ratio_p50:12.2f}{f'{t.ratio_p20:.2f}-{t.ratio_p80:.2f}':>16}")
    return "\n".join(rows)
