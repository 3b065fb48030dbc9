"""CUDA graphs: nothing in a layer or a bank waits for the host, whoever serves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from svdiff_kernels import Bank
from svdiff_kernels.nn import SpectralConv2d, SpectralLinear


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_of_a_step_gives_the_bits_of_the_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_AUTOTUNE", "0")  # or a tile chosen later might sum in another order
    net = nn.Sequential(
        SpectralConv2d.from_module(nn.Conv2d(8, 32, 3, padding=1)),
        nn.Flatten(2),
        SpectralLinear.from_module(nn.Linear(64, 48)),
        SpectralLinear.from_module(nn.Linear(48, 40), rank=16),
    ).to("cuda", dtype)
    bank = Bank({str(i): net[i] for i in (0, 2, 3)}, net)
    matrices, _ = bank.trained
    nn.init.normal_(matrices, std=0.1)
    x = torch.randn(2, 8, 8, 8, device="cuda", dtype=dtype)

    def step() -> torch.Tensor:
        matrices.grad.zero_()
        loss = net(x).float().square().mean()
        loss.backward()
        return loss.detach()

    matrices.grad = torch.zeros_like(matrices)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(2):
        torch.manual_seed(seed)
        x.normal_()
        nn.init.normal_(matrices, std=0.1)
        wanted, gradient = step().clone(), matrices.grad.clone()
        graph.replay()
        assert torch.equal(captured, wanted) and torch.equal(matrices.grad, gradient)
