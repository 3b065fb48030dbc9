"""torch.ops.svdiff_cuda against fp64: every layout, odd shapes, every type that is served.

Without a GPU the binding and the kernels run all the same, compiled for the CPU; see emulator/. GEMMs of our own are
then loops that keep to the contract of gemm.h: what CUTLASS makes of it only a GPU can tell.
"""

from __future__ import annotations

import pytest
import torch
from kernels.cases import BF16, F16, F32, ROWS, TYPES, Case, bound, by_rows, cases
from numerics import EXACT, relative
from torch import Tensor

from svdiff_kernels import ops
from svdiff_kernels.bank import _Gains

pytestmark = pytest.mark.timeout(900)  # the first test compiles the emulated device

ALL_TYPES = [*TYPES, (BF16, F32)]
ALL_ROWS = [*ROWS, ((0, 5), 1, True), ((1, 264), 1, True), ((3, 8), 3, True)]
SIZES = [(70, 1), (1, 9), (29, 17), (24, 40)]  # (M, r); the last is aligned


@pytest.fixture(autouse=True)
def _poisoned():
    """What torch allocates holds NaN until a kernel writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would want an environment variable
    yield
    torch.use_deterministic_algorithms(False)


fused = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


@fused
@cases("M R", SIZES, rows=ALL_ROWS, types=ALL_TYPES)
def test_forward(lead, S, columns, M, R, kept, out, fused, cuda) -> None:
    case = Case.make(lead, S, columns, M, R, kept, out).to(cuda.device, aligned=fused)
    y = cuda("expand", case.z, case.U, case.scale, case.bias, out)
    assert y.dtype == out and y.shape == (*lead, M) and ops.columns_dense(y) == ops.columns_dense(case.z)
    assert relative(y, case.truth()[0]) <= bound(kept, out)
    assert torch.equal(cuda("expand", case.z, case.U, case.scale, case.bias, out), y)


@fused
@cases("M R", SIZES, rows=ALL_ROWS, types=TYPES[:3])
def test_backward(lead, S, columns, M, R, kept, out, fused, cuda) -> None:
    case = Case.make(lead, S, columns, M, R, kept, out).to(cuda.device, aligned=fused)
    _, dz, dscale = case.truth()
    got_dz, got_dscale = cuda("expand_backward", case.dy, case.z, case.U, case.scale, True)
    assert got_dz.dtype == out and got_dz.shape == (*lead, R)
    assert ops.columns_dense(got_dz) == ops.columns_dense(case.dy) and got_dscale.dtype == F32
    assert relative(got_dz, dz) <= bound(kept, out)
    assert relative(got_dscale, dscale) <= EXACT[F32]  # never rounded to half precision
    again = cuda("expand_backward", case.dy, case.z, case.U, case.scale, True)
    assert torch.equal(again[0], got_dz) and torch.equal(again[1], got_dscale)


@fused
@pytest.mark.parametrize(("kept", "out"), TYPES[:3], ids=str)
@pytest.mark.parametrize(("lead", "S", "columns"), ALL_ROWS[3:], ids=str)
@pytest.mark.parametrize(("M", "R"), SIZES[2:], ids=str)
def test_only_what_is_wanted_is_computed(lead, S, columns, M, R, kept, out, fused, cuda) -> None:
    case = Case.make(lead, S, columns, M, R, kept, out).to(cuda.device, aligned=fused)
    dz, dscale = cuda("expand_backward", case.dy, case.z, case.U, case.scale, True)
    only_dz, nothing = cuda("expand_backward", case.dy, None, case.U, case.scale, True)
    assert nothing.numel() == 0 and relative(only_dz, dz) <= bound(kept, out)
    nothing, only_dscale = cuda("expand_backward", case.dy, case.z, case.U, case.scale, False)
    assert nothing.numel() == 0 and torch.equal(only_dscale, dscale)


@pytest.mark.parametrize(("kept", "out"), TYPES[:3], ids=str)
@pytest.mark.parametrize(("M", "R"), SIZES[2:], ids=str)
def test_any_strides(M, R, kept, out, cuda) -> None:
    dense = Case.make((4, 15), 2, False, M, R, kept, out).to(cuda.device)
    spread = torch.zeros(15, 2 * R, 4, dtype=kept, device=cuda.device)[:, ::2].permute(2, 0, 1).copy_(dense.z)
    U = dense.U.T.contiguous().T
    scale = torch.zeros(2, R + 23, device=cuda.device)[:, 5 : R + 5].copy_(dense.scale)
    y = cuda("expand", spread, U, scale, dense.bias, out)
    assert torch.equal(y, cuda("expand", dense.z, dense.U, dense.scale, dense.bias, out))
    dy = dense.dy[:1, :1].expand(4, 15, M)
    strided = cuda("expand_backward", dy, spread, U, scale, True)
    assert all(map(torch.equal, strided, cuda("expand_backward", dy.contiguous(), dense.z, dense.U, dense.scale, True)))
    columns = Case.make((4, 15), 2, True, M, R, kept, out).to(cuda.device)  # z of one layout, dy of the other
    for dy, z in ((columns.dy, dense.z), (dense.dy, columns.z)):
        dz, dscale = cuda("expand_backward", dy, z, U, dense.scale, True)
        want_dz, want_dscale = cuda("expand_backward", dy.contiguous(), z.contiguous(), U, dense.scale, True)
        assert relative(dz, want_dz) <= bound(kept, out) and relative(dscale, want_dscale) <= EXACT[F32]


@pytest.mark.parametrize("kept", [F32, F16], ids=str)
@pytest.mark.parametrize(
    ("lead", "S", "columns", "R"),
    [
        ((37,), 1, False, 2056),  # more columns than a block's threads hold
        ((37,), 1, False, 523),
        ((5003,), 1, False, 1),  # tiles of many rows
        ((1044,), 2, False, 3),
        ((4113,), 1, False, 1032),  # more rows than tiles may be of a sample
        ((2, 2056), 1, True, 3),  # several tiles a line
        ((2, 1031), 2, True, 2),
    ],
    ids=str,
)
def test_large(lead, S, columns, R, kept, cuda) -> None:
    case = Case.make(lead, S, columns, 2, R, kept, kept).to(cuda.device)
    y, dz, dscale = case.truth()
    assert relative(cuda("expand", case.z, case.U, case.scale, case.bias, kept), y) <= bound(kept, kept)
    got_dz, got_dscale = cuda("expand_backward", case.dy, case.z, case.U, case.scale, True)
    assert relative(got_dz, dz) <= bound(kept, kept) and relative(got_dscale, dscale) <= EXACT[F32]
    assert torch.equal(cuda("expand_backward", case.dy, case.z, case.U, case.scale, True)[1], got_dscale)


@fused
@pytest.mark.parametrize(("kept", "out"), [*ALL_TYPES, (BF16, F16), (F32, F16)], ids=str)
@pytest.mark.parametrize(("lead", "S"), [row[:2] for row in ALL_ROWS if not row[2]], ids=str)
@pytest.mark.parametrize(("R", "N"), SIZES, ids=str)
def test_project(lead, S, R, N, kept, out, fused, cuda) -> None:
    case = Case.make(lead, S, False, N, R, kept, out).to(cuda.device, aligned=fused)
    x, Vh = torch.randn(*lead, N, device=cuda.device).to(kept), case.U.T
    y = cuda("project", x, Vh, case.scale, out, 0.25)
    assert y.dtype == out
    truth = 0.25 * by_rows(case.scale.double(), y) * (x.double() @ Vh.double().T)
    assert relative(y, truth) <= EXACT.get(out, torch.finfo(out).eps)


@pytest.mark.parametrize(
    ("capability", "lead", "columns", "M", "R", "kept", "count"),
    [
        ((9, 0), (33,), False, 24, 40, F16, 3),
        ((9, 0), (33,), False, 24, 40, BF16, 3),
        ((9, 0), (33,), False, 24, 41, F16, 0),
        ((9, 0), (33,), False, 25, 40, F16, 0),
        ((9, 0), (2, 24), True, 24, 40, F16, 1),  # project has its rows dense anyway
        ((9, 0), (33,), False, 24, 40, F32, 0),
        ((8, 0), (33,), False, 24, 40, F16, 0),
        ((12, 0), (33,), False, 24, 40, F16, 0),
    ],
    ids=str,
)
def test_gemms_of_our_own_serve_what_they_can(capability, lead, columns, M, R, kept, count, emulator) -> None:
    emulator.emulate(*capability)
    case = Case.make(lead, 1, columns, M, R, kept, kept).to("cpu")
    before = emulator.fused()
    emulator("expand", case.z, case.U, case.scale, case.bias, kept)
    emulator("expand_backward", case.dy, case.z, case.U, case.scale, True)
    emulator("project", case.z.contiguous(), case.U, torch.ones(1, M), kept, 1.0)
    assert emulator.fused() - before == count


@pytest.mark.parametrize(
    ("z", "U", "dtype", "serves"),
    [
        (F32, F32, None, True),
        (F16, F16, BF16, True),
        (F16, F16, torch.float64, False),
        (torch.float64, torch.float64, None, False),
        (BF16, F16, None, False),
        (F32, F16, None, False),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused(z, U, dtype, serves, cuda) -> None:
    case = Case.make((6,), 1, False, 5, 3, F32, F32).to(cuda.device)
    case.z, case.U, case.dy = case.z.to(z), case.U.to(U), case.dy.to(z)
    assert cuda("serves_expand", case.z, case.U, dtype) == serves
    backward = (case.dy, case.z, case.U)
    assert cuda("serves_expand_backward", *backward) == (serves if dtype is None else z == U)
    if not serves:
        with pytest.raises(TypeError, match="no kernel of expand for z in"):
            cuda("expand", case.z, case.U, case.scale, None, dtype)
    if not cuda("serves_expand_backward", *backward):
        with pytest.raises(TypeError, match="no kernel of expand_backward for dy in"):
            cuda("expand_backward", *backward, case.scale, True)


@pytest.mark.parametrize("columns", [False, True])
def test_autocast_changes_nothing(columns, cuda) -> None:
    case = Case.make((2, 5), 1, columns, 4, 3, F32, F32).to(cuda.device)
    calls = [
        ("expand", case.z, case.U, case.scale, case.bias, None),
        ("expand_backward", case.dy, case.z, case.U, case.scale, True),
        ("project", case.dy, case.U.T, case.scale, None, 1.0),
    ]
    for call in calls:
        want = cuda(*call)
        with torch.autocast(cuda.device, torch.bfloat16):
            got = cuda(*call)
        assert all(map(torch.equal, got, want))


def test_wrong_shapes_are_named(cuda) -> None:
    c = Case.make((6, 5), 3, False, 4, 3, F32, F32).to(cuda.device)
    for arguments, message in (
        ((c.dy, c.U, c.scale), r"z has shape \[6, 5, 4\], expected \[\*, 3\]"),
        ((c.z, c.U, c.scale[:, :2]), r"scale has shape \[3, 2\], expected \[S, 3\]"),
        ((c.z[:4], c.U, c.scale), r"3 samples do not split 4 evenly"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda("expand", *arguments, None, None)
    with pytest.raises(ValueError, match="z has shape"):
        cuda("expand_backward", c.dy, c.z[:3], c.U, c.scale, True)


@pytest.mark.parametrize("A", [0, 1, 3, 32, 33, 70])
@pytest.mark.parametrize("S", [None, 1, 4])
@pytest.mark.parametrize(("R", "split"), [(1, 1), (523, 300), (523, 0), (256, 256)])
def test_gains(A, S, R, split, cuda) -> None:
    mix = torch.randn(A if S is None else (S, A), device=cuda.device)
    base, floor = torch.rand(R, device=cuda.device), torch.full((R,), -0.0, device=cuda.device)
    if A:
        base[0] = 0.0  # held by a tie, where no delta moves it
    deltas = [torch.randn(n, device=cuda.device, requires_grad=True) for _ in range(A) for n in (split, R - split)]
    for delta in deltas:
        with torch.no_grad():
            delta[:1] = 0
    want = _Gains.apply(base, floor, mix, *deltas) if A else base.expand(*mix.shape[:-1], R)
    gain, held = cuda("gains", base, floor, mix, [d.detach() for d in deltas])
    assert gain.shape == held.shape == want.shape and relative(gain, want.detach()) <= 1e-6
    assert torch.equal(held, gain <= floor) and (not A or held[..., 0].all())
    if not A:
        return
    dgain = torch.randn_like(gain)
    grads = torch.autograd.grad(want, deltas, dgain)
    adapters = [*range(0, A, 2)]
    ddelta = cuda("gains_backward", dgain, held, mix, adapters)
    assert ddelta.shape == (len(adapters), R)
    for row, a in zip(ddelta, adapters, strict=True):
        assert relative(row, torch.cat(grads[2 * a : 2 * a + 2])) <= 1e-6


def test_a_gain_that_is_no_number_stays_one(cuda) -> None:
    base = torch.tensor([float("nan"), 1.0], device=cuda.device)
    gain, held = cuda("gains", base, torch.zeros_like(base), base.new_zeros(0), [])
    assert gain[0].isnan() and not held.any()


@pytest.mark.gpu
def test_a_graph_captures_all_of_it(cuda) -> None:
    case = Case.make((256,), 2, False, 64, 48, F16, F16).to("cuda")
    base, delta = torch.rand(96, device="cuda"), torch.randn(96, device="cuda")

    def step() -> tuple[Tensor, ...]:
        mix = torch.ones(1, device="cuda")
        gain, held = cuda("gains", base, torch.zeros_like(base), mix, [delta[:40], delta[40:]])
        scale = gain.view(2, 48)
        y = cuda("expand", case.z, case.U, scale, case.bias, F16)
        dz, dscale = cuda("expand_backward", case.dy, case.z, case.U, scale, True)
        return y, dz, cuda("gains_backward", dscale.view(-1), held, mix, [0])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    delta.neg_()
    case.z.mul_(2)
    graph.replay()
    assert all(map(torch.equal, captured, step()))
