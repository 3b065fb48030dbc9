"""svdiff cache: build, share and look after the store of decompositions."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from svdiff_kernels import FactorCache, SVDiffError
from svdiff_kernels.decompose import cost

from .attached import weight_of
from .pipelines import denoiser_of, load_pipeline, text_encoders_of
from .processes import is_first
from .progress import arithmetic_bar
from .sharing import place_of, pull, push
from .targets import select

Action = Literal["build", "push", "pull", "ls", "path", "verify", "prune"]


@dataclass
class CacheConfig:
    """Settings of `cache`."""

    action: Action = field(
        metadata={
            "help": "build MODEL: decompose all its weights; push MODEL TO, pull MODEL FROM: share that with a folder "
            "or a hub repository; ls: what there is; path: where; verify: read all of it; prune: delete what was used "
            "longest ago"
        }
    )
    model: str | None = field(default=None, metadata={"help": "build, push, pull: a folder, hub id, or miniature"})
    remote: str | None = field(
        default=None, metadata={"help": "push, pull: a folder (with a slash in front, or ./), or a hub repository"}
    )
    svd_cache_dir: str | None = field(default=None, metadata={"help": "default: $SVDIFF_CACHE or the user's cache"})
    rank: int | None = field(
        default=None, metadata={"help": "build, push, pull: so many singular values of each weight; default: all"}
    )
    layout: Literal["auto", "full", "compact"] = field(
        default="auto",
        metadata={"help": "build: full loads faster on a CPU, compact takes a quarter of the disk; auto: by the GPU"},
    )
    factor_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "of U and Vh on disk; svdiff train looks for float32"}
    )
    text_encoder: bool = field(default=False, metadata={"help": "build, push, pull: the text encoders too"})
    revision: str | None = field(default=None, metadata={"help": "of the model on the hub"})
    variant: str | None = field(default=None, metadata={"help": "of the model's weight files, such as fp16"})
    private: bool = field(default=False, metadata={"help": "push: make a new hub repository a private one"})
    max_bytes: int | None = field(default=None, metadata={"help": "prune: what may stay"})


def cache(config: CacheConfig) -> str | None:
    """Do what `config.action` says; returns what to print.

    Raises:
        SVDiffError: a setting that the action needs is missing; the model or the remote cannot be read or written;
            verify found damaged objects.
    """
    layout = None if config.layout == "auto" else config.layout
    store = FactorCache(config.svd_cache_dir, layout=layout, dtype=config.factor_dtype)
    if config.action == "path":
        return str(store.dir)
    if config.action == "ls":
        return _listing(store)
    if config.action == "verify":
        return _verify(store)
    if config.action == "prune":
        if config.max_bytes is None or config.max_bytes < 0:
            raise SVDiffError("prune needs max_bytes: how much may stay")
        return f"{store.prune(config.max_bytes):,} bytes freed"
    if config.model is None:
        raise SVDiffError(f"{config.action} needs a model: svdiff cache {config.action} MODEL")
    if config.action != "build" and config.remote is None:
        raise SVDiffError(f"{config.action} needs a place: svdiff cache {config.action} MODEL PLACE")
    if config.action == "build":
        return build(store, _weights(config), config.rank)
    assert config.remote is not None
    place = place_of(config.remote, must_exist=config.action == "pull")  # before the model is loaded for nothing
    wanted = store.wanted(_weights(config), config.rank)
    return push(store, wanted, place, private=config.private) if config.action == "push" else pull(store, wanted, place)


def build(store: FactorCache, weights: Mapping[str, Tensor], rank: int | None = None) -> str | None:
    """Have the store decompose all weights that it lacks; returns a summary.

    Under torchrun or ``accelerate launch`` every process does this. They share the work by the locks of the store,
    which must then be one folder for all machines; only the first process reports.
    """
    costs = {name: cost(weight) for name, weight in weights.items()}
    with arithmetic_bar(sum(costs.values()), "Decomposing") as bar:
        for name, _ in store.iterate(weights, rank):
            bar.advance(costs[name])
    store.prune()
    if not is_first():
        return None
    objects, size = store.size()
    return f"all {len(weights)} weights are decomposed; {objects} decompositions, {size:,} bytes, in {store.dir}"


def _weights(config: CacheConfig) -> dict[str, Tensor]:
    """What attach would decompose of a model, by its part and path; on the GPU of this process, if there is one."""
    assert config.model is not None
    pipeline = load_pipeline(config.model, revision=config.revision, variant=config.variant)
    parts: dict[str, Any] = {"denoiser": denoiser_of(pipeline)}
    if config.text_encoder:
        parts |= text_encoders_of(pipeline)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        parts = {role: model.to(device) for role, model in parts.items()}
    return {
        f"{role}.{path}": weight_of(module).detach()
        for role, model in parts.items()
        for path, module in select(model, one_dim=False, embeddings=role != "denoiser").items()
    }


def _listing(store: FactorCache) -> str:
    lines = []
    for path, status, told in store.entries():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
        size = f"{status.st_size / 1e6:.1f} MB"
        shape = told["shape"].strip("[]").replace(", ", "x")
        how = f"rank {told['rank']:>4}  {told['layout']:>7}  {told['dtype']:>8}"
        lines.append(f"{path.stem[:12]}  {shape:>12}  {how}  {size:>9}  {used}")
    objects, size_in_all = store.size()
    return "\n".join([*lines, f"{objects} decompositions, {size_in_all:,} bytes, in {store.dir}"])


def _verify(store: FactorCache) -> str:
    if damaged := store.verify():
        path, reason = next(iter(damaged.items()))
        raise SVDiffError(f"{len(damaged)} damaged objects in {store.dir}, such as {path.name}: {reason}")
    return f"{store.size()[0]} decompositions, all sound"
