"""decompose and Factors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import (
    SVD_FLOOR,
    SVD_FP64,
    SVD_ORTHONORMALITY,
    SVD_RECONSTRUCTION,
    SVD_SIGMA,
    SVD_TRUNCATION,
    relative,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from svdiff_kernels import Factors, SVDiffError, decompose, ops, solvers
from svdiff_kernels.decompose import batches


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def spectrum(M: int, N: int, sigma: Tensor) -> Tensor:
    """A random [M, N] matrix with these singular values, in fp64."""
    return (orthonormal(M, len(sigma)) * sigma) @ orthonormal(N, len(sigma)).T


def power_law(n: int, exponent: float) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -exponent


def graded(n: int, decades: float) -> Tensor:
    return torch.logspace(0, -decades, n, dtype=torch.float64)


def hilbert(M: int, N: int) -> Tensor:
    return 1.0 / (torch.arange(M, dtype=torch.float64)[:, None] + torch.arange(1, N + 1, dtype=torch.float64))


def flawed(W: Tensor) -> Tensor:
    """With a row and a column of zeros, and one of each twice."""
    W[3], W[:, 5], W[7], W[:, 11] = 0, 0, W[8], W[:, 12]
    return W


def same(a: Factors, b: Factors) -> bool:
    return torch.equal(a.U, b.U) and torch.equal(a.sigma, b.sigma) and torch.equal(a.Vh, b.Vh)


def rebuilt(f: Factors) -> Tensor:
    """In fp64, so that nothing but the factors is judged."""
    return (f.U.double() * f.sigma.double()) @ f.Vh.double()


def assert_orthonormal(f: Factors, tolerance: float) -> None:
    U, Vh, eye = f.U.double(), f.Vh.double(), torch.eye(f.rank, dtype=torch.float64)
    assert (U.T @ U - eye).abs().max() <= tolerance
    assert (Vh @ Vh.T - eye).abs().max() <= tolerance


def assert_well_formed(f: Factors, shape: tuple[int, int], rank: int, dtype: torch.dtype = torch.float32) -> None:
    assert f.shape == shape and f.rank == rank
    assert f.U.dtype == f.Vh.dtype == dtype and f.sigma.dtype == torch.promote_types(dtype, torch.float32)
    assert all(t.is_contiguous() and not t.requires_grad for t in (f.U, f.sigma, f.Vh))
    assert (f.sigma >= 0).all() and (f.sigma[:-1] >= f.sigma[1:]).all()
    assert (f.U.amax(0) >= -f.U.amin(0)).all()  # the entry of largest magnitude is positive


def assert_exact(W: Tensor, f: Factors) -> None:
    """In fp32, to the table's figures, and as exact as LAPACK's in fp32."""
    A = W.detach().flatten(1)
    assert_well_formed(f, tuple(A.shape), min(A.shape))
    assert_orthonormal(f, SVD_ORTHONORMALITY)
    truth = torch.linalg.svdvals(A.double())
    assert (f.sigma.double() - truth).abs().max() <= SVD_SIGMA * truth[0]
    error = relative(rebuilt(f), A)
    assert error <= SVD_RECONSTRUCTION
    # Below the floor both may be as exact as fp32 can hold them: which of the two was rounded by less says nothing.
    assert error <= SVD_FLOOR or error <= relative(rebuilt(Factors(*torch.linalg.svd(A, full_matrices=False))), A)


EVEN: dict[str, Callable[[], Tensor]] = {
    "lying": lambda: torch.randn(31, 47),
    "square": lambda: torch.randn(23, 23),
    "one row": lambda: torch.randn(1, 9),
    "one number": lambda: torch.randn(1, 1),
    "wide": lambda: torch.randn(7, 4500),  # more columns than are taken to fp64 at a time
    "larger": lambda: torch.randn(129, 320),
    "large and square": lambda: torch.randn(288, 288),
    "tiny": lambda: torch.randn(31, 47) * 1e-30,  # in fp32 their squares are zero
    "huge": lambda: torch.randn(31, 47) * 1e30,
    "from bf16": lambda: torch.randn(60, 80).bfloat16().float(),
    "power law 0.5": lambda: spectrum(160, 233, power_law(160, 0.5)),
    "power law 1": lambda: spectrum(160, 233, power_law(160, 1)),
    "power law 1.5": lambda: spectrum(160, 160, power_law(160, 1.5)),
    "power law 2": lambda: spectrum(111, 300, power_law(111, 2)),
    "identity": lambda: torch.eye(17),
    "orthogonal": lambda: 3 * orthonormal(97, 97),
    "orthonormal rows": lambda: orthonormal(120, 70).T,
    "repeated": lambda: spectrum(64, 100, torch.tensor([5.0] * 20 + [2.0] * 30 + [1e-3] * 14).double()),
}  # fmt: skip
"""Weights that the Gram matrix is good for."""

WIDE: dict[str, Callable[[], Tensor]] = {
    "graded to 1e-4": lambda: spectrum(64, 100, graded(64, 4)),
    "graded to 1e-5": lambda: spectrum(64, 100, graded(64, 5)),
    "graded to 1e-6": lambda: spectrum(64, 100, graded(64, 5.9)),
    "graded to 1e-8": lambda: spectrum(150, 150, graded(150, 8)),
    "graded rows": lambda: graded(90, 8)[:, None] * torch.randn(90, 140, dtype=torch.float64),
    "graded columns": lambda: torch.randn(90, 140, dtype=torch.float64) * graded(140, 8),
    "one large": lambda: spectrum(40, 60, torch.cat([torch.ones(1), torch.full((39,), 1e-5)]).double()),
    "rank 7": lambda: spectrum(29, 53, torch.rand(7, dtype=torch.float64)),
    "rank 1": lambda: torch.ones(7, 13),
    "flawed": lambda: flawed(torch.randn(29, 53)),
    "zero": lambda: torch.zeros(5, 8),
    "one zero": lambda: torch.zeros(1, 1),
    "hilbert": lambda: hilbert(40, 40),
    "hilbert lying": lambda: hilbert(12, 30),
}
"""Weights that need more."""


@pytest.mark.parametrize("standing", [False, True], ids=["lying", "standing"])
@pytest.mark.parametrize("case", [*EVEN, *WIDE])
def test_exact(case: str, standing: bool) -> None:
    W = (EVEN | WIDE)[case]().float()
    W = W.T if standing else W
    assert_exact(W, decompose(W))


@pytest.mark.parametrize("method", ["gram", "svd", "randomized"])
@pytest.mark.parametrize("case", ["lying", "square", "larger", "power law 2", "orthogonal", "graded to 1e-5"])
def test_exact_by_each_method(case: str, method: str) -> None:
    W = (EVEN | WIDE)[case]().float()
    assert_exact(W, decompose(W, method=method))


@pytest.mark.parametrize("shape", [(13, 5, 3, 3), (40, 3, 3, 2), (37, 19, 1, 1), (1, 7, 3, 3), (96, 16, 3, 3)])
def test_convolutions_are_exact(shape: tuple[int, ...]) -> None:
    W = torch.randn(shape)
    assert_exact(W, decompose(W))
    assert_exact(W, decompose(W.contiguous(memory_format=torch.channels_last)))


def test_a_large_one_is_exact() -> None:
    W = torch.randn(1280, 1283)  # how many rows are products in fp32 depends on the size
    assert_exact(W, decompose(W))


@settings(max_examples=80, deadline=None)
@given(
    M=st.integers(1, 40),
    N=st.integers(1, 40),
    exponent=st.floats(0, 3),
    decades=st.floats(0, 9),
    missing=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_exact_whatever_the_shape_and_spectrum(
    M: int, N: int, exponent: float, decades: float, missing: int, seed: int
) -> None:
    torch.manual_seed(seed)
    m = min(M, N)
    sigma = power_law(m, exponent) * graded(m, decades)
    W = spectrum(M, N, sigma[: max(1, m - missing)]).float()
    assert_exact(W, decompose(W))


@pytest.mark.parametrize("standing", [False, True], ids=["lying", "standing"])
@pytest.mark.parametrize("case", [*EVEN, *WIDE])
def test_fp64_stays_fp64(case: str, standing: bool) -> None:
    W = (EVEN | WIDE)[case]().double()
    W = W.T if standing else W
    f = decompose(W, dtype=torch.float64)
    truth = torch.linalg.svdvals(W)
    assert_well_formed(f, tuple(W.shape), min(W.shape), torch.float64)
    assert_orthonormal(f, SVD_FP64)
    assert relative(rebuilt(f), W) <= SVD_FP64
    assert (f.sigma - truth).abs().max() <= SVD_FP64 * truth[0]


# A rank-k approximation can leave no less than the smaller singular values (Eckart and Young).
TRUNCATED: dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.randn(150, 233),
    "standing": lambda: torch.randn(233, 150),
    "orthogonal": lambda: 3 * orthonormal(140, 140),
    "power law 0.5": lambda: spectrum(150, 233, power_law(150, 0.5)),
    "power law 1": lambda: spectrum(233, 150, power_law(150, 1)),
    "power law 2": lambda: spectrum(150, 150, power_law(150, 2)),
    "graded": lambda: spectrum(150, 160, graded(150, 5)),
    "a step": lambda: spectrum(130, 170, torch.cat([torch.ones(20), torch.full((110,), 1e-3)]).double()),
    "rank 7": lambda: spectrum(130, 170, torch.rand(7, dtype=torch.float64)),
    "zero": lambda: torch.zeros(130, 140),
}


@pytest.mark.parametrize("rank", [1, 2, 20, 128])
@pytest.mark.parametrize("method", ["auto", "gram", "randomized", "svd"])
@pytest.mark.parametrize("case", TRUNCATED)
def test_truncated_is_the_best_approximation(case: str, method: str, rank: int) -> None:
    W = TRUNCATED[case]().float()
    if method == "gram" and case in ("rank 7", "zero"):
        with pytest.raises(SVDiffError, match="too wide"):
            decompose(W, rank, method=method)
        return
    f = decompose(W, rank, method=method)
    assert_well_formed(f, tuple(W.shape), rank)
    assert_orthonormal(f, SVD_ORTHONORMALITY)
    assert_best(W, f)


def assert_best(W: Tensor, f: Factors) -> None:
    norm = torch.linalg.vector_norm
    best = norm(torch.linalg.svdvals(W.double())[f.rank :])
    assert norm(rebuilt(f) - W.double()) <= SVD_TRUNCATION * best + SVD_RECONSTRUCTION * norm(W.double())


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 90),
    N=st.integers(1, 90),
    rank=st.integers(1, 100),
    exponent=st.floats(0, 3),
    method=st.sampled_from(["auto", "gram", "randomized"]),
    seed=st.integers(0, 2**31),
)
def test_truncated_whatever_the_shape_and_spectrum(
    M: int, N: int, rank: int, exponent: float, method: str, seed: int
) -> None:
    torch.manual_seed(seed)
    W = spectrum(M, N, power_law(min(M, N), exponent)).float()
    f = decompose(W, rank, method=method)
    assert_well_formed(f, (M, N), min(rank, M, N))
    assert_orthonormal(f, SVD_ORTHONORMALITY)
    assert_best(W, f)


def test_auto_takes_subspace_iteration_for_small_ranks_only() -> None:
    W = torch.randn(131, 150)
    assert same(decompose(W, 2), decompose(W, 2, method="randomized"))
    assert same(decompose(W, 3), decompose(W, 3, method="gram"))
    assert not same(decompose(W, 3), decompose(W, 3, method="randomized"))


def test_truncated_factors_are_the_first_of_all() -> None:
    W = torch.randn(31, 47)
    for rank in (1, 5, 31, 1000):
        assert same(decompose(W, rank), decompose(W).truncated(rank))


@settings(max_examples=30, deadline=None)
@given(M=st.integers(1, 24), N=st.integers(1, 24), seed=st.integers(0, 2**31))
def test_signs_and_values_do_not_depend_on_the_method(M: int, N: int, seed: int) -> None:
    torch.manual_seed(seed)
    W = spectrum(M, N, torch.linspace(1, 2, min(M, N), dtype=torch.float64))
    gram, svd = (decompose(W, method=m, dtype=torch.float64) for m in ("gram", "svd"))
    for ours, theirs in zip((gram.U, gram.sigma, gram.Vh), (svd.U, svd.sigma, svd.Vh), strict=True):
        assert (ours - theirs).abs().max() <= SVD_FP64


def test_same_weight_same_bits() -> None:
    for W, rank in [(torch.randn(131, 247), None), (torch.randn(131, 247), 2), (torch.zeros(9, 7), None)]:
        first = decompose(W, rank)
        torch.manual_seed(1)  # and no random number is drawn of those that others see
        before = torch.get_rng_state()
        assert same(decompose(W.clone(), rank), first)
        assert torch.equal(torch.get_rng_state(), before)


def test_dtypes() -> None:
    W = torch.randn(9, 4, 3, 2)
    f, g = decompose([W, W.half()], dtype=torch.float16)
    assert_well_formed(f, (9, 24), 9, torch.float16)
    assert_well_formed(g, (9, 24), 9, torch.float16)
    for half in (torch.float16, torch.bfloat16):
        assert_exact(W.to(half), decompose(W.to(half)))
    assert_exact(W.double().float(), decompose(W.double()))
    assert_exact(W, decompose(torch.nn.Parameter(W)))


@pytest.mark.parametrize("rank", [None, 2])
def test_the_users_settings_neither_matter_nor_change(rank: int | None) -> None:
    W = torch.randn(160, 233)
    expected = decompose(W, rank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(decompose(W, rank), expected)
    with torch.inference_mode():
        assert same(decompose(W, rank), expected)
    with torch.device("meta"):
        assert same(decompose(W, rank), expected)


def precisions() -> list[str]:
    return [switch.fp32_precision for switch in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]


class Products(TorchDispatchMode):
    """Notes how each product in fp32 may be rounded: few processors really do it otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm and args[0].dtype == torch.float32:
            self.seen.append(precisions())
        return func(*args, **(kwargs or {}))


def all_switches(precision: str) -> None:
    torch.set_float32_matmul_precision({"tf32": "high", "bf16": "medium"}[precision])


def one_switch(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has one switch for all")
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("switch", [all_switches, one_switch])
def test_products_in_fp32_are_in_fp32(switch: Callable[[str], None], precision: str) -> None:
    W = torch.randn(160, 233)
    expected = decompose(W)
    try:
        switch(precision)
        before = precisions()
        with Products() as products:
            found = decompose(W)
        assert products.seen == [["ieee", "ieee"]]
        assert same(found, expected)
        assert precision in before and precisions() == before
    finally:
        torch.set_float32_matmul_precision("highest")


MIXED = [(31, 47), (47, 31), (130, 140), (31, 900), (5, 4, 3, 3), (1, 9), (31, 31), (140, 130), (9, 1), (36, 5)]


@pytest.mark.parametrize("rank", [None, 2])
def test_a_list_is_as_one_at_a_time(rank: int | None) -> None:
    weights = [torch.randn(shape) for shape in MIXED]
    weights += [torch.zeros(31, 47), spectrum(31, 47, graded(31, 8)).float(), weights[0].double(), weights[0].half()]
    together = decompose(weights, rank)
    assert len(together) == len(weights)
    for W, f in zip(weights, together, strict=True):
        alone = decompose(W, rank)
        assert f.shape == tuple(W.flatten(1).shape) and f.rank == alone.rank
        assert torch.allclose(f.sigma, alone.sigma, rtol=0, atol=SVD_SIGMA * float(alone.sigma[0]))
        assert relative(rebuilt(f), rebuilt(alone)) <= SVD_RECONSTRUCTION
    assert decompose([]) == []


def test_batches_are_bounded_and_the_largest_come_first() -> None:
    found = batches([torch.empty(40, 50)] * 30 + [torch.empty(60, 70), torch.empty(70, 60)])
    assert found[0] == [30, 31]
    assert sorted(i for batch in found for i in batch) == list(range(32))
    assert max(map(len, found)) <= 4 * torch.get_num_threads()


def test_a_bar_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    decompose([torch.randn(shape) for shape in MIXED], progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"SVD: 100%\|.*\| \d\d:\d\d<\d\d:\d\d", shown)
    decompose([torch.randn(3, 4)])
    assert capsys.readouterr().err == ""


BAD: list[tuple[Callable[[], Tensor], str]] = [
    (lambda: torch.tensor([[1.0, float("nan")]]), "NaN or inf"),
    (lambda: torch.tensor([[1.0, float("inf")]]), "NaN or inf"),
    (lambda: torch.randn(5), r"\(5,\): a matrix or a 2-D conv kernel"),
    (lambda: torch.randn(2, 3, 4), r"\(2, 3, 4\): a matrix or a 2-D conv kernel"),
    (lambda: torch.randn(0, 5), "empty"),
    (lambda: torch.randn(5, 0), "empty"),
    (lambda: torch.ones(3, 4, dtype=torch.long), "dtype torch.int64"),
    (lambda: torch.ones(3, 4, dtype=torch.complex64), "dtype torch.complex64"),
    (lambda: torch.ones(3, 4, device="meta"), "meta"),
]


@pytest.mark.parametrize(("weight", "message"), BAD)
def test_bad_weights_are_refused_by_name_in_one_line(weight: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(SVDiffError, match=rf"^cannot decompose a weight of shape .*{message}") as error:
        decompose(weight())
    assert "\n" not in str(error.value)
    weights = [torch.randn(3, 4), weight(), torch.randn(6, 5)]
    with pytest.raises(SVDiffError, match=rf"^unet\.up: cannot decompose .*{message}") as error:
        decompose(weights, names=["unet.down", "unet.up", "unet.out"])
    assert "\n" not in str(error.value)
    with pytest.raises(SVDiffError, match=rf"^weight 1 of 3: cannot decompose .*{message}"):
        decompose(weights)


def test_large_values_are_not_taken_for_inf() -> None:
    W = torch.full((3, 70), 60000.0).half()  # its sum is inf in fp16
    assert W.sum().isinf()
    assert_exact(W, decompose(W))


def test_too_wide_for_the_gram_matrix() -> None:
    weights = [torch.randn(9, 14), spectrum(9, 14, graded(9, 7)).float()]
    with pytest.raises(SVDiffError, match=r'^b: .*too wide for method "gram", take "auto"$'):
        decompose(weights, method="gram", names=["a", "b"])
    assert_exact(weights[1], decompose(weights, names=["a", "b"])[1])


@pytest.mark.parametrize("method", ["gram", "svd", "randomized"])
def test_what_does_not_converge_is_named(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("linalg: the algorithm failed to converge\nsecond line")

    monkeypatch.setattr(ops, "eigh", fails)
    monkeypatch.setattr(solvers, "svd", fails)
    with pytest.raises(SVDiffError, match=r"^unet\.up: .*\(9, 14\): linalg: the algorithm failed to converge$"):
        decompose([torch.randn(9, 14)], 2, method=method, names=["unet.up"])
    with pytest.raises(SVDiffError, match=r"^cannot decompose .*\(9, 14\): .*converge$"):
        decompose(torch.randn(9, 14), 2, method=method)


def test_bad_arguments_are_refused() -> None:
    W = torch.randn(3, 4)
    for rank in (0, -1):
        with pytest.raises(SVDiffError, match=f"^decompose: rank must be at least 1, not {rank}$"):
            decompose([W], rank)
        with pytest.raises(SVDiffError, match=r"^rank must be at least 1"):
            decompose(W).truncated(rank)
    with pytest.raises(SVDiffError, match="method 'qr' is not one of auto, gram, svd, randomized"):
        decompose(W, method="qr")
    with pytest.raises(SVDiffError, match="do not fit"):
        Factors(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 4))


def test_factors_move_and_cast() -> None:
    f = decompose(torch.randn(5, 7))
    assert f.to(dtype=torch.bfloat16).sigma.dtype == torch.float32
    assert f.to(dtype=torch.float64).sigma.dtype == torch.float64
    assert f.to("meta").U.is_meta
