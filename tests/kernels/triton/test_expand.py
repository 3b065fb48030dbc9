"""`svdiff::expand` in Triton, against fp64: every layout, odd shapes, every mixture of types."""

from __future__ import annotations

import pytest
import torch
from kernels.cases import ROWS, TYPES, Case, bound, cases
from numerics import relative

from svdiff_kernels import ops
from svdiff_kernels.triton.expand import expand, expand_backward
from svdiff_kernels.triton.product import product

SIZES = [(70, 1), (1, 9), (29, 17), (67, 150)]  # (M, r)
SPLITS = [(1, 5), (2, 2), (3, 3), (4, 2), (6, 3), (7, 5)]  # (number among ROWS, splits)


@pytest.mark.usefixtures("guarded")
@cases("M R", SIZES, every=2)
def test_forward(lead, S, columns, M, R, kept, out, device) -> None:
    case = Case.make(lead, S, columns, M, R, kept, out).to(device)
    y = expand(case.z, case.U, case.scale, case.bias, out)
    assert y.dtype == out and ops.columns_dense(y) == ops.columns_dense(case.z)
    assert relative(y, case.truth()[0]) <= bound(out)
    assert torch.equal(expand(case.z, case.U, case.scale, case.bias, out), y)


@pytest.mark.usefixtures("guarded")
@cases("M R", SIZES, every=2)
def test_backward(lead, S, columns, M, R, kept, out, device) -> None:
    case = Case.make(lead, S, columns, M, R, kept, out).to(device)
    _, dz, dscale = case.truth()
    got_dz, got_dscale = expand_backward(case.dy, case.z, case.U, case.scale, True)
    assert got_dz.dtype == out and ops.columns_dense(got_dz) == ops.columns_dense(case.dy)
    assert relative(got_dz, dz) <= bound(out)
    # U is rounded to dy's type where the two differ, which no single sum can average away.
    assert relative(got_dscale, dscale) <= (1e-5 if kept == out else bound(out))
    again = expand_backward(case.dy, case.z, case.U, case.scale, True)
    assert torch.equal(again[0], got_dz) and torch.equal(again[1], got_dscale)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("kept", "out"), TYPES, ids=str)
@pytest.mark.parametrize(("lead", "S", "columns"), ROWS[3:], ids=str)
def test_only_what_is_wanted_is_computed(lead, S, columns, kept, out, device) -> None:
    case = Case.make(lead, S, columns, 29, 17, kept, out).to(device)
    dz, dscale = expand_backward(case.dy, case.z, case.U, case.scale, True)
    only_dz, nothing = expand_backward(case.dy, None, case.U, case.scale, True)
    assert nothing.numel() == 0 and torch.equal(only_dz, dz)
    nothing, only_dscale = expand_backward(case.dy, case.z, case.U, case.scale, False)
    assert nothing.numel() == 0 and torch.equal(only_dscale, dscale)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("kept", "out"), TYPES, ids=str)
@pytest.mark.parametrize(("lead", "S", "columns", "splits"), [(*ROWS[i], n) for i, n in SPLITS], ids=str)
def test_sums_may_be_split(lead, S, columns, splits, kept, out, device) -> None:
    case = Case.make(lead, S, columns, 37, 519, kept, out).to(device)
    images = case.z if columns else case.z.reshape(S, -1, 519)
    y = ops.empty_rows_like(images, 37, out)
    product(images, case.U, y, case.scale, case.bias, kept, splits)
    assert relative(y.reshape(*lead, 37), case.truth()[0]) <= bound(out)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("kept", "out"), TYPES, ids=str)
def test_any_strides(kept, out, device) -> None:
    dense = Case.make((4, 15), 2, False, 29, 17, kept, out).to(device)
    spread = torch.zeros(15, 34, 4, dtype=kept, device=device)[:, ::2].permute(2, 0, 1).copy_(dense.z)
    U = dense.U.T.contiguous().T
    scale = torch.zeros(2, 40, device=device)[:, 5:22].copy_(dense.scale)
    assert torch.equal(
        expand(spread, U, scale, dense.bias, out), expand(dense.z, dense.U, dense.scale, dense.bias, out)
    )
    dy = dense.dy[:1, :1].expand(4, 15, 29)
    strided = expand_backward(dy, spread, U, scale, True)
    assert all(map(torch.equal, strided, expand_backward(dy.contiguous(), dense.z, dense.U, dense.scale, True)))
    columns = Case.make((4, 15), 2, True, 29, 17, kept, out).to(device)  # z of one layout, dy of the other
    for dz, z in ((columns.dy, dense.z), (dense.dy, columns.z)):
        got = expand_backward(dz, z, U, dense.scale, True)
        want = expand_backward(dz.contiguous(), z.contiguous(), U, dense.scale, True)
        assert all(torch.allclose(g, w, rtol=1e-5, atol=1e-5) for g, w in zip(got, want, strict=True))
