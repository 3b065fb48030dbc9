"""What the kernels share: which tile a program makes, which sizes of tiles are tried, how rows are grouped."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import columns_dense

Tiles = tuple[tuple[int, ...], ...]
"""The sizes of a tile by dimension, warps, stages; the first runs where nothing is tuned."""

# (rows, columns, inner) in half precision.
HALF: Tiles = (
    (64, 64, 128, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 32, 128, 4, 4),
    (32, 64, 128, 4, 3),
    (16, 64, 64, 4, 4),
)
# In fp32, whose IEEE products run on the ordinary cores: larger tiles spill registers.
FULL: Tiles = ((32, 64, 32, 4, 3), (64, 64, 32, 8, 3), (16, 32, 64, 4, 3))
_GROUP = 8
LEAST_ROWS = 16
"""Of any tile."""


@triton.jit
def tile_of(pid, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """``(image, row of tiles, column of tiles)`` of a program; GROUP rows of tiles share what they read in the L2."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    tiles = row_tiles * column_tiles
    image, tile = pid // tiles, pid % tiles
    first = tile // (GROUP * column_tiles) * GROUP
    size = min(row_tiles - first, GROUP)
    inside = tile % (GROUP * column_tiles)
    return image.to(tl.int64), first + inside % size, inside // size


@triton.jit
def of_member(values, member):
    """``values[member]`` of pointers or numbers that came as a tuple, one for each layer of a group."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(member == i, values[i], value)
    return value


@triton.jit
def rounded(b, TYPE: tl.constexpr):
    """b in a type, by way of fp32: from one half precision to another, Hopper converts single numbers, slowly."""
    return b if b.dtype == TYPE else b.to(tl.float32).to(TYPE)


def autotuned(
    *key: str, sizes: Sequence[str], operand: str, half: Tiles = HALF, full: Tiles = FULL
) -> Callable[[Any], Any]:
    """Tune a kernel over tiles of the named sizes, anew for each value of the arguments in `key`.

    What was found stays in Triton's cache on disk. ``SVDIFF_AUTOTUNE=0`` takes the first tile unseen, for runs that
    must repeat to the bit; so does Triton's interpreter. `operand` names the matrix, or the tuple of matrices, whose
    type tells fp32 from half precision.
    """

    def configs(tiles: Tiles) -> list[triton.Config]:
        return [
            triton.Config({**dict(zip(sizes, tile[:-2], strict=True)), "GROUP": _GROUP}, num_warps=warps, num_stages=n)
            for tile in tiles
            for warps, n in [tile[-2:]]
        ]

    half_tiles, full_tiles = configs(half), configs(full)

    def tiles(*, full: bool) -> list[triton.Config]:
        return full_tiles if full else half_tiles

    def prune(_: list[triton.Config], arguments: Mapping[str, Any], **more: Any) -> list[triton.Config]:
        matrix = arguments[operand]
        mine = tiles(full=(matrix[0] if isinstance(matrix, tuple) else matrix).dtype == torch.float32)
        fixed = triton.knobs.runtime.interpret or os.environ.get("SVDIFF_AUTOTUNE") == "0"
        return mine[:1] if fixed else mine

    def tune(kernel: Any) -> Any:
        # Milliseconds a tile, a fifth of what Triton would take: a UNet has dozens of shapes.
        timing = functools.partial(triton.testing.do_bench, warmup=5, rep=20)
        pruning = {"early_config_prune": prune}
        tuned = triton.autotune(
            half_tiles + full_tiles, list(key), prune_configs_by=pruning, do_bench=timing, cache_results=True
        )(kernel)
        tuned.tiles = tiles
        return tuned

    return tune


def types_of(*tensors: Tensor) -> str:
    """For the tuner's key: it sees the type of a tensor, but not of those in a tuple."""
    return " ".join(str(t.dtype) for t in tensors)


def bucket(rows: int) -> int:
    """Row counts that share a tuned tile: up to the next power of two."""
    return triton.next_power_of_2(rows)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of anything else, none to speak of."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def precision() -> str:
    """How `tl.dot` multiplies fp32: in TF32 only where torch may."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def as_images(t: Tensor, S: int) -> Tensor:
    """``[*, n]`` as ``[B, P, n]``, in which no image has rows of two samples; a view if t is dense."""
    first = t.shape[0] if t.dim() > 1 else 1
    if first % S:
        raise ValueError(f"{S} samples do not split the first dimension, {first}, evenly")
    return t if columns_dense(t) else t.reshape(S, -1, t.shape[-1])
