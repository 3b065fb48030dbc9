"""Kernels run on a GPU where there is one, and in Triton's interpreter elsewhere, which is made honest about bf16."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

_BAND, _MARK = 64, 12345.0


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="session")
def _honest_bf16() -> Iterator[None]:
    """The interpreter multiplies the bits of bf16 as integers, and truncates where hardware rounds to even."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, _decoded(a), _decoded(b), *rest)

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar == tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(cast(self, src, tl.float32).data).bfloat16().view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    yield
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast


@pytest.fixture(autouse=True, scope="session")
def _swift_calls() -> Iterator[None]:
    """A launch patches the language once for each module of functions: again in every call takes half of the time."""
    launch, call = GridExecutor.__call__, InterpretedFunction.__call__
    patched: set[str] = set()

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def call_swiftly(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    GridExecutor.__call__, InterpretedFunction.__call__ = launch_afresh, call_swiftly
    yield
    GridExecutor.__call__, InterpretedFunction.__call__ = launch, call


@pytest.fixture(autouse=True, scope="session")
def _programs_in_any_order() -> Iterator[None]:
    """As on a GPU: a sum whose order is that of the programs has other bits the second time."""
    start, go = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    chance = random.Random(0)

    def set_grid_dim(self: Any, *grid: int) -> None:
        start(self, *grid)
        programs = list(itertools.product(*map(range, grid)))
        self.order = dict(zip(programs, chance.sample(programs, len(programs)), strict=True))

    def set_grid_idx(self: Any, *program: int) -> None:
        go(self, *self.order[program])

    InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx = set_grid_dim, set_grid_idx
    yield
    InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx = start, go


def _decoded(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every `new_empty` of the test lies poisoned with NaN between two bands, which must be intact in the end."""
    new_empty = Tensor.new_empty
    buffers: list[Tensor] = []

    def between_bands(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if rest:  # the interpreter's own
            return new_empty(self, *size, dtype=dtype, **rest)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = new_empty(self, shape.numel() + 2 * _BAND, dtype=dtype or self.dtype).fill_(_MARK)
        buffers.append(buffer)
        return buffer[_BAND:-_BAND].fill_(float("nan")).view(shape)

    monkeypatch.setattr(Tensor, "new_empty", between_bands)
    yield
    monkeypatch.undo()
    assert buffers
    mark = torch.tensor(_MARK)
    for buffer in buffers:
        assert (buffer[:_BAND] == mark.to(buffer.dtype)).all() and (buffer[-_BAND:] == mark.to(buffer.dtype)).all()


def pytest_collection_modifyitems() -> None:
    """These tests would compile for a GPU that is not there, if triton came before the variable."""
    assert torch.cuda.is_available() or triton.knobs.runtime.interpret, "TRITON_INTERPRET was set too late"
