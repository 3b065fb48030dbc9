"""What the tests of Triton's and of CUDA's kernels share: types, layouts of rows, arguments with NaN around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


def cases(
    names: str,
    sizes: Sequence[tuple[int, ...]],
    *,
    rows: Sequence[tuple[tuple[int, ...], int, bool]] = ROWS,
    types: Sequence[tuple[torch.dtype, torch.dtype]] = TYPES,
    every: int = 1,
) -> Any:
    """Every kind of rows with every size (of these names), in one of `every` mixtures of types, so that all meet."""
    pairs = [(row, size) for row in rows for size in sizes]
    return pytest.mark.parametrize(
        ("lead", "S", "columns", *names.split(), "kept", "out"),
        [
            (*row, *size, *mixture)
            for i, (row, size) in enumerate(pairs)
            for mixture in types[(i + i // len(sizes)) % every :: every]
        ],
        ids=lambda value: str(value).removeprefix("torch."),
    )


@dataclass
class Case:
    """Arguments of `ops.expand` and its backward, and what fp64 makes of them."""

    z: Tensor
    U: Tensor
    scale: Tensor
    bias: Tensor
    dy: Tensor

    @classmethod
    def make(
        cls, lead: tuple[int, ...], S: int, columns: bool, M: int, R: int, kept: torch.dtype, out: torch.dtype
    ) -> Case:
        scale, z = random_scale(S, R), random_rows(lead, R, kept, columns)
        U, bias = (torch.randn(M, R) * R**-0.5).to(kept), torch.randn(M).to(out)
        return cls(z, U, scale, bias, random_rows(lead, M, out, columns))

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """y, dz and dscale."""
        z, U, scale, bias, dy = (t.double() for t in (self.z, self.U, self.scale, self.bias, self.dy))
        rows = by_rows(scale, z)
        b = dy @ U
        dscale = (z * b).reshape(len(scale), -1, z.shape[-1]).sum(1)
        return (z * rows) @ U.T + bias, rows * b, dscale

    def to(self, device: str, *, aligned: bool = True) -> Case:
        """The same with NaN around every tensor; not aligned, U does not start where TMA could read it."""
        U = in_nan(self.U, device, 64 if aligned else 65)
        z, scale, bias, dy = (in_nan(t, device) for t in (self.z, self.scale, self.bias, self.dy))
        return Case(z, U, scale, bias, dy)


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


def in_nan(t: Tensor, device: str, start: int = 64) -> Tensor:
    """The same with NaN around, `start` numbers of it before, for a kernel to read if it reads too far."""
    buffer = torch.full((t.numel() + start + 64,), float("nan"), dtype=t.dtype, device=device)
    return buffer.as_strided(t.shape, t.stride(), start).copy_(t)


def bound(*types: torch.dtype) -> float:
    """Sums are taken in fp32, so that the rounding of what is kept and of the result is all there is."""
    return max(EXACT.get(t, torch.finfo(t).eps) for t in types)
