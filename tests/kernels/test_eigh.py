"""`svdiff::eigh`, batched eigenvectors, against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svdiff_kernels import ops, reference

IMPLEMENTATIONS = {"op": ops.eigh, "reference": reference.eigh}
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}

implementations = pytest.mark.parametrize("eigh", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
dtypes = pytest.mark.parametrize("dtype", EPS, ids=str)


def symmetric(B: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    half = torch.randn(B, n, n, dtype=dtype)
    return half + half.mT


@implementations
@dtypes
@pytest.mark.parametrize("n", [1, 7, 64])
@pytest.mark.parametrize("B", [0, 1, 3])
def test_matches_torch(eigh: Callable[[Tensor], tuple[Tensor, Tensor]], B: int, n: int, dtype: torch.dtype) -> None:
    G = symmetric(B, n, dtype)
    values, vectors = eigh(G)
    assert values.shape == (B, n) and vectors.shape == (B, n, n)
    assert values.dtype == vectors.dtype == dtype and vectors.is_contiguous()
    if B == 0:
        return
    tolerance = 20 * n * EPS[dtype]
    expected = torch.linalg.eigh(G).eigenvalues
    scale = expected.abs().max()
    assert (values - expected).abs().max() <= tolerance * scale
    assert (values[:, 1:] >= values[:, :-1]).all()
    assert (vectors.mT @ vectors - torch.eye(n, dtype=dtype)).abs().max() <= tolerance
    assert (G @ vectors - vectors * values[:, None]).abs().max() <= tolerance * scale


@implementations
@dtypes
@pytest.mark.parametrize("n", [7, 64])
def test_reads_the_lower_triangle_and_writes_nothing(
    eigh: Callable[[Tensor], tuple[Tensor, Tensor]], n: int, dtype: torch.dtype
) -> None:
    G = symmetric(3, n, dtype)
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    half = G.masked_fill(above, float("nan"))
    kept = half.clone()
    for ours, expected in zip(eigh(half), eigh(G), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(half.nan_to_num(7.0), kept.nan_to_num(7.0))


@implementations
def test_any_strides(eigh: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    G = symmetric(3, 11)
    padded = torch.full((3, 22, 33), float("nan"), dtype=G.dtype)
    padded[:, ::2, ::3] = G
    for strided in (padded[:, ::2, ::3], G.mT, G.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert not strided.is_contiguous()
        values, vectors = eigh(strided)
        assert vectors.is_contiguous()
        assert torch.allclose(values, eigh(G)[0], rtol=0, atol=1e-12)
        assert torch.allclose(G @ vectors, vectors * values[:, None], rtol=0, atol=1e-12)


def test_each_is_as_if_alone() -> None:
    G = symmetric(5, 40)
    values, vectors = ops.eigh(G)
    for i in range(5):
        alone = ops.eigh(G[i : i + 1])
        assert torch.equal(alone[0][0], values[i]) and torch.equal(alone[1][0], vectors[i])


@implementations
@pytest.mark.parametrize(
    "G", [torch.zeros(2, 3, 4), torch.zeros(2, 3, 3).half(), torch.zeros(2, 3, 3, dtype=torch.long), torch.zeros(3)]
)
def test_bad_input_is_refused(eigh: Callable[[Tensor], tuple[Tensor, Tensor]], G: Tensor) -> None:
    with pytest.raises(RuntimeError, match="eigh"):
        eigh(G)


@pytest.mark.parametrize("B", [0, 1, 3])
@dtypes
def test_opcheck(B: int, dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.svdiff.eigh.default, (symmetric(B, 7, dtype),))
