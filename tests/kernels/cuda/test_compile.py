"""Every CUDA source compiled for GPUs that need not be there: the right instructions, enough registers."""

from __future__ import annotations

import pytest

from csrc.cuda import build
from tests.kernels.cuda import toolchain
from tests.kernels.cuda.toolchain import Kernel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc"),
]
needs_cutlass = pytest.mark.skipif(not build.cutlass_includes(), reason="no CUTLASS (pip install nvidia-cutlass)")

_STACK = 64  # bytes
_PRODUCTS = {"gemm_sm90": "HGMMA", "gemm_sm100": "UTCHMMA"}


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if toolchain.cuobjdump() is None:
        pytest.skip("no cuobjdump: CUDA has it, and triton brings one")
    return toolchain.compile_kernels()


def of(kernels: list[Kernel], *sources: str) -> list[Kernel]:
    return [k for k in kernels if k.source in sources]


def test_registers_suffice(kernels: list[Kernel]) -> None:
    assert {(k.source, k.architecture) for k in of(kernels, *build.PLAIN)} == {
        (source, architecture) for source in build.PLAIN for architecture in toolchain.ARCHITECTURES
    }
    for k in kernels:
        assert k.stack <= _STACK, k
        assert not k.instructions.get("STL") and not k.instructions.get("LDL"), k


def test_no_sum_depends_on_the_order_of_blocks(kernels: list[Kernel]) -> None:
    for k in kernels:
        assert not k.instructions.keys() & set(toolchain.ATOMICS), k


@needs_cutlass
@pytest.mark.parametrize("source", build.GEMMS)
def test_gemms_use_tensor_cores_and_tma(source: str, kernels: list[Kernel]) -> None:
    gemms = of(kernels, source)
    assert len(gemms) == 5  # three mixtures of types, and the backward pass in two
    for k in gemms:
        for instruction in (_PRODUCTS[source], "UTMALDG", "UTMASTG"):
            assert k.instructions.get(instruction), (instruction, k)


@needs_cutlass
def test_gemms_refuse_what_tma_cannot_read() -> None:
    assert toolchain.refusals() == []


@pytest.mark.parametrize("architecture", toolchain.ARCHITECTURES)
def test_vectors_move_at_once(architecture: str, kernels: list[Kernel]) -> None:
    vectors = [
        k for k in of(kernels, "expand_pointwise") if k.architecture == architecture and "sum_kernel" not in k.name
    ]
    assert len(vectors) == 32  # rows or columns, vectors or single numbers, five mixtures of types, three with sums
    for k in vectors:
        wide = "Li1E" not in k.name  # the template argument N
        assert bool(k.instructions.get("LDG.E.128")) == bool(k.instructions.get("STG.E.128")) == wide, k


def test_the_binding_compiles_against_this_torch() -> None:
    toolchain.compile_binding()
