"""spectral_linear, spectral_conv2d and spectral_embedding against fp64 recomposition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import EXACT, HALF, HALF_FACTOR, LAYERS, Layer, relative
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from svdiff_kernels import decompose, scaled, spectral_conv2d, spectral_embedding, spectral_linear

forms = pytest.mark.parametrize("residual", [False, True], ids=["factored", "residual"])
layers = pytest.mark.parametrize("name", LAYERS)


@forms
@layers
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_matches_fp64_recomposition(name: str, residual: bool, dtype: torch.dtype) -> None:
    layer = LAYERS[name]()
    truth = layer.truth(residual=residual)
    actual = layer.run(layer.spectral, dtype, dtype, residual=residual)
    assert actual["y"].dtype == dtype
    for key, value in truth.items():
        assert relative(actual[key], value) <= EXACT[dtype], key


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_in_one_call_gives_the_bits_of_its_parts(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = LAYERS[name]()
    in_one = layer.run(layer.spectral, dtype, torch.float32, residual=False)
    monkeypatch.setattr(scaled, "_in_one_call", lambda alpha, bias: False)
    in_parts = layer.run(layer.spectral, dtype, torch.float32, residual=False)
    assert all(torch.equal(in_one[key], part) for key, part in in_parts.items())


def test_a_bias_that_trains_gets_its_gradient() -> None:
    layer = LAYERS["linear"]()
    factors, x, delta = layer.factors, layer.x, layer.delta
    bias = layer.bias.clone().requires_grad_()
    spectral_linear(x, factors.U, factors.sigma, factors.Vh, delta, bias).backward(layer.dy)
    torch.testing.assert_close(bias.grad, layer.dy.sum(0))


def run_with_factors_in_fp16(layer: Layer, way: Callable[..., Tensor], dy_scale: float) -> dict[str, Tensor]:
    """A bf16 layer with its factors in fp16; the gradients are of ``dy_scale * dy``, and divided by that."""
    x = layer.x.bfloat16().requires_grad_()
    delta = layer.delta.float().requires_grad_()
    f = layer.factors
    U, Vh = f.U.half(), f.Vh.half()
    bias = None if layer.bias is None else layer.bias.bfloat16()
    arguments = (
        x,
        U,
        f.sigma.float(),
        Vh if layer.kind == "linear" else Vh.unflatten(1, layer.weight.shape[1:]),
        delta,
    )
    y = way(*arguments, bias, **layer.geometry)
    y.backward((layer.dy * dy_scale).bfloat16())
    return {"y": y.detach(), "d_delta": delta.grad / dy_scale, "dx": x.grad.float() / dy_scale}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("in_one_call", [False, True], ids=["in parts", "in one call"])
@pytest.mark.parametrize("name", ["linear tokens", "linear per sample", "conv", "conv few pixels", "conv per sample"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_factors_in_fp16_lose_no_small_gradient(
    name: str, in_one_call: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_call:
        monkeypatch.setattr(scaled, "_in_one_call", lambda alpha, bias: False)
    layer = LAYERS[name]()
    way = spectral_linear if layer.kind == "linear" else spectral_conv2d
    run = torch.compile(way, fullgraph=True, backend="aot_eager") if compiled else way
    for dy_scale in (1.0, 1e-12):
        actual = run_with_factors_in_fp16(layer, run, dy_scale)
        assert actual["y"].dtype == torch.bfloat16
        for key, value in layer.truth(residual=False).items():
            assert relative(actual[key], value) <= torch.finfo(torch.bfloat16).eps, (key, dy_scale)


@forms
@layers
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_as_good_as_plain_torch(name: str, residual: bool, dtype: torch.dtype) -> None:
    layer = LAYERS[name]()
    truth = layer.truth(residual=residual)
    actual = layer.run(layer.spectral, dtype, torch.float32, residual=residual)
    plain = layer.run(layer.recomposed, dtype, dtype, residual=residual)
    assert actual["y"].dtype == dtype
    assert actual["d_delta"].dtype == torch.float32
    for key, value in truth.items():
        assert relative(actual[key], value) <= HALF_FACTOR * relative(plain[key], value), key


@forms
@layers
def test_gradient_is_zero_at_and_below_the_kink(name: str, residual: bool) -> None:
    layer = LAYERS[name]()
    d_delta = layer.run(layer.spectral, torch.float32, torch.float32, residual=residual)["d_delta"]
    cut = (layer.factors.sigma.float() + layer.delta.float() <= 0).expand_as(d_delta)
    assert cut[..., 0].all()
    assert (~cut).any()
    assert torch.equal(d_delta[cut], torch.zeros_like(d_delta[cut]))
    assert torch.isfinite(d_delta).all()


@forms
@pytest.mark.parametrize("name", ["linear", "conv", "conv few pixels", "embedding"])
def test_everything_cut_off_is_still_finite(name: str, residual: bool) -> None:
    layer = LAYERS[name]()
    layer.delta = -3 * layer.factors.sigma
    actual = layer.run(layer.spectral, torch.float32, torch.float32, residual=residual)
    truth = layer.truth(residual=residual)
    assert not actual["d_delta"].any()
    assert torch.allclose(actual["y"].double(), truth["y"], atol=1e-5)


@forms
@layers
def test_gradcheck(name: str, residual: bool) -> None:
    layer = LAYERS[name]()
    delta = (layer.factors.sigma * 0.3 * torch.rand_like(layer.delta)).requires_grad_()  # away from the kink
    x = layer.x[:, :7] if layer.kind == "linear" and layer.x.dim() == 3 else layer.x
    inputs = (delta,) if layer.kind == "embedding" else (x.clone().requires_grad_(), delta)

    def call(*given: Tensor) -> Tensor:
        return layer.spectral(given[0] if len(given) == 2 else x, given[-1], torch.float64, residual=residual)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(
    M=st.integers(1, 40),
    N=st.integers(1, 40),
    T=st.integers(0, 70),
    rank=st.integers(1, 40),
    residual=st.booleans(),
    bias=st.booleans(),
)
def test_linear_of_any_shape(M: int, N: int, T: int, rank: int, residual: bool, bias: bool) -> None:
    torch.manual_seed(M + 41 * N)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    layer = Layer("linear", normal(M, N), normal(T, N), normal(M) if bias else None, rank=rank)
    truth = layer.truth(residual=residual)
    actual = layer.run(layer.spectral, torch.float64, torch.float64, residual=residual)
    for key, value in truth.items():
        assert torch.allclose(actual[key], value, rtol=1e-9, atol=1e-9), key


@forms
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_no_rows(residual: bool, dtype: torch.dtype) -> None:
    for layer in (LAYERS["linear"](), LAYERS["conv"](), LAYERS["conv channels last"](), LAYERS["embedding"]()):
        layer.x, layer.dy = layer.x[:0], layer.dy[:0]
        out = layer.run(layer.spectral, dtype, torch.float32, residual=residual)
        assert out["y"].shape == layer.dy.shape
        assert not out["d_delta"].any()


@forms
@pytest.mark.parametrize("shape", [(4, 0, 23), (2, 3, 5, 23), (23,)], ids=str)
def test_linear_takes_any_leading_dimensions(residual: bool, shape: tuple[int, ...]) -> None:
    layer = LAYERS["linear"]()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer.spectral(x, layer.delta, torch.float64, residual=residual)
    expected = layer.recomposed(x.reshape(-1, 23), layer.delta, torch.float64, residual=residual)
    assert torch.allclose(y.reshape(-1, 29), expected)


@forms
def test_strided_input(residual: bool) -> None:
    layer = LAYERS["linear tokens"]()
    delta = layer.delta.clone().requires_grad_()
    wide = torch.randn(26, 62, 3, dtype=torch.float64)
    views = [
        wide[::2, ::2].permute(2, 0, 1),
        wide[:13, :31].transpose(0, 2).transpose(1, 2),
        wide[0, 0, :1].expand(3, 13, 31),
    ]
    for x in views:
        assert x.shape == layer.x.shape and not x.is_contiguous()
        strided = layer.spectral(x, delta, torch.float64, residual=residual)
        dense = layer.spectral(x.contiguous(), delta, torch.float64, residual=residual)
        assert torch.allclose(strided, dense)
        grads = [torch.autograd.grad(y.sum(), delta)[0] for y in (strided, dense)]  # sum(): dy with strides 0
        assert torch.allclose(*grads)


@forms
@pytest.mark.parametrize("name", ["conv", "conv few pixels", "conv 1x1", "conv channels last"])
def test_conv_keeps_the_memory_format(name: str, residual: bool) -> None:
    layer = LAYERS[name]()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = layer.x.float().contiguous(memory_format=memory_format).requires_grad_()
        y = layer.spectral(x, layer.delta.float(), torch.float32, residual=residual)
        assert y.is_contiguous(memory_format=memory_format)
        expected = layer.recomposed(x.double(), layer.delta, torch.float64, residual=residual)
        assert relative(y, expected) <= EXACT[torch.float32]


def test_conv_takes_an_image_without_batch() -> None:
    layer = LAYERS["conv"]()
    y = layer.spectral(layer.x[0], layer.delta, torch.float64, residual=False)
    assert torch.allclose(y, layer.spectral(layer.x, layer.delta, torch.float64, residual=False)[0])


@forms
@pytest.mark.parametrize("name", ["linear tokens", "conv", "conv few pixels", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("fresh_dynamo")
def test_traces_without_a_graph_break(name: str, residual: bool, dtype: torch.dtype) -> None:
    layer = LAYERS[name]()
    compiled = torch.compile(layer.spectral, fullgraph=True, backend="aot_eager")
    expected = layer.run(layer.spectral, dtype, torch.float32, residual=residual)
    actual = layer.run(compiled, dtype, torch.float32, residual=residual)
    for key, value in expected.items():
        assert relative(actual[key], value) <= (1e-6 if dtype == torch.float32 else 1e-2), key


@pytest.mark.parametrize("name", ["linear tokens", "conv"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_to_code_for_changing_shapes(name: str) -> None:
    layer = LAYERS[name]()
    compiled = torch.compile(layer.spectral, fullgraph=True)
    for part in (layer.x, layer.x[..., :-3, :]):
        layer.x = part
        layer.dy = torch.randn_like(layer.recomposed(part, layer.delta, torch.float64, residual=False))
        expected = layer.run(layer.spectral, torch.float32, torch.float32, residual=False)
        actual = layer.run(compiled, torch.float32, torch.float32, residual=False)
        for key, value in expected.items():
            assert relative(actual[key], value) <= 1e-6, key


@forms
@pytest.mark.parametrize("name", ["linear tokens", "conv", "conv grouped"])
def test_autocast(name: str, residual: bool) -> None:
    layer = LAYERS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.run(layer.spectral, torch.float32, torch.float32, residual=residual)
        plain = layer.run(layer.recomposed, torch.float32, torch.float32, residual=residual)
    assert mixed["y"].dtype == torch.bfloat16
    assert mixed["dx"].dtype == mixed["d_delta"].dtype == torch.float32
    for key, value in layer.truth(residual=residual).items():
        assert relative(mixed[key], value) <= HALF_FACTOR * relative(plain[key], value), key


@forms
@pytest.mark.parametrize("name", ["embedding", "embedding per sample"])
def test_autocast_leaves_embeddings_alone(name: str, residual: bool) -> None:
    layer = LAYERS[name]()

    def mixed(*args: object, **kwargs: object) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer.spectral(*args, **kwargs)

    expected = layer.run(layer.spectral, torch.float32, torch.float32, residual=residual)
    actual = layer.run(mixed, torch.float32, torch.float32, residual=residual)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@forms
@pytest.mark.parametrize("name", ["linear", "conv", "embedding"])
def test_gradient_checkpointing(name: str, residual: bool) -> None:
    layer = LAYERS[name]()

    def checkpointed(*args: object, **kwargs: object) -> Tensor:
        return checkpoint(layer.spectral, *args, use_reentrant=False, **kwargs)

    expected = layer.run(layer.spectral, torch.float32, torch.float32, residual=residual)
    actual = layer.run(checkpointed, torch.float32, torch.float32, residual=residual)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("name", [name for name in LAYERS if "per sample" not in name])
def test_residual_form_is_exact_to_the_bit_at_zero(name: str) -> None:
    layer = LAYERS[name]()
    zero = torch.zeros(layer.factors.rank)
    x = layer.x if layer.kind == "embedding" else layer.x.float()
    bias = None if layer.bias is None else layer.bias.float()
    y = layer.spectral(x, zero, torch.float32, residual=True)
    assert torch.equal(y, layer.plain(x, layer.weight.float(), bias))


def test_padding_idx_adds_nothing_to_the_gradient() -> None:
    layer = LAYERS["embedding"]()
    ids = torch.tensor([[3, 7, 0], [7, 7, 30]])
    F64 = layer.factors
    grads = []
    for padding_idx in (None, 7):
        delta = layer.delta.clone().requires_grad_()
        y = spectral_embedding(ids, F64.U, F64.sigma, F64.Vh, delta, padding_idx=padding_idx)
        keep = torch.ones_like(y) if padding_idx is not None else (ids != 7)[..., None].expand_as(y).double()
        grads.append(torch.autograd.grad(y, delta, keep)[0])
    assert torch.allclose(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 8)}, "x has shape"),
        ({"U": torch.zeros(9, 5)}, "U has shape"),
        ({"sigma": torch.zeros(6, 1)}, "sigma has shape"),
        ({"Vh": torch.zeros(6, 7, 1)}, "Vh has shape"),
        ({"Vh": torch.zeros(5, 7)}, "Vh has shape"),
        ({"delta": torch.zeros(7)}, "delta has shape"),
        ({"delta": torch.zeros(2, 6)}, "do not split"),
        ({"bias": torch.zeros(7)}, "bias has shape"),
        ({"weight": torch.zeros(7, 9)}, "weight has shape"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, Tensor], message: str) -> None:
    f = decompose(torch.randn(9, 7), rank=6)
    good = {"x": torch.zeros(5, 7), "U": f.U, "sigma": f.sigma, "Vh": f.Vh, "delta": torch.zeros(6)}
    assert spectral_linear(**good).shape == (5, 9)
    with pytest.raises(ValueError, match=message):
        spectral_linear(**(good | change))


def test_wrong_shapes_of_conv_and_embedding_are_named() -> None:
    f = decompose(torch.randn(9, 12))
    U, sigma, Vh, delta = f.U, f.sigma, f.Vh.view(9, 3, 2, 2), torch.zeros(9)
    with pytest.raises(ValueError, match="x has shape"):
        spectral_conv2d(torch.zeros(2, 4, 5, 5), U, sigma, Vh, delta)
    with pytest.raises(ValueError, match="Vh has shape"):
        spectral_conv2d(torch.zeros(2, 3, 5, 5), U, sigma, f.Vh, delta)
    with pytest.raises(ValueError, match="padding must be"):
        spectral_conv2d(torch.zeros(2, 3, 5, 5), U, sigma, Vh, delta, padding="full")
    with pytest.raises(ValueError, match="ids must be integers"):
        spectral_embedding(torch.zeros(3), U, sigma, f.Vh, delta)


def test_factors_are_frozen() -> None:
    f = decompose(torch.randn(9, 7))
    with pytest.raises(ValueError, match="frozen"):
        spectral_linear(torch.zeros(5, 7), f.U.requires_grad_(), f.sigma, f.Vh, torch.zeros(7))
