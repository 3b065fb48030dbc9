"""What the tests of Triton's kernels share: types, layouts of rows, tolerances, NaN around what a kernel reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from numerics import EXACT
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of what is kept and of the factors, and of what goes in and comes out.
TYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F16, BF16)]
# (leading dimensions, S, columns dense)
ROWS = [
    ((0,), 1, False),
    ((1,), 1, False),
    ((131,), 1, False),
    ((3, 29), 1, False),
    ((6, 5), 3, False),
    ((7,), 7, False),
    ((2, 71), 1, True),
    ((4, 7), 2, True),
    ((1, 50), 1, True),
]


def cases(sizes: Sequence[tuple[int, ...]], names: str) -> Any:
    """Every kind of rows with every size, each in two of the four mixtures of types, so that all meet."""
    pairs = [(row, size) for row in ROWS for size in sizes]
    return pytest.mark.parametrize(
        ("lead", "S", "columns", *names.split(), "kept", "out"),
        [
            (*row, *size, *types)
            for i, (row, size) in enumerate(pairs)
            for types in TYPES[(i + i // len(sizes)) % 2 :: 2]
        ],
        ids=lambda value: str(value).removeprefix("torch."),
    )


def random_rows(lead: tuple[int, ...], width: int, dtype: torch.dtype, columns: bool) -> Tensor:
    """``[*lead, width]``, rows dense or columns dense."""
    t = torch.randn(*lead, width).to(dtype)
    return t.transpose(1, 2).contiguous().transpose(1, 2) if columns else t


def random_scale(S: int, R: int) -> Tensor:
    """With a zero in it."""
    scale = torch.rand(S, R)
    scale[:, R // 2] = 0
    return scale


def by_rows(scale: Tensor, z: Tensor) -> Tensor:
    """A row of scale for every row of z."""
    return scale.repeat_interleave(z.shape[:-1].numel() // len(scale), 0).view(z.shape)


def in_nan(t: Tensor, device: str) -> Tensor:
    """The same with NaN around, for a kernel to read if it reads too far."""
    buffer = torch.full((t.numel() + 128,), float("nan"), dtype=t.dtype, device=device)
    return buffer.as_strided(t.shape, t.stride(), 64).copy_(t)


def bound(dtype: torch.dtype) -> float:
    """Sums are taken in fp32, so that the rounding of what is kept and of the result is all there is."""
    return EXACT.get(dtype, torch.finfo(dtype).eps)
