"""svdiff_kernels/cuda.py: what is made of the extension's kernels, and what is left to others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from numerics import EXACT, relative

from svdiff_kernels import cuda as served
from svdiff_kernels import reference

pytestmark = pytest.mark.timeout(900)  # the first test compiles the emulated device, or waits for who does

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.fixture
def device(cuda: Any) -> Iterator[str]:
    """Where to put tensors; without a GPU the emulated kernels are what the CPU has for these ops."""
    library = torch.library.Library("svdiff_cuda", "IMPL")
    if cuda.device == "cpu":
        for name in ("expand", "expand_backward", "project", "gains", "gains_backward"):
            library.impl(name, lambda *arguments, name=name: cuda(name, *arguments), "CPU")
    yield cuda.device
    library._destroy()


@pytest.mark.parametrize("scaled", [False, True], ids=["z", "scaled z"])
@pytest.mark.parametrize(("lead", "S"), [((1,), 1), ((131,), 1), ((6, 5), 3), ((7,), 7)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_whole_layers(dtype: torch.dtype, lead: tuple[int, ...], S: int, scaled: bool, device: str) -> None:
    N, M, r, alpha = 24, 40, 16, 0.25
    x, dy = torch.randn(*lead, N).to(dtype), torch.randn(*lead, M).to(dtype)
    U, Vh, bias = (torch.randn(*shape).to(dtype) for shape in ((M, r), (r, N), (M,)))
    scale = torch.rand(S, r) + 0.1
    scale[:, 3] = 0
    arguments = [t.to(device) for t in (x, U, scale, Vh, bias)]
    assert served.can_serve("linear", arguments)
    y, kept = served.linear(*arguments, alpha, scaled)
    z64 = alpha * x.double() @ Vh.double().T
    rows = scale.double().repeat_interleave(z64.shape[:-1].numel() // S, 0).view(z64.shape)
    bound = 4 * EXACT.get(dtype, torch.finfo(dtype).eps)
    assert relative(y.cpu(), (z64 * rows) @ U.double().T + bias.double()) <= bound
    assert relative(kept.cpu(), z64 * rows if scaled else z64) <= bound

    arguments = [dy.to(device), kept, *arguments[1:4]]
    assert served.can_serve("linear_backward", arguments)
    dx, dscale = served.linear_backward(*arguments, alpha, scaled, True)
    b = dy.double() @ U.double()
    sums = (z64 * b).reshape(S, -1, r).sum(1)
    assert relative(dx.cpu(), alpha * (rows * b) @ Vh.double()) <= bound
    assert relative(dscale.cpu(), torch.where(scale > 0, sums, 0) if scaled else sums) <= bound


@pytest.mark.parametrize("samples", [None, 3])
def test_the_bank(samples: int | None, device: str) -> None:
    R, split, A = 23, 17, 2
    base, floor = torch.rand(R), torch.zeros(R)
    deltas = [torch.randn(n) for _ in range(A) for n in (split, R - split)]
    mix = torch.randn((A,) if samples is None else (samples, A))
    on = [t.to(device) for t in (base, floor, mix)]
    arguments = (*on, [d.to(device) for d in deltas])
    assert served.can_serve("gains", arguments)
    gain, held = served.gains(*arguments)
    wanted, wanted_held = reference.gains(base, floor, mix, deltas)
    torch.testing.assert_close(gain.cpu(), wanted)
    assert torch.equal(held.cpu(), wanted_held)
    dgain = torch.randn_like(wanted)
    grads = served.gains_backward(dgain.to(device), held, on[2], [1])
    torch.testing.assert_close(grads.cpu(), reference.gains_backward(dgain, wanted_held, mix, [1]))


@pytest.mark.parametrize(("rows", "factors"), [(BF16, F16), (F64, F64), (F32, F16)], ids=str)
def test_what_is_left_to_others(rows: torch.dtype, factors: torch.dtype, device: str) -> None:
    x, U, Vh = torch.zeros(4, 5, dtype=rows), torch.zeros(7, 3, dtype=factors), torch.zeros(3, 5, dtype=factors)
    scale, dy = torch.ones(1, 3), torch.zeros(4, 7, dtype=rows)
    assert not served.can_serve("linear", (x, U, scale, Vh, None, 1.0, True))
    assert not served.can_serve("linear_backward", (dy, None, U, scale, Vh, 1.0, True, True))
    assert not served.can_serve("expand_backward", (dy, None, U, scale, True))
