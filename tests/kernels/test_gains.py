"""`svdiff::gains`, the bank as an op, against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svdiff_kernels import ops


def arguments(A: int, samples: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    R, split = 23, 17
    base, floor = torch.rand(R, dtype=dtype), torch.zeros(R, dtype=dtype)
    base[3] = floor[3]  # a tie, where the deltas are zero
    deltas = [torch.randn(n, dtype=dtype) for _ in range(A) for n in (split, R - split)]
    for matrices in deltas[::2]:
        matrices[3] = 0
    mix = torch.randn((A,) if samples is None else (samples, A), dtype=dtype)
    return base, floor, mix, deltas


@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("A", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_its_formula(dtype: torch.dtype, A: int, samples: int | None) -> None:
    base, floor, mix, deltas = arguments(A, samples, dtype)
    gain, held = ops.gains(base, floor, mix, deltas)
    rows = torch.stack([torch.cat([m, v]) for m, v in zip(deltas[::2], deltas[1::2], strict=True)])
    wanted = base + mix @ rows
    torch.testing.assert_close(gain, torch.maximum(wanted, floor))
    assert torch.equal(held, wanted <= floor) and held[..., 3].all() and not held.all()

    dgain = torch.randn_like(gain)
    adapters = [0, A - 1]
    got = ops.gains_backward(dgain, held, mix, adapters)
    flat, free = mix.reshape(-1, A), dgain.masked_fill(held, 0).reshape(-1, base.numel())
    torch.testing.assert_close(got, (flat.T @ free)[adapters])
    assert ops.gains_backward(dgain, held, mix, []).shape == (0, base.numel())


@pytest.mark.parametrize("samples", [None, 2])
def test_opcheck(samples: int | None) -> None:
    base, floor, mix, deltas = arguments(2, samples, torch.float32)
    torch.library.opcheck(torch.ops.svdiff.gains.default, (base, floor, mix, deltas))
    gain, held = ops.gains(base, floor, mix, deltas)
    torch.library.opcheck(torch.ops.svdiff.gains_backward.default, (torch.randn_like(gain), held, mix, [1]))
