"""The op itself, in every implementation that this machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from numerics import EXACT, HALF, relative
from torch import Tensor

from svdiff_kernels import backends, ops, reference

Expand = Callable[..., Tensor]
Backward = Callable[[Tensor, Tensor | None, Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def served(z: Tensor, U: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    return torch.ops.svdiff.expand.default(z, U, scale, bias, dtype)


IMPLEMENTATIONS: dict[str, tuple[Expand, Backward]] = {
    "served": (served, torch.ops.svdiff.expand_backward.default),
    "reference": (reference.expand, reference.expand_backward),
}
implementations = pytest.mark.parametrize("which", IMPLEMENTATIONS)
# (leading dimensions, S, columns dense)
ROWS = [
    ((37,), 1, False),
    ((3, 13), 1, False),
    ((6, 5), 3, False),
    ((2, 41), 1, True),
    ((4, 7), 2, True),
    ((1, 50), 1, True),
]
rows = pytest.mark.parametrize(("lead", "S", "columns"), ROWS, ids=str)
M, R = 29, 17


def make(
    lead: tuple[int, ...],
    S: int,
    columns: bool,
    dtype: torch.dtype = torch.float64,
    size: tuple[int, int] = (M, R),
) -> dict[str, Tensor]:
    """Random arguments; z and dy in the layout of a conv in NCHW if columns."""
    M, R = size

    def rows(width: int) -> Tensor:
        t = torch.randn(*lead, width, dtype=torch.float64).to(dtype)
        return t.transpose(1, 2).contiguous().transpose(1, 2) if columns else t

    scale = torch.rand(S, R, dtype=torch.float64)
    scale[:, 3] = 0
    U = torch.randn(M, R, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "z": rows(R),
        "U": U.to(dtype),
        "scale": scale.to(wide),
        "bias": torch.randn(M, dtype=torch.float64).to(dtype),
        "dy": rows(M),
    }


def truth(a: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    z, U, scale, bias, dy = (a[k].detach().double() for k in ("z", "U", "scale", "bias", "dy"))
    z, scale = z.clone().requires_grad_(), scale.clone().requires_grad_()
    S, T = len(scale), z.shape[:-1].numel()
    y = (z.reshape(T, -1) * scale.repeat_interleave(T // S, 0)) @ U.T + bias
    y = y.view(*z.shape[:-1], -1)
    return y.detach(), *torch.autograd.grad(y, (z, scale), dy)


@implementations
@rows
@pytest.mark.parametrize("dtype", [*EXACT, *HALF], ids=str)
def test_matches_fp64(which: str, lead: tuple[int, ...], S: int, columns: bool, dtype: torch.dtype) -> None:
    a = make(lead, S, columns, dtype)
    forward, backward = IMPLEMENTATIONS[which]
    y, dz, dscale = truth(a)
    tolerance = EXACT.get(dtype, 4 * torch.finfo(dtype).eps)
    actual = forward(a["z"], a["U"], a["scale"], a["bias"])
    assert actual.dtype == dtype and relative(actual, y) <= tolerance
    actual_dz, actual_dscale = backward(a["dy"], a["z"], a["U"], a["scale"], True)
    assert actual_dz.dtype == dtype and relative(actual_dz, dz) <= tolerance
    assert actual_dscale.dtype == a["scale"].dtype and relative(actual_dscale, dscale) <= tolerance


LARGE = [((300,), 1, False), ((4, 75), 4, False), ((16, 20), 16, True), ((4, 100), 1, True), ((1, 300), 1, True)]


@pytest.mark.parametrize(("lead", "S", "columns"), LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("onednn", [True, False])
def test_large_products_match_fp64_whoever_multiplies(
    lead: tuple[int, ...], S: int, columns: bool, dtype: torch.dtype, onednn: bool
) -> None:
    a = make(lead, S, columns, dtype, (320, 272))
    y, dz, dscale = truth(a)
    tolerance = EXACT.get(dtype, 4 * torch.finfo(dtype).eps)
    with torch.backends.mkldnn.flags(enabled=onednn):
        actual = served(a["z"], a["U"], a["scale"], a["bias"])
        actual_dz, actual_dscale = torch.ops.svdiff.expand_backward(a["dy"], a["z"], a["U"], a["scale"], True)
    assert relative(actual, y) <= tolerance
    assert relative(actual_dz, dz) <= tolerance and relative(actual_dscale, dscale) <= tolerance
    for result in (actual, actual_dz):
        assert ops.columns_dense(result) == columns
        assert (result.transpose(1, 2) if columns else result).is_contiguous()


def test_other_makers_cpus_multiply_by_onednn() -> None:
    if backends.extension is None or not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("no extension, or a torch without MKL or oneDNN")
    x, weight = torch.randn(300, 160), torch.randn(96, 160)

    def calls(width: int) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ops.frozen_linear(x[:, :width], weight[:, :width])
        return {event.key for event in profile.key_averages()}

    slow_mkl = "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    assert ("mkldnn::_linear_pointwise" in calls(160)) == slow_mkl
    assert "mkldnn::_linear_pointwise" not in calls(2)  # over before it is prepared
    with torch.backends.mkldnn.flags(enabled=False):
        assert "mkldnn::_linear_pointwise" not in calls(160)


@implementations
@rows
def test_a_bf16_model_may_keep_its_factors_in_fp16(which: str, lead: tuple[int, ...], S: int, columns: bool) -> None:
    a = make(lead, S, columns, torch.float16)
    a["bias"], a["dy"] = a["bias"].bfloat16(), a["dy"].bfloat16()
    forward, backward = IMPLEMENTATIONS[which]
    y, dz, dscale = truth(a)
    actual = forward(a["z"], a["U"], a["scale"], a["bias"], torch.bfloat16)
    assert actual.dtype == torch.bfloat16 and relative(actual, y) <= torch.finfo(torch.bfloat16).eps
    assert ops.columns_dense(actual) == columns
    actual_dz, actual_dscale = backward(a["dy"], a["z"], a["U"], a["scale"], True)
    assert actual_dz.dtype == torch.bfloat16 and relative(actual_dz, dz) <= torch.finfo(torch.bfloat16).eps
    assert relative(actual_dscale, dscale) <= torch.finfo(torch.bfloat16).eps


@implementations
@rows
def test_results_are_laid_out_as_promised(which: str, lead: tuple[int, ...], S: int, columns: bool) -> None:
    a = make(lead, S, columns)
    forward, backward = IMPLEMENTATIONS[which]
    y = forward(a["z"], a["U"], a["scale"], None)
    dz, _ = backward(a["dy"], a["z"], a["U"], a["scale"], True)
    for result in (y, dz):
        assert ops.columns_dense(result) == columns
        assert (result.transpose(1, 2) if columns else result).is_contiguous()


@implementations
@rows
def test_only_what_is_wanted_is_computed(which: str, lead: tuple[int, ...], S: int, columns: bool) -> None:
    a = make(lead, S, columns)
    _, backward = IMPLEMENTATIONS[which]
    dz, dscale = backward(a["dy"], a["z"], a["U"], a["scale"], True)
    only_dz, nothing = backward(a["dy"], None, a["U"], a["scale"], True)
    assert nothing.numel() == 0 and torch.allclose(only_dz, dz)
    nothing, only_dscale = backward(a["dy"], a["z"], a["U"], a["scale"], False)
    assert nothing.numel() == 0 and torch.allclose(only_dscale, dscale)


@implementations
def test_arguments_are_left_alone(which: str) -> None:
    a = make((6, 5), 3, False)
    copies = {k: v.clone() for k, v in a.items()}
    forward, backward = IMPLEMENTATIONS[which]
    forward(a["z"], a["U"], a["scale"], a["bias"])
    backward(a["dy"], a["z"], a["U"], a["scale"], True)
    assert all(torch.equal(a[k], v) for k, v in copies.items())


@implementations
def test_any_strides(which: str) -> None:
    forward, backward = IMPLEMENTATIONS[which]
    a = make((4, 15), 2, False)
    z = torch.randn(15, R * 2, 4, dtype=torch.float64)[:, ::2].permute(2, 0, 1)
    dy = torch.randn(1, 1, M, dtype=torch.float64).expand(4, 15, M)
    U = a["U"].T.contiguous().T
    assert torch.allclose(forward(z, U, a["scale"], None), forward(z.contiguous(), a["U"], a["scale"], None))
    strided, dense = (backward(d, z, u, a["scale"], True) for d, u in ((dy, U), (dy.contiguous(), a["U"])))
    assert all(torch.allclose(s, d) for s, d in zip(strided, dense, strict=True))
    mixed = make((4, 15), 2, True)  # z of one layout, dy of the other
    for dz, other in ((mixed["dy"], z), (dy, mixed["z"])):
        got, want = (
            backward(dz, other, U, a["scale"], True),
            backward(dz.contiguous(), other.contiguous(), U, a["scale"], True),
        )
        assert all(torch.allclose(g, w) for g, w in zip(got, want, strict=True))


def test_output_does_not_depend_on_what_memory_held() -> None:
    a = make((2, 41), 1, True, torch.float32)
    expected = ops.expand(a["z"], a["U"], a["scale"], a["bias"])
    was = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.equal(ops.expand(a["z"], a["U"], a["scale"], a["bias"]), expected)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was
        torch.use_deterministic_algorithms(False)


def test_deterministic() -> None:
    a = make((2048,), 1, False, torch.float32)
    runs = [torch.ops.svdiff.expand_backward(a["dy"], a["z"], a["U"], a["scale"], True)[1] for _ in range(5)]
    assert all(torch.equal(runs[0], run) for run in runs)


@rows
def test_opcheck(lead: tuple[int, ...], S: int, columns: bool) -> None:
    a = make(lead, S, columns, torch.float32)
    z, scale = a["z"].detach().requires_grad_(), a["scale"].requires_grad_()
    assert z.stride() == a["z"].stride()
    torch.library.opcheck(torch.ops.svdiff.expand.default, (z, a["U"], scale, a["bias"], None))
    torch.library.opcheck(torch.ops.svdiff.expand.default, (z, a["U"], scale, None, None))
    plain = (a["dy"], a["z"].detach(), a["U"], a["scale"].detach())
    for need_dz in (True, False):
        torch.library.opcheck(torch.ops.svdiff.expand_backward.default, (*plain, need_dz))


@rows
def test_gradcheck(lead: tuple[int, ...], S: int, columns: bool) -> None:
    a = make(lead, S, columns)
    wanted = (a["z"].requires_grad_(), a["U"], a["scale"].requires_grad_(), a["bias"].requires_grad_())
    assert torch.autograd.gradcheck(ops.expand, wanted, fast_mode=True)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_with_dynamic_rows() -> None:
    a = make((37,), 1, False, torch.float32)
    compiled = torch.compile(ops.expand, fullgraph=True, dynamic=True)
    for T in (37, 5, 64):
        z = torch.randn(T, R)
        assert torch.allclose(compiled(z, a["U"], a["scale"], a["bias"]), ops.expand(z, a["U"], a["scale"], a["bias"]))


@pytest.mark.skipif(backends.extension is None, reason="no C++ compiler was there to build the extension")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(4, R + 1)}, "z has shape"),
        ({"scale": torch.zeros(1, R + 1)}, "scale has shape"),
        ({"scale": torch.zeros(3, R)}, "do not split"),
        ({"z": torch.zeros(4, R).half()}, "but U is"),
        ({"z": torch.zeros(4, R).double()}, "but U is"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    good = {"z": torch.zeros(4, R), "U": torch.zeros(M, R), "scale": torch.zeros(1, R)}
    with pytest.raises(ValueError, match=message):
        ops.expand(**(good | change))
