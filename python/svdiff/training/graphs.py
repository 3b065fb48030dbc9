"""A training step's forward and backward as one CUDA graph: at batch 1 it is launches that a GPU waits for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_WARMUPS = 3  # allocators, autotuners and lazily made handles have settled by then


class GraphedStep:
    """Replays ``backward(loss(*batch))`` for batches of one shape, and adds to the gradients.

    The gradients stay the same tensors: clear them with ``zero_grad(set_to_none=False)``.

    Args:
        loss: of a batch's tensors; what it does must depend on nothing else that changes.
        backward: as ``Tensor.backward``.
        parameters: what trains.
    """

    def __init__(
        self, loss: Callable[..., Tensor], backward: Callable[[Tensor], object], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._loss, self._backward, self._parameters = loss, backward, parameters
        self._batch: list[Tensor] = []
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss, which the next call overwrites; the first call takes the time of a few, to capture the graph."""
        if self._replay is None:
            self._batch = [tensor.clone() for tensor in batch]
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
            self._replay = capture(self._run, warmups=_WARMUPS)
            for parameter in self._parameters:
                assert parameter.grad is not None
                parameter.grad.zero_()
        for kept, tensor in zip(self._batch, batch, strict=True):
            kept.copy_(tensor)
        return self._replay()

    def _run(self) -> Tensor:
        loss = self._loss(*self._batch)
        self._backward(loss)
        return loss.detach()


def capture(run: Callable[[], Tensor], *, warmups: int) -> Callable[[], Tensor]:
    """Record what ``run`` does on the GPU, after some calls of it; returns what does that again."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(warmups):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
