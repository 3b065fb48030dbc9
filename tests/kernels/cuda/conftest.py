"""The ops of torch.ops.svdiff_cuda: on a GPU where there is one, else compiled for the CPU and run there."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from svdiff_kernels import backends
from tests.kernels.cuda import toolchain


@dataclass
class Ops:
    """Calls ops by name, on tensors of a device."""

    device: str
    library: ctypes.CDLL | None = None

    def __call__(self, name: str, *arguments: Any) -> Any:
        op = getattr(torch.ops.svdiff_cuda, name).default
        if self.library is None or name.startswith("serves"):
            return op(*arguments)
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return op.redispatch(keys, *arguments)  # what is registered for GPUs, given tensors of the CPU

    def emulate(self, major: int, minor: int) -> None:
        """Give the device that is not there a compute capability."""
        self.library.svdiff_emulate(major, minor)

    def fused(self) -> int:
        """How many GEMMs of our own the emulated device has run."""
        return self.library.svdiff_fused()


@pytest.fixture(scope="session")
def emulator() -> Ops:
    if not backends.why_no_cuda:
        pytest.skip("the extension has these ops already")
    if toolchain.nvcc() is None:
        pytest.skip("no nvcc: its headers are wanted")
    path = toolchain.emulated()
    torch.ops.load_library(path)
    return Ops("cpu", ctypes.CDLL(str(path)))


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ops:
    """The ops, on a GPU with tensor cores, or an emulated one."""
    if torch.cuda.is_available():
        if backends.why_no_cuda:
            pytest.skip(backends.why_no_cuda)
        return Ops("cuda")
    emulated = request.getfixturevalue("emulator")
    emulated.emulate(9, 0)
    return emulated


@pytest.fixture(scope="session", autouse=True)
def _products_in_fp32() -> torch.library.Library | None:
    """cuBLAS gives products of half precision in fp32, unrounded; torch has none such for CPUs."""
    if torch.cuda.is_available():
        return None
    aten = torch.library.Library("aten", "IMPL")
    for op in ("mm.dtype", "bmm.dtype"):
        aten.impl(op, lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    return aten
