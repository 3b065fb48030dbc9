"""svdiff cache: what the store of decompositions holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from svdiff_kernels import FactorCache, SVDiffError


@dataclass
class CacheConfig:
    """Settings of `cache`."""

    action: Literal["ls", "path", "verify", "prune"] = field(
        metadata={"help": "ls: how much there is; path: where; verify: read all of it; prune: delete the oldest"}
    )
    svd_cache_dir: str | None = field(default=None, metadata={"help": "default: $SVDIFF_CACHE or the user's cache"})
    max_bytes: int | None = field(default=None, metadata={"help": "prune: what may stay"})


def cache(config: CacheConfig) -> str:
    """Do what `config.action` says; returns what to print.

    Raises:
        SVDiffError: verify found damaged objects, or prune was not told how much may stay.
    """
    store = FactorCache(config.svd_cache_dir)
    if config.action == "path":
        return str(store.dir)
    if config.action == "verify":
        if damaged := store.verify():
            path, reason = next(iter(damaged.items()))
            raise SVDiffError(f"{len(damaged)} damaged objects in {store.dir}, such as {path.name}: {reason}")
        return f"{store.size()[0]} decompositions, all sound"
    if config.action == "prune":
        if config.max_bytes is None or config.max_bytes < 0:
            raise SVDiffError("prune needs max_bytes: how much may stay")
        return f"{store.prune(config.max_bytes):,} bytes freed"
    objects, size = store.size()
    return f"{objects} decompositions, {size:,} bytes, in {store.dir}"
