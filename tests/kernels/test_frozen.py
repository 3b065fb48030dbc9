"""Products with frozen weights: torch's own, but for what they keep and how they sum half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import EXACT, HALF, relative
from torch import Tensor

from svdiff_kernels import backends, ops, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of x, of the weight, and what is asked of the result.
types = pytest.mark.parametrize(
    ("dtype", "weight_dtype", "out"),
    [
        *((dtype, dtype, None) for dtype in (*EXACT, *HALF)),
        *((dtype, dtype, F32) for dtype in HALF),
        (BF16, F16, F16),
        (BF16, F16, None),
        (F16, F16, BF16),
    ],
    ids=str,
)
# (x, weight, stride, padding, dilation): few pixels and many, a far edge that the stride drops, several images
CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "few pixels": ((2, 5, 6, 7), (13, 5, 3, 3), (1, 1), (1, 1), (1, 1)),
    "many pixels": ((2, 5, 17, 11), (13, 5, 3, 3), (1, 1), (1, 1), (1, 1)),
    "few strided": ((1, 5, 14, 12), (3, 5, 3, 2), (2, 3), (1, 0), (1, 1)),
    "many strided": ((3, 5, 22, 18), (11, 5, 3, 2), (2, 3), (1, 0), (2, 1)),
}
convs = pytest.mark.parametrize("name", CONVS)


def conv_arguments(name: str, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    x, weight, *geometry = CONVS[name]
    return normal(x).to(dtype), normal(weight).to(weight_dtype or dtype), normal(weight[:1]).to(dtype), *geometry


def normal(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def bound(dtype: torch.dtype) -> float:
    """Of the relative error: sums are never taken in half precision, so that one rounding is all there is."""
    return EXACT.get(dtype, torch.finfo(dtype).eps)


@types
@pytest.mark.parametrize("lead", [(37,), (2, 5), (0,), ()], ids=str)
def test_linear_matches_fp64(
    lead: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, out: torch.dtype | None
) -> None:
    x, bias = (normal(s).to(dtype) for s in ((*lead, 23), (29,)))
    weight = normal((29, 23)).to(weight_dtype)
    x.requires_grad_()
    y = ops.frozen_linear(x, weight, bias, dtype=out)
    dy = normal(tuple(y.shape))
    y.backward(dy.to(y.dtype))
    truth = x.detach().double().requires_grad_()
    y64 = F.linear(truth, weight.double(), bias.double())
    y64.backward(dy)
    assert y.dtype == (out or dtype) and x.grad.dtype == dtype
    assert relative(y, y64) <= bound(out or dtype)
    assert relative(x.grad, truth.grad) <= 2 * bound(dtype)


@pytest.mark.parametrize("alpha", [2.0**-7, 4.0])
def test_alpha_keeps_large_inputs_within_fp16(alpha: float) -> None:
    x = (normal((37, 23)) * 1e5 / alpha / 2**7).bfloat16().requires_grad_()
    weight = normal((29, 23)).half() / 16
    y = ops.frozen_linear(x, weight, dtype=F16, alpha=alpha)
    assert relative(y, alpha * x.detach().double() @ weight.double().T) <= bound(F16)
    dy = normal((37, 29)).half()
    y.backward(dy)
    assert relative(x.grad, alpha * dy.double() @ weight.double()) <= 2 * bound(BF16)


@types
@convs
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
def test_conv_matches_fp64(
    name: str, channels_last: bool, dtype: torch.dtype, weight_dtype: torch.dtype, out: torch.dtype | None
) -> None:
    x, weight, bias, *geometry = conv_arguments(name, dtype, weight_dtype)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    y = ops.frozen_conv2d(x, weight, bias, *geometry, dtype=out)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    dy = normal(tuple(y.shape))
    y.backward(dy.to(y.dtype))
    truth = x.detach().double().requires_grad_()
    y64 = F.conv2d(truth, weight.double(), bias.double(), *geometry)
    y64.backward(dy)
    assert y.dtype == (out or dtype) and x.grad.dtype == dtype
    assert relative(y, y64) <= bound(out or dtype)
    assert relative(x.grad, truth.grad) <= 2 * bound(dtype)


@convs
def test_exact_conv_gives_the_bits_of_torch(name: str) -> None:
    x, weight, bias, *geometry = conv_arguments(name, torch.float32)
    assert torch.equal(ops.frozen_conv2d(x, weight, bias, *geometry, exact=True), F.conv2d(x, weight, bias, *geometry))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@convs
def test_what_serves_is_what_the_reference_computes(name: str, dtype: torch.dtype) -> None:
    x, weight, bias, stride, padding, dilation = conv_arguments(name, dtype)
    y = ops.frozen_conv2d(x, weight, bias, stride, padding, dilation)
    expected = reference.frozen_conv2d(x, weight, bias, stride, padding, dilation)
    assert y.is_contiguous() and relative(y, expected) <= bound(dtype)
    dx = torch.ops.svdiff.frozen_conv2d_backward(y, weight, x.shape[2:], stride, padding, dilation)
    expected = reference.frozen_conv2d_backward(y, weight, x.shape[2:], stride, padding, dilation)
    assert dx.is_contiguous() and relative(dx, expected) <= 2 * bound(dtype)


@convs
def test_gradcheck(name: str) -> None:
    x, weight, bias, *geometry = conv_arguments(name, torch.float64)
    assert torch.autograd.gradcheck(
        lambda t: ops.frozen_conv2d(t, weight, bias, *geometry), x.requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize(("dtype", "weight_dtype", "out"), [(F32, F32, None), (BF16, BF16, F32), (BF16, F16, None)])
@convs
def test_opcheck(name: str, dtype: torch.dtype, weight_dtype: torch.dtype, out: torch.dtype | None) -> None:
    x, weight, bias, *geometry = conv_arguments(name, dtype, weight_dtype)
    for inputs in (x, x.contiguous(memory_format=torch.channels_last)):
        arguments = (inputs.detach().requires_grad_(), weight, bias, *geometry, out, False)
        torch.library.opcheck(torch.ops.svdiff.frozen_conv2d.default, arguments)
    rows = torch.randn(2, 7, 5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(
        torch.ops.svdiff.frozen_linear.default, (rows, normal((9, 5)).to(weight_dtype), None, out, 0.25)
    )


@pytest.mark.usefixtures("fresh_dynamo")
def test_conv_compiles_with_dynamic_sizes() -> None:
    _, weight, bias, *geometry = conv_arguments("many strided", torch.float32)

    def step(x: Tensor) -> Tensor:
        return torch.autograd.grad(ops.frozen_conv2d(x, weight, bias, *geometry).square().sum(), x)[0]

    compiled = torch.compile(step, dynamic=True)
    for size in ((2, 5, 22, 18), (1, 5, 9, 11), (3, 5, 30, 30)):
        x = torch.randn(size, requires_grad=True)
        assert torch.allclose(compiled(x), step(x), rtol=1e-4, atol=1e-4)


def test_a_weight_that_wants_a_gradient_is_refused() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match="requires grad"):
        ops.frozen_linear(torch.randn(2, 5, requires_grad=True), weight)


@pytest.mark.skipif(backends.extension is None, reason="no C++ compiler was there to build the extension")
def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="x has shape"):
        ops.frozen_linear(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="but weight is"):
        ops.frozen_linear(torch.zeros(2, 5).double(), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="x has shape"):
        ops.frozen_conv2d(torch.zeros(1, 4, 5, 5), torch.zeros(3, 5, 1, 1), None, (1, 1), (0, 0), (1, 1))
