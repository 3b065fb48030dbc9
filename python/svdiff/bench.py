"""svdiff bench: measurements against what users would pick instead; they live in the repository's benchmarks/."""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from svdiff_kernels import SVDiffError

Level = Literal[
    "unet",
    "block",
    "layer",
    "sweep",
    "op",
    "overhead",
    "infer",
    "pipeline",
    "train",
    "loop",
    "memory",
    "start",
    "attach",
    "svd",
    "levers",
]
RIVALS = ("lora", "lora-attention", "lora-compiled", "naive", "broadcast", "parametrize", "frozen")
"""What a UNet is measured against; the last does nothing but pass gradients on."""

_LEVELS: dict[Level, str] = {
    "unet": "a training step of a whole UNet",
    "block": "of each of its blocks",
    "layer": "of each distinct layer",
    "sweep": "of square layers, for few rows and many",
    "op": "our op in each distinct layer",
    "overhead": "what a call costs before any arithmetic",
    "infer": "a forward pass with another fine-tune for every sample",
    "pipeline": "pictures with another fine-tune for every prompt; fusing, switching, a thousand adapters",
    "train": "a step of svdiff train on the miniature",
    "loop": "what svdiff train adds to a step of a whole pipeline, and its start",
    "memory": "the most memory that a training step holds",
    "start": "from a base model to the end of the first step",
    "attach": "attaching, with the decompositions on disk, against reading them",
    "svd": "decomposing all weights of a model",
    "levers": "what changes that were not made would save",
}
_ON_CPUS = ("pipeline", "loop", "start", "attach", "levers")
_OF_A_UNET = ("unet", "block", "infer", "pipeline", "memory", "loop", "start", "attach", "levers")
_QUICK_CONFIG, _QUICK_LATENTS, _QUICK_ROUNDS = "quick_unet.json", 16, 40
# Not the naive one: it takes half of the time, and its own noise would make the comparison uncertain.
_QUICK_RIVALS = ("lora", "frozen")


@dataclass
class BenchConfig:
    """Settings of `bench`."""

    level: Level = field(metadata={"help": "; ".join(f"{level}: {what}" for level, what in _LEVELS.items())})
    model: Literal["sd15", "sd21", "sdxl", "flux", "clip"] = field(
        default="sd15", metadata={"help": "whose shapes; flux (one block of each kind) and clip are no UNets"}
    )
    latents: int = field(default=32, metadata={"help": "side of the latent image; 8 pixels of the picture each"})
    batch: int = field(default=1, metadata={"help": "pictures per step"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "of the model"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "where; auto: a GPU if there is one"}
    )
    graph: bool = field(
        default=False,
        metadata={"help": "on a GPU: op, layer, sweep time CUDA graphs, without launches; unet times both"},
    )
    one_dim: Literal["vector", "scalar", "none"] = field(
        default="none", metadata={"help": "how we train norms too; none: the same layers as the rivals"}
    )
    rank: int | None = field(
        default=None, metadata={"help": "we train this many singular values of each weight; default: all"}
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA on all the same layers"})
    rivals: list[str] = field(
        default_factory=lambda: ["lora", "naive", "frozen"],
        metadata={
            "help": "unet, block, memory: what to measure against; svd: naive is LAPACK's SVD",
            "choices": RIVALS,
        },
    )
    memory_gb: float | None = field(default=None, metadata={"help": "memory: a contender fails beyond so much"})
    rounds: int = field(default=7, metadata={"help": "steps counted of each contender"})
    quick: bool = field(
        default=False,
        metadata={"help": "unet: a small one, with latents, rounds and rivals of its own: what did a change do?"},
    )
    handicap: float = field(
        default=0.0, metadata={"help": "unet: slow our own step down by this share, to see whether compare.py notices"}
    )
    config: str | None = field(default=None, metadata={"help": "another UNet's JSON configuration"})
    output: str | None = field(default=None, metadata={"help": "also write JSON lines to this file"})


def bench(config: BenchConfig) -> str:
    """Measure, and return a table of medians and ratios. What was measured before an interruption is written too.

    Raises:
        SVDiffError: a setting is off, or the benchmarks are not here, as with an installed wheel.
    """
    for name in ("latents", "batch", "lora_rank", "rounds"):
        if getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 1, not {getattr(config, name)}")
    if unknown := sorted(set(config.rivals) - set(RIVALS)):
        raise SVDiffError(f"rival {unknown[0]!r} is not one of {', '.join(RIVALS)}")
    if config.rank is not None and config.rank < 1:
        raise SVDiffError(f"rank must be at least 1, not {config.rank}")
    if config.level in _OF_A_UNET and config.model in ("flux", "clip") and not config.config:
        raise SVDiffError(f"{config.model} is not a UNet: use bench layer")
    if config.quick and (config.level != "unet" or config.config):
        raise SVDiffError("quick is a way of bench unet, and brings its own config")
    checkout = next(
        (d for d in (Path(__file__).parents[2], Path.cwd()) if (d / "benchmarks" / "runner.py").is_file()), None
    )
    if checkout is None:
        raise SVDiffError("the benchmarks are not part of the wheel: run this from a checkout of the repository")
    if config.quick:
        own = str(checkout / "benchmarks" / "configs" / _QUICK_CONFIG)
        config = replace(config, config=own, latents=_QUICK_LATENTS, rounds=_QUICK_ROUNDS, rivals=list(_QUICK_RIVALS))
    sys.path.insert(0, str(checkout))
    names = ("runner", "machine", "device")
    runner, machine, devices = (importlib.import_module(f"benchmarks.{name}") for name in names)
    wanted = "cpu" if config.level in _ON_CPUS and config.device == "auto" else config.device
    config = replace(config, device=devices.select(wanted))
    if config.device == "cuda" and config.level in _ON_CPUS:
        raise SVDiffError(f"bench {config.level} measures CPUs only")
    if config.device == "cpu" and config.graph:
        raise SVDiffError("a graph is one of CUDA: it needs --device cuda")
    dtype = runner.DTYPES[config.dtype]
    machine.measure(dtype, config.device)
    runner.finished.clear()
    try:
        timings = importlib.import_module(f"benchmarks.{config.level}").run(config)
        machine.measure(dtype, config.device)  # again, since a shared machine may have been busy before
    except BaseException:
        if runner.finished:  # hours, perhaps
            _write(config, runner, runner.finished)
        raise
    _write(config, runner, timings)
    return runner.table(timings, dtype, config.device)


def _write(config: BenchConfig, runner: Any, timings: list[Any]) -> None:
    if config.output:
        about = {key: value for key, value in asdict(config).items() if key not in ("output", "rounds", "config")}
        runner.write_lines(Path(config.output), timings, **about)
