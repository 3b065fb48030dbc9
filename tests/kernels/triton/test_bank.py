"""The bank's gains and their gradients in Triton, against the bank's own arithmetic in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernels.cases import in_nan
from numerics import EXACT, relative
from torch import Tensor

from svdiff_kernels.bank import _Gains
from svdiff_kernels.triton.bank import gains, gains_backward


@dataclass
class Case:
    """Arguments of the launcher."""

    base: Tensor
    floor: Tensor
    mix: Tensor
    deltas: list[Tensor]

    @classmethod
    def make(cls, S: int | None, A: int, sizes: tuple[int, int], device: str) -> Case:
        R = sum(sizes)
        floor = torch.where(torch.rand(R) < 0.5, 0.0, -torch.rand(R))  # of gains and of what residual forms add
        tensors = [torch.rand(R) / 2, floor, torch.randn(A) if S is None else torch.randn(S, A)]
        deltas = [in_nan(torch.randn(size), device) for _ in range(A) for size in sizes]
        return cls(*(in_nan(t, device) for t in tensors), deltas)

    def truth(self, dgain: Tensor) -> tuple[Tensor, list[Tensor]]:
        deltas = [d.double().requires_grad_() for d in self.deltas]
        gain = _Gains.apply(self.base.double(), self.floor.double(), self.mix.double(), *deltas)
        return gain.detach(), list(torch.autograd.grad(gain, deltas, dgain.double()))


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("S", [None, 1, 3])
@pytest.mark.parametrize("A", [1, 2, 3, 8, 9, 19])
@pytest.mark.parametrize("sizes", [(1, 0), (1023, 2), (2500, 70), (37, 1100)], ids=str)
def test_matches_fp64(sizes, A, S, device) -> None:
    case = Case.make(S, A, sizes, device)
    gain, held = gains(case.base, case.floor, case.mix, case.deltas)
    dgain = torch.randn_like(gain)
    true_gain, true_grads = case.truth(dgain)
    assert relative(gain, true_gain) <= EXACT[torch.float32]
    assert torch.equal(held, true_gain <= case.floor)
    wanted = [a for a in range(A) if a != 1]
    grads = gains_backward(dgain, held, case.mix, wanted)
    for a, grad in zip(wanted, grads, strict=True):
        assert relative(grad, torch.cat(true_grads[2 * a : 2 * a + 2])) <= EXACT[torch.float32]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("S", [None, 2])
def test_the_floor_holds_at_ties_and_nan_passes(S, device) -> None:
    base, floor = torch.tensor([1.0, 1.0, float("nan"), 2.0]), torch.tensor([1.0, 1.5, 0.0, 0.0])
    mix = torch.zeros(1) if S is None else torch.zeros(S, 1)
    deltas = [torch.ones(3), torch.ones(1)]
    gain, held = gains(*(t.to(device) for t in (base, floor, mix)), [d.to(device) for d in deltas])
    gain, held = (t.view(-1, 4)[-1].tolist() for t in (gain, held))
    assert gain[:2] == [1.0, 1.5] and gain[2] != gain[2] and gain[3] == 2.0
    assert held == [True, True, False, False]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("S", [None, 3])
def test_gradients_of_any_strides(S, device) -> None:
    case = Case.make(S, 2, (150, 7), device)
    gain, held = gains(case.base, case.floor, case.mix, case.deltas)
    dgain = torch.randn(1, device=device).expand(gain.shape)  # of a sum
    _, truth = case.truth(dgain)
    for a, grad in enumerate(gains_backward(dgain, held, case.mix, [0, 1])):
        assert relative(grad, torch.cat(truth[2 * a : 2 * a + 2])) <= EXACT[torch.float32]
